"""The quick part of `make stress`: a few of every tool's cases, and what the tools take for a failure."""

import os
import signal
from pathlib import Path

import pytest
import warm

from benchmarks.stress.inputs import classify
from benchmarks.stress.kills import Chain, report
from benchmarks.stress.table import markdown

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_short_stress_finds_nothing(tmp_path: Path) -> None:
    stress = warm.Program(
        ["-m", "benchmarks.stress", "--short", "--out", str(tmp_path)], tmp_path / "printed.txt", ROOT
    )
    try:
        assert stress.wait(900) == 0, stress.said()[-4000:]
    finally:
        if stress.poll() is None:
            os.killpg(stress.pid, signal.SIGKILL)
    assert "stress: nothing went wrong" in stress.said()
    tables = {path.stem: path.read_text() for path in tmp_path.glob("*.md")}
    assert set(tables) == {"inputs", "fuzz", "security", "kills", "endurance"}
    for name, text in tables.items():
        assert text.startswith(f"```\npython -m benchmarks.stress.{name}")
        assert "Nothing went wrong." in text


@pytest.mark.parametrize(
    ("code", "out", "expect", "outcome"),
    [
        (0, "files: x", "accepted", "accepted"),
        (0, "files: x", "refused", "let in"),
        (2, "error: model.optimizer.rl.lr: -1", "refused", "clear"),
        (2, "error: model.optimizer.rl.lr: -1", "accepted", "turned away"),
        (2, "error: a\nerror: b", "refused", "unclear"),
        (2, "usage: ...", "refused", "unclear"),
        (2, "error: \x1b]0;owned\x07", "refused", "unclear"),
        (1, "Traceback (most recent call last):\nValueError: x", "refused", "traceback"),
        (0, "Traceback (most recent call last):\nValueError: x", "accepted", "traceback"),
        (3, "", "refused", "unclear"),
        (None, "", "either", "hang"),
        (-11, "", "either", "signal"),
    ],
)
def test_an_outcome_is_what_a_user_would_call_it(code: int | None, out: str, expect: str, outcome: str) -> None:
    assert classify(code, out, expect)[0] == outcome


def test_a_run_that_ends_with_other_bits_loses_all_its_kills() -> None:
    same = {"weights": True, "history": True, "samples": True, "samples.jsonl": True}
    kill = ("SIGKILL", "process", False, -9)
    whole, other = Chain([kill] * 3, same=same), Chain([kill] * 2, same={**same, "history": False})
    table, wrong = report({"mifo": [whole, other], "luffy": [Chain([kill], problem="ended with 1")]})
    assert "| mifo | 5 | 0 | 0 | 0 | 3 | 2 | 0 | 0 |" in table
    assert "| all | 6 |" in table
    assert [line.partition(":")[0] for line in wrong] == ["mifo", "luffy"]
    assert report({"mifo": [whole]})[1] == []


def test_a_cell_cannot_end_a_table() -> None:
    assert markdown(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"
