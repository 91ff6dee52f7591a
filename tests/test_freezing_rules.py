"""A freezing rule in a file of one's own, named on the real command line."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import CONFIGS, MIFO, printed, refused, short

from mifo_lightning.cli import main

MINE = """
from mifo_callbacks import FreezingRule


class Proportional(FreezingRule):
    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def score(self, at):
        return at.importance.pow(self.power) / -at.draw().log()
"""
RULE = {"class_path": "rules_of_mine.Proportional", "init_args": {"power": 0.5}}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that names the rule; its module can be imported."""
    (tmp_path / "rules_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"freeze": {"fraction": 0.25, "selector": RULE}}))
    return path


def test_a_rule_is_named_by_its_class_and_a_short_form_over_it_wins(
    capsys: pytest.CaptureFixture[str], mine: Path
) -> None:
    base = ("fit", *MIFO)
    with_power = {**RULE, "init_args": {"power": 2.0}}
    # that the file alone is enough the run below shows
    cases: list[tuple[tuple[str, ...], Any]] = [
        (("--config", str(mine), "--freeze.selector", "random"), "random"),
        (("--config", str(mine), "--freeze.selector.power", "2"), with_power),
        (("--freeze.selector", RULE["class_path"], "--freeze.selector.power", "2"), with_power),  # type: ignore[list-item]
    ]
    for arguments, selector in cases:
        assert printed(capsys, *base, *arguments)["freeze"]["init_args"]["selector"] == selector, arguments


def test_a_run_freezes_by_it(tmp_path: Path, mine: Path) -> None:
    root, logger = tmp_path / "run", str(CONFIGS / "logger" / "csv.yaml")
    arguments = short(root)
    at = arguments.index("--trainer.logger")
    arguments[at : at + 2] = ["--config", logger, "--trainer.logger.init_args.save_dir", str(root)]
    main([*arguments, "--config", str(mine)])
    found = next(root.rglob("metrics.csv"))
    shares = [float(row["freeze/share"]) for row in csv.DictReader(found.open()) if row.get("freeze/share")]
    assert shares
    assert all(share == pytest.approx(0.25, abs=1e-3) for share in shares)
    assert yaml.safe_load(next(root.rglob("config.yaml")).read_text())["freeze"]["init_args"]["selector"] == RULE


def test_what_is_no_rule_is_one_line(capsys: pytest.CaptureFixture[str], mine: Path) -> None:
    line = refused(capsys, *short(mine.parent / "run"), "--freeze.selector", "topk")
    assert "--freeze.selector" in line
    assert line.endswith(
        "'topk' is not allowed; it must be rl_topk, rl_bottomk, random, none or the class_path of a FreezingRule"
    )
