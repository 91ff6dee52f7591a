"""README's program, row and reward, the questions and reward of the quickstart, run as they stand; docs/data.md."""

import json
import re
import shlex
import tomllib
from ast import literal_eval
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import warm
import yaml

from mifo_lightning.cli import main, program
from mifo_lightning.cli.command_line import COMMAND
from mifo_lightning.data.columns import Columns
from mifo_lightning.data.rows import read_rows

ROOT = Path(__file__).parents[1]
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
SECTION = QUICKSTART.partition("\n## Your questions")[2].partition("\n## ")[0]
BLOCKS = dict(re.findall(r"```(\w+)\n(.*?)```", SECTION, re.S))
NAMES = {"csv": "mine.csv", "yaml": "mine.yaml", "python": "my_rewards.py"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the three files of the quickstart, and the repository's configurations."""
    for kind, name in NAMES.items():
        (tmp_path / name).write_text(BLOCKS[kind], encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` does
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def test_the_command_trains_on_the_file_with_the_reward(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"^python -m mifo_lightning (.*mine\.yaml.*)$", SECTION, re.M)
    assert command
    with pytest.warns(UserWarning, match=r"^data\.schedule\.prompts_per_step: 32 → 4, "):
        main([*shlex.split(command[1]), "--trainer.logger", "false"])
    assert "mine-holdout" in capsys.readouterr().out
    summary = json.loads((here / "runs" / "tiny" / "summary.json").read_text())
    assert (summary["sft_phases"], summary["optimizer_steps"]) == (3, 9)


def test_the_row_format_shows_the_first_row(here: Path) -> None:
    (here / "rows.jsonl").write_text(BLOCKS["json"].replace("\n", ""), encoding="utf-8")
    columns = Columns(prompt="question", truth="answer", target="solution")
    (row,), (mapped, *_) = read_rows("rows.jsonl"), read_rows("mine.csv", columns=columns)
    keys = ("data_source", "prompt", "target")
    assert [row[key] for key in keys] == [mapped[key] for key in keys]
    assert row["reward_model"]["ground_truth"] == mapped["reward_model"]["ground_truth"]


def test_the_mappings_of_the_page_are_mappings() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    shown = [Columns(**yaml.safe_load(text)) for text in re.findall(r"^\|.*\| `(\{.*\})` \|$", page, re.M)]
    assert len(shown) == 6
    for key, default in vars(Columns()).items():
        assert f"| `{key}` | {'null' if default is None else f'`{default}`'} |" in page


def test_the_command_that_shells_complete_is_the_command_line() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert [EntryPoint(name, path, "console_scripts").load() for name, path in scripts.items()] == [program]
    assert list(scripts) == [COMMAND]


def test_the_program_trains_and_answers(tmp_path: Path) -> None:
    """In a process of its own, which nothing has seeded before."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^<!-- program -->\n```python\n(.*?)```\n<!-- program: end -->$", readme, re.S | re.M)
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    printed = warm.run(tmp_path / "program.py", output=tmp_path / "printed.txt", directory=tmp_path)
    ((*responses,),) = literal_eval(next(line for line in printed.splitlines() if line.startswith("[")))
    assert len(responses) == 4
    assert all(">" in response for response in responses)


def test_the_reward_finds_the_row_s_solution_right(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Your questions")[2]
    shown = dict(re.findall(r"```(json|python)\n(.*?)```", section, re.S))
    (tmp_path / "mine.jsonl").write_text(shown["json"], encoding="utf-8")
    (row,) = read_rows(str(tmp_path / "mine.jsonl"))
    names: dict[str, Any] = {}
    exec(shown["python"], names)
    solution, truth = row["target"][0]["content"], row["reward_model"]["ground_truth"]
    assert names["last_number"]([solution, "6", ""], [truth] * 3) == [1.0, 0.0, 0.0]
