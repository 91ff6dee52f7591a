"""What a report says of final scores: who is ahead, by how much, and whether that is shown."""

import re
from pathlib import Path

import pytest
from ablation_data import bare, edit, make, rows_of, verdict

from mifo_lightning.lab.report import write_report


def test_first_sentence_names_the_winner_and_its_lead(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "good": 0.6, "same": 0.492, "bad": 0.3}, bases=12, seeds=1)))
    assert re.search(
        r"'good' has the highest avg@1, 0\.\d+ \[.*\], and is significantly ahead of 'ref', by 0\.\d+ \[0", text
    )
    assert re.search(r"'good' is ahead of 'ref' by 0\.\d+ .*'bad' is worse than 'ref' by (0\.\d+) \[0\.\d+, 0", text)
    assert "Significant among the 3 exploratory comparisons:" in text
    assert "No other one is." in text
    assert "'same' is" not in text
    assert "No primary contrast was named before these runs" in text
    assert re.search(r"An exploratory one of 0\.\d+ to 0\.\d+, .* would be found in 80% of such grids", text)


def test_runs_on_few_bases_make_nothing_significant_however_many(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "good": 0.9, "bad": 0.1}, bases=3, seeds=5)))
    assert "is not significantly ahead of 'ref': +0.3" in text
    assert "No exploratory difference is significant." in text
    assert "With 3 bases no difference can be significant" in text
    assert "(p is at least 0.25): one comparison needs 6 bases, these 2 need 7." in text


@pytest.mark.parametrize(
    ("score", "margins"),
    [
        (0.6, {0.2: "'a' is significantly ahead, by less than the margin.", None: "'a' is significantly ahead."}),
        (0.4, {0.02: "'a' is significantly worse."}),
        (
            0.5,
            {
                0.2: "No difference: its interval lies inside the margin of 0.2 named beforehand.",
                1e-4: "Undecided: neither a difference nor that there is none is shown.",
                None: "Undecided:",
            },
        ),
    ],
)
def test_the_primary_contrast_comes_first_and_is_none_only_within_its_margin(
    tmp_path: Path, score: float, margins: dict[float | None, str]
) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "b": 0.5, "a": score, "far": 0.9}, bases=8, seeds=1, design="nested"))
    for margin, words in margins.items():
        edit(root / "ablation.json", lambda plan, m=margin: plan.update(primary_contrast=["a", "b"], margin=m))
        text = verdict(root)
        sentence = text.split("\n\n")[1]
        assert re.match(
            r"\*\*Primary contrast, named before the run: 'a' minus 'b' in avg@1 is [+-]0\.\d+ \[.*\], p = ", sentence
        )
        assert words in sentence
        assert "for the 3 exploratory comparisons after Holm's correction" in text
        assert re.search(r"A primary difference of \d.* would be found in 80% of such grids", text)
        rows = rows_of(root, "Mean difference on the same base")
        assert rows[1][0] == "a minus b (primary)"


def test_nothing_is_said_of_a_primary_contrast_that_misses_a_run(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=8, seeds=1, design="nested"))
    edit(root / "ablation.json", lambda plan: plan.update(primary_contrast=["a", "ref"], margin=0.1))
    edit(root / "cells.json", lambda cells: cells.pop())
    assert "'a' minus 'ref' in avg@1 has no result: a run of these arms has none." in verdict(root)


def test_a_done_run_without_a_finite_score_is_a_failed_one(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6, "b": 0.6}, bases=3, seeds=1))
    edit(root / "arm1/seed1/seed0/summary.json", lambda record: record["after"].update({"avg@1": float("nan")}))
    edit(root / "arm2/seed1/seed0/summary.json", lambda record: record["after"].pop("avg@1"))
    text = verdict(root)
    assert "2 of 9 runs have no result" in text
    assert [row[1] for row in rows_of(root, "highest first")[2:4]] == ["-", "-"]
    assert [row[3:] for row in rows_of(root, "Runs without a result")[1:]] == [
        ["failed", "its final avg@1 is nan"],
        ["failed", "its final avg@1 is None"],
    ]


@pytest.mark.parametrize(
    ("arm", "words"),
    [("ref", "Nothing else is compared: the reference 'ref' has 0 of 2 runs"), ("a", "No exploratory difference is")],
)
def test_without_two_results_nothing_is_compared(arm: str, words: str, tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.9}, bases=1, seeds=2))
    edit(root / "cells.json", lambda cells: [cell.update(status="failed") for cell in cells if cell["arm"] == arm])
    text = verdict(root)
    assert words in text
    assert "significantly" not in text


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "a": 0.9}, bases=1, seeds=1)))
    assert re.search(
        r"'a' has the highest avg@1, 0\.\d{3} \[-\], and is not significantly ahead of 'ref': \+0\.\d{3} \[-\]", text
    )


def grade(root: Path, arm: int, **scores: float) -> None:
    """Give all runs of an arm these scores of single skills."""
    for path in root.glob(f"arm{arm}/*/*/summary.json"):
        edit(path, lambda record: record["after"].update({f"{name}/avg@1": x for name, x in scores.items()}))


def test_the_trade_off_says_who_is_exceeded_on_both(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "learner": 0.5, "keeper": 0.5, "neither": 0.5}, bases=2, seeds=2))
    for arm, (learned, kept) in enumerate([(0.5, 0.5), (0.9, 0.1), (0.3, 0.8), (0.4, 0.4)]):
        grade(root, arm, addition=learned + 0.1, mirrored=learned - 0.1, sorting=kept, reversal=kept)
    write_report(root)
    text = (root / "report.md").read_text()
    assert "No arm is highest on both: 'learner' is on learned, 'keeper' on kept." in text
    assert "(learned, kept): 'ref' (0.500, 0.500), 'learner' (0.900, 0.100), 'keeper' (0.300, 0.800).\n" in text
    header, *rows = rows_of(root, "highest first")
    place = header.index("learned")
    assert header[place + 1] == "kept"
    shown = {row[0]: [float(cell.split()[0]) for cell in row[place : place + 2]] for row in rows[:-1]}
    assert shown["learner"] == [0.9, 0.1]
    edit(root / "ablation.json", lambda record: record.pop("trade_off"))  # as an older runner wrote it
    write_report(root)
    assert "highest on both" not in (root / "report.md").read_text()
    assert "kept" not in rows_of(root, "highest first")[0]


def test_contrasts_are_corrected_with_all_other_comparisons(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "good": 0.7, "same": 0.5}, bases=12, seeds=1))
    pairs = [["good", "same"], ["same", "good"], ["ref", "same"]]
    edit(root / "ablation.json", lambda record: record.update(contrasts=pairs))
    write_report(root)
    assert "Significant among the 3 exploratory comparisons:" in (root / "report.md").read_text()  # a pair counts once
    _, *rows = rows_of(root, "Mean difference on the same base")
    assert [row[0] for row in rows] == ["good minus same"]
    assert rows[0][1].startswith("+0.")
    assert rows[0][2] == "12 of 12"
    edit(root / "ablation.json", lambda record: record.update(contrasts=[["ref", "same"]]))
    write_report(root)
    assert "Does each part matter?" not in (root / "report.md").read_text()


def test_differences_are_shown_by_base_and_arms_below_the_base_models_named(tmp_path: Path) -> None:
    root = make(tmp_path, {"ref": 0.7, "a": 0.8, "low": 0.5}, bases=2, seeds=2)
    for base, score in (("seed0", 0.9), ("seed1", 0.7)):
        for path in root.glob(f"arm1/{base}/*/summary.json"):
            edit(path, lambda record, score=score: record["after"].update({"avg@1": score}))
        for path in root.glob(f"arm0/{base}/*/summary.json"):
            edit(path, lambda record: record["after"].update({"avg@1": 0.75}))
    text = verdict(root)
    assert "By base, 'a' minus 'ref' is +0.150 on base seed0, -0.050 on base seed1." in text
    assert re.search(r"Below the models they began from \(0\.600\) end: 'low', 0\.\d+\.", text)
    header, first, *_ = rows_of(root, "avg@1 by base")
    assert header == ["arm", "base seed0", "base seed1", "difference on base seed0", "difference on base seed1"]
    assert first == ["a", "0.900", "0.700", "+0.150", "-0.050"]
