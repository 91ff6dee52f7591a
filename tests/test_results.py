"""What runs recorded, reduced: learning curves in bins of RL steps, retention from pooled counts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mifo_lightning.lab.report.reductions import learning_curves, retention, retention_by_phase
from mifo_lightning.lab.report.results import Cell

Record = dict[str, Any]


def cell(history: list[Record] | None = None, phases: list[Record] | None = None) -> Cell:
    return Cell("a", "b", 0, Path(), "done", None, 1.0, {"forgetting": {"phases": phases or []}}, history or [])


def test_learning_curves_average_runs_and_join_accuracies_by_straight_lines() -> None:
    def run(shift: float) -> Cell:
        rewards = [{"step": i, "rl_step": i, "rollout/reward": i + shift, "phase/is_sft": 0.0} for i in range(1, 5)]
        first = {"step": 0, "rl_step": 0, "forgetting/x/accuracy": 0.9}
        later = {"step": 2, "rl_step": 2, "forgetting/x/accuracy": 0.5 + shift}
        sft = {"step": 3, "rl_step": 2, "phase/is_sft": 1.0}
        return cell([first, *rewards[:2], later, *([sft] if shift else []), *rewards[2:]])

    data = learning_curves([run(0.0), run(0.2)], bins=4)
    assert data is not None
    assert data.axis == "rl_step"
    np.testing.assert_allclose(data.edges, [-1, 0, 1, 2, 3, 4], atol=1e-12)
    np.testing.assert_allclose(data.reward, [np.nan, np.nan, 1.1, 2.1, 3.1, 4.1])
    np.testing.assert_allclose(data.accuracy["x"], [0.9, 0.9, 0.75, 0.6, 0.6, 0.6])
    np.testing.assert_allclose(data.sft, [0, 0, 0, 0.5, 0, 0])
    coarse = learning_curves([run(0.0)], bins=2)
    assert coarse is not None
    np.testing.assert_allclose(coarse.reward[2:], [1.5, 3.5])
    assert learning_curves([cell()]) is None


def test_where_accuracies_were_measured_and_where_two_measurements_are_far_apart() -> None:
    def run(*measured: int) -> Cell:
        rows = [{"step": i, "rl_step": i, "rollout/reward": 0.0} for i in range(9)]
        return cell([{**row, "forgetting/x/accuracy": 0.5} if row["rl_step"] in measured else row for row in rows])

    data = learning_curves([run(0, 2, 8), run(0, 1, 8)], bins=4)  # edges -2 0 2 4 6 8; far: more than 2 steps
    assert data is not None
    np.testing.assert_allclose(data.measured, [0, 1, 1, 0, 0, 1])
    np.testing.assert_allclose(data.far, [0, 0, 0, 1, 1, 1])
    half = learning_curves([run(0, 8), run(0, 2, 4, 6, 8)], bins=4)
    assert half is not None
    np.testing.assert_allclose(half.far, [0, 0, 0.5, 0.5, 0.5, 0.5])


def test_an_arm_without_rl_goes_by_optimizer_steps() -> None:
    rows = [{"step": i, "rl_step": 0, "phase/is_sft": 1.0} for i in range(1, 11)]
    data = learning_curves([cell(rows)])
    assert data is not None
    assert data.axis == "step"
    assert data.edges[-1] == 10
    assert data.sft[2:].tolist() == [1.0] * 10


def test_retention_pools_counts() -> None:
    one = {"x": {"solved": 10, "retained": 9}, "y": {"solved": 30, "retained": 15}}
    two = {"x": {"solved": 0, "retained": 0}, "y": {"solved": 10, "retained": 10}}
    assert retention([one, two]) == pytest.approx(34 / 50)
    assert retention([one, two], "x") == pytest.approx(0.9)
    assert retention([two], "x") is None

    def phase(number: int, retained: int) -> Record:
        return {"phase": "sft", "number": number, "sources": {"x": {"solved": 10, "retained": retained}}}

    rl = {"phase": "rl", "number": 1, "sources": {"x": {"solved": 10, "retained": 0}}}
    runs = [cell(phases=[rl, phase(1, 8), phase(2, 6), phase(3, 1)]), cell(phases=[phase(1, 10), phase(2, 10)])]
    runs.append(cell(phases=[phase(1, 9)]))
    assert retention_by_phase(runs, "x") == [pytest.approx(0.9), pytest.approx(0.8)]  # the third only one of three has
    nothing = {"phase": "sft", "number": 1, "sources": {"x": {"solved": 0, "retained": 0}}}
    few = [cell(phases=[nothing, phase(2, 5)]), cell(phases=[nothing, phase(2, 5)]), cell(phases=[phase(1, 0)])]
    assert retention_by_phase(few, "x") == [None, pytest.approx(0.5)]  # of the first, one run had something to lose
