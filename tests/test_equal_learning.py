"""Arms compared where they learn alike: a step size of its own must make no arm look better than another."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_grid import write

from mifo_lightning.common.errors import InputError
from mifo_lightning.lab import plan
from mifo_lightning.lab.cell import record_outcome, write_json
from mifo_lightning.lab.grid import cells
from mifo_lightning.lab.reading import read_ablation
from mifo_lightning.lab.report.front import crossing, missed
from mifo_lightning.lab.report.page import write_report

SWEEP = {"key": "model.optimizer.sft.lr", "values": [1e-4, 2e-4, 4e-4], "level": 0.8}
TWO_BASES = {"one": "mifo_lightning/assets/base", "two": "mifo_lightning/assets/base"}
ARMS = {"mifo": {"configs": ["methods/mifo"]}, "interleave": {"configs": ["methods/interleave"]}}


def swept(root: Path, **changes: Any) -> Path:
    """An ablation file whose two arms run at three rates on two bases."""
    given = {"learned": ["addition/avg@1"], "kept": ["sorting/avg@1"]}
    fixed = {"arms": ARMS, "bases": TWO_BASES, "seeds": [0], "trade_off": given, "reference": "interleave"}
    return write(root, **{**fixed, "primary_contrast": ["mifo", "interleave"], "sweep": SWEEP, **changes})


def page(root: Path, frontier: dict[str, Any], bases: int = 8, **changes: Any) -> str:
    """The page of an ablation whose arms follow `kept = frontier(learned, base)`, each with rates of its own."""
    values = SWEEP["values"]
    names = {arm: [f"{arm} at {value:g}" for value in values] for arm in frontier}
    root.mkdir(parents=True, exist_ok=True)
    record = {
        "name": "x", "question": "q", "primary": "avg@1", "metrics": [], "reference": "plain", "design": "nested",
        "trade_off": {"learned": ["learned"], "kept": ["kept"]}, "primary_contrast": ["other", "plain"],
        "margin": 0.02, "sweep": SWEEP, "swept": names, "command": "c", "commit": "d",
        "arms": [{"name": n, "configs": [], "set": {}} for each in names.values() for n in each],
        "bases": [f"b{i}" for i in range(bases)], "seeds": {f"b{i}": [i] for i in range(bases)},
        **changes,
    }  # fmt: skip
    (root / "ablation.json").write_text(json.dumps(record), encoding="utf-8")
    with (root / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "base", "seed", "status", "error", "avg@1", "learned", "kept"])
        for arm, (learned, curve) in frontier.items():
            for name, x in zip(names[arm], learned, strict=True):
                for i in range(bases):
                    at = x + 0.005 * i
                    kept = curve(at) + 0.01 * np.sin(i)
                    writer.writerow([name, f"b{i}", i, "done", "", (at + kept) / 2, at, kept])
    write_report(root)
    return (root / "report.md").read_text(encoding="utf-8")


def line(learned: float) -> float:
    return 1.5 - learned


def test_a_value_is_read_off_between_neighbours_and_never_beyond() -> None:
    learned, kept = np.array([0.2, 0.6, 1.0]), np.array([0.9, 0.5, 0.4])
    assert crossing(learned, kept, 0.6) == pytest.approx(0.5)
    assert crossing(learned, kept, 0.3) == pytest.approx(0.8)
    assert crossing(learned, kept, 0.9) == pytest.approx(0.425)
    assert np.isnan(crossing(learned, kept, 0.1))
    assert np.isnan(crossing(learned, kept, 1.01))
    rising_twice = np.array([0.5, 0.9, 0.5, 0.9])
    assert crossing(rising_twice, np.array([0.0, 1.0, 5.0, 6.0]), 0.7) == pytest.approx(0.5)  # the first
    assert np.isnan(crossing(np.array([0.9, 0.5, 0.9]), np.array([0.0, 1.0, 5.0]), 0.7))  # a fall is no learning
    assert np.isnan(crossing(np.array([0.2, np.nan, 0.6]), np.array([0.9, 0.5, 0.4]), 0.5))  # a run is missing
    assert missed(np.array([[0.1, 0.9, 0.1, 0.9], [0.2, 0.8, 0.9, 0.1]]), 0.5) == (1, 2)


def test_arms_on_one_front_do_not_differ_whatever_their_rates(tmp_path: Path) -> None:
    """One takes small steps and the other large ones; at any one rate they differ by 0.1 on either side."""
    text = page(tmp_path, {"plain": ([0.6, 0.75, 0.9], line), "other": ([0.7, 0.78, 1.0], line)})
    assert "'other' minus 'plain' in kept at learned = 0.8 is +0.000 \\[+0.000, +0.000]" in text
    assert "No difference: its interval lies inside the margin" in text


def test_an_arm_that_keeps_more_at_equal_learning_is_ahead_by_just_that(tmp_path: Path) -> None:
    text = page(tmp_path, {"plain": ([0.6, 0.75, 0.9], line), "other": ([0.5, 0.7, 0.85], lambda x: line(x) + 0.05)})
    assert "'other' minus 'plain' in kept at learned = 0.8 is +0.050" in text
    assert "'other' is significantly ahead" in text
    assert "![kept against learned](report.svg)" in text
    assert "All comparisons on kept at learned = 0.8 but a primary contrast" in text


def test_a_base_that_does_not_reach_the_level_is_left_out_and_counted(tmp_path: Path) -> None:
    """The best rate learns 0.78 on base 0 and 0.005 more on each further one: four of eight stay below."""
    text = page(tmp_path, {"plain": ([0.6, 0.75, 0.9], line), "other": ([0.5, 0.7, 0.78], lambda x: line(x) + 0.05)})
    (row,) = [row for row in text.split("\n") if row.startswith("| other |") and "of 8" in row]
    assert [cell.strip() for cell in row.split("|")][3:6] == ["4 of 8", "4", "0"]
    assert "4 of 4" in row  # ahead on the bases where both reach it


def test_an_arm_gains_nothing_by_missing_a_bad_base(tmp_path: Path) -> None:
    """On bases 0 to 3 all keep 0.2 less; `other` does not reach the level there, and keeps 0.04 less elsewhere."""

    def kept(of: float) -> Callable[[float], float]:
        return lambda x: of - 0.2 * (round(1000 * x) % 50 < 20)

    text = page(
        tmp_path,
        {
            "plain": ([0.6, 0.75, 0.9], kept(0.7)),
            "other": ([0.5, 0.7, 0.78], lambda x: 0.66),
            "third": ([0.6, 0.75, 0.9], kept(0.75)),
        },
    )
    table = text.split("by the difference to plain")[1]
    assert table.index("| third |") < table.index("| plain |") < table.index("| other |")
    assert "Beside 'plain', 'third' has most kept at learned = 0.8" in text
    assert "on the 4 of 8 bases that have both. Undecided" in text
    assert "With so few no difference can be significant." in text


@pytest.mark.parametrize(("half", "said"), [(0.0, "Both hold."), (0.04, "That is not shown.")])
def test_several_contrasts_must_all_hold_by_more_than_the_margin(tmp_path: Path, half: float, said: str) -> None:
    offsets = {"plain": 0.0, "half": half, "other": 0.05}
    arms = {arm: ([0.6, 0.75, 0.9], lambda x, more=more: line(x) + more) for arm, more in offsets.items()}
    text = page(tmp_path, arms, primary_contrast=[["other", "plain"], ["other", "half"]])
    assert (
        "**Named before the run: 'other' minus 'plain' and 'other' minus 'half' in kept at learned = 0.8, each above "
        f"the margin of 0.02 with a one-sided p below 0.025. {said}**" in text
    )
    assert "'other' is significantly ahead, by more than the margin." in text
    section = text.split("## Does each part matter?")[1].split("## ")[0]
    assert "| other minus half (primary) |" in section
    assert "| half minus other |" not in section
    assert ("'other' is significantly ahead, by less than the margin." in text) == (half > 0)


def test_each_arms_own_rate_is_chosen_on_other_bases_than_it_is_tested_on(tmp_path: Path) -> None:
    text = page(
        tmp_path, {"plain": ([0.6, 0.75, 0.9], lambda x: 1.0), "other": ([0.6, 0.75, 0.9], lambda x: 2 - 2 * x)}
    )
    assert "on the bases b0, b2, b4, b6; the numbers are of b1, b3, b5, b7" in text
    chosen = text.split("on the other half of the bases")[1]
    assert "| plain | 0.0004 |" in chosen
    assert "| other | 0.0001 |" in chosen


def test_every_arm_runs_at_every_value(tmp_path: Path) -> None:
    grid = cells(read_ablation(swept(tmp_path)))
    assert len(grid) == 2 * 3 * 2
    settings = {cell.name: cell.settings for cell in grid}
    wanted = ("--model.optimizer.sft.lr", "0.0002")
    at = settings["mifo at 0.0002/one/seed0"]
    assert at[at.index(wanted[0]) + 1] == wanted[1]
    assert len({cell.directory for cell in grid}) == len(grid)


def test_a_sweep_named_after_a_run_is_refused(tmp_path: Path) -> None:
    ablation = read_ablation(swept(tmp_path))
    grid = cells(ablation)
    plan.write_plan(ablation, "command", fits=True)
    plan.check_named_before(ablation, grid)
    write_json(grid[0].directory / "summary.json", {"after": {}})
    record_outcome(grid[0].directory, None, 1.0)
    plan.check_named_before(ablation, grid)
    other = read_ablation(swept(tmp_path, sweep={**SWEEP, "level": 0.7}))
    with pytest.raises(InputError, match=r"sweep: .*0\.7.*: was .*0\.8.* when runs of"):
        plan.check_named_before(other, grid)
    turned = read_ablation(swept(tmp_path, trade_off={"learned": ["addition/avg@1"], "kept": ["reversal/avg@1"]}))
    with pytest.raises(InputError, match=r"trade_off: .*reversal.*: was .*sorting.* when runs of"):
        plan.check_named_before(turned, grid)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sweep": {**SWEEP, "values": [2e-4, 1e-4]}},
            "sweep.values: [0.0002, 0.0001]: allowed are two numbers or more",
        ),
        ({"sweep": {**SWEEP, "values": [1e-4]}}, "sweep.values: [0.0001]: allowed are two numbers or more"),
        ({"sweep": {**SWEEP, "level": float("nan")}}, "sweep.level: nan: allowed are finite numbers"),
        ({"sweep": {**SWEEP, "key": "seed_everything"}}, "sweep.key: seed_everything: the grid gives it, from seeds"),
        ({"set": {"model.optimizer.sft.lr": 1.0}}, "set.model.optimizer.sft.lr: is what the sweep changes"),
        (
            {"primary_contrast": [["mifo", "interleave"], ["mifo", "rl"]], "margin": 0.1},
            "allowed are two different arms",
        ),
        ({"primary_contrast": [["mifo", "interleave"]] * 2, "margin": 0.1}, "allowed are pairs of arms, each once"),
        ({"primary_contrast": [["mifo", "interleave"], ["interleave", "mifo"]], "margin": 0.1}, "each once"),
        ({"primary_contrast": []}, "primary_contrast: []: allowed are pairs of arms, each once"),
        ({"primary_contrast": ["mifo", ["interleave"]]}, "primary_contrast"),
        (
            {"arms": {**ARMS, "rl": {}}, "primary_contrast": [["mifo", "interleave"], ["mifo", "rl"]]},
            "margin: null: several primary contrasts must all hold",
        ),
        ({"trade_off": {}}, "sweep: needs a trade_off and two bases or more"),
        ({"sweep": {"key": "a", "values": [1.0, 2.0]}}, "level"),
        ({"design": "crossed", "seeds": [0, 1, 2]}, "design: crossed: a sweep compares within bases"),
    ],
)
def test_a_sweep_that_says_nothing_is_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        read_ablation(swept(tmp_path, **changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
