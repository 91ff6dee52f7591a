"""The lab is a room of its own: it has commands, and nothing else in the package needs it or what it needs."""

import ast
from pathlib import Path

import pytest
import warm

import mifo_lightning
from mifo_lightning.lab.__main__ import main

PACKAGE = Path(mifo_lightning.__file__).parent
APART = ("mifo_lightning.lab", "matplotlib", "scipy", "submitit")


@pytest.mark.parametrize("module", ["mifo_lightning", "mifo_lightning.cli.entry"])
def test_importing_the_package_loads_nothing_of_the_lab(tmp_path: Path, module: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nprint(*(name for name in sys.modules if name.startswith('mifo')), 'before')\nimport {module}\n"
        f"m = sys.modules[{module!r}]\n[getattr(m, name) for name in dir(m)]\nprint(*sys.modules)"
    )
    before, after = warm.run(program, output=tmp_path / "printed.txt").splitlines()[-2:]
    assert before == "before", "what it is forked from has nothing of ours"
    loaded = after.split()
    assert module in loaded
    assert [name for name in loaded if name.startswith("mifo_lightning.lab")] == []


def test_no_other_room_imports_the_lab_or_what_it_needs() -> None:
    """In functions neither; dependencies of ours may load scipy and others where they are installed."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "lab" not in path.relative_to(PACKAGE).parts:
                found += [(path, name) for name in names if name.startswith(APART)]
    assert found == []


def test_commands_are_listed_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "ablation" in capsys.readouterr().out
    assert main(["rport"]) == 2
    assert "ablation" in capsys.readouterr().err
