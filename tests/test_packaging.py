"""Both distributions as others get them: wheels, and one pip command from git; used outside the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_grid import ROOT

from mifo_lightning.cli.packaged import names

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("git") is None or find_spec("pip") is None, reason="needs git and pip"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout"),
]

# the documented command; git takes the local repository for this address
URL = "https://example.org/mifo_lightning.git"
INSTALL = [f"mifo-callbacks @ git+{URL}#subdirectory=callbacks", f"mifo-lightning @ git+{URL}"]
SHORT = {
    "trainer.logger": "false",
    "trainer.enable_checkpointing": "false",
    "data.schedule.rl_steps": "2",
    "data.schedule.prompts_per_step": "8",
    "data.train.init_args.count": "64",
    "data.val.init_args.count": "8",
}


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    """Run a program that knows nothing of this checkout, with more variables; what it printed."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    env |= {"OMP_NUM_THREADS": "1", **more}
    ended = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare repository of the files of this checkout as they are now."""
    tree, bare = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("bare") / "mifo.git"
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    run("git", "init", "-q", cwd=tree)
    run("git", "add", "-A", cwd=tree)
    run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "as it is", cwd=tree)
    run("git", "clone", "-q", "--bare", tree, bare, cwd=tree)
    return bare


def environment(root: Path) -> Path:
    """A fresh environment, which finds what others have published in the present one; its directory of programs."""
    run(sys.executable, "-m", "venv", "--without-pip", root / "env", cwd=root)
    (site,) = (root / "env").glob("lib/python*/site-packages")
    (site / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return root / "env" / "bin"


def pip(programs: Path, *words: str | Path, cwd: Path, **more: str) -> None:
    """pip for this environment; nothing is asked of an index, dependencies are those of the present one."""
    call = [sys.executable, "-m", "pip", "--python", programs / "python", "-q", *words]
    run(*call, "--no-index", "--no-build-isolation", "--no-cache-dir", cwd=cwd, **more)


WHERE = """
import mifo_callbacks, mifo_lightning
print("", mifo_lightning.__file__, mifo_callbacks.__file__, sep="\\n")
"""


def check_where(printed: str, root: Path) -> None:
    """That both packages were imported from the environment below `root`, as the end of what WHERE printed says."""
    found = {Path(line).parents[1] for line in printed.splitlines()[-2:]}
    assert found == set((root / "env").glob("lib/python*/site-packages"))


def test_both_wheels_train_outside_the_checkout(repository: Path, tmp_path: Path) -> None:
    run("git", "clone", "-q", repository, tmp_path / "tree", cwd=tmp_path)
    programs, away = environment(tmp_path), tmp_path / "away"
    away.mkdir()
    pip(programs, "wheel", "--no-deps", "-w", "dist", tmp_path / "tree" / "callbacks", tmp_path / "tree", cwd=tmp_path)
    ours, _ = wheels = sorted((tmp_path / "dist").glob("*.whl"), key=lambda path: "callbacks" in path.name)
    inside = set(zipfile.ZipFile(ours).namelist())
    assert {f"mifo_lightning/configs/{name}.yaml" for name in names()} == {x for x in inside if "/configs/" in x}
    assert {"mifo_lightning/lab/report/page.html.jinja", "mifo_lightning/py.typed"} <= inside
    pip(programs, "install", "--no-deps", *wheels, cwd=tmp_path)
    flags = [text for key, value in SHORT.items() for text in (f"--{key}", value)]
    run(programs / "mifo", "fit", "--config", "tiny", "--config", "methods/mifo", *flags, cwd=away)
    summary = json.loads((away / "runs" / "tiny" / "summary.json").read_text())
    assert summary["optimizer_steps"] >= 2
    # README's cell, by nothing but what the wheels brought
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^<!-- program -->\n```python\n(.*?)```\n<!-- program: end -->$", readme, re.S | re.M)
    short, count = re.subn("rl_steps=8", "rl_steps=1", program)
    assert count == 1
    printed = run(programs / "python", "-c", short + WHERE, cwd=away)
    assert printed.count(">") >= 4
    check_where(printed, tmp_path)


def test_one_pip_command_installs_both_from_git(repository: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path)
    address = {"GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": URL}
    pip(programs, "install", *INSTALL, cwd=tmp_path, GIT_CONFIG_COUNT="1", **address)
    assert (programs / "mifo").is_file()
    program = "from mifo_lightning.cli.packaged import find, names; print(find('methods/mifo').is_file(), *names())"
    printed = run(programs / "python", "-c", program + WHERE, cwd=tmp_path)
    assert printed.splitlines()[0].split() == ["True", *names()]
    check_where(printed, tmp_path)
