"""Pages that are committed: their statistics are those of the committed runs, and old ones were read off rightly."""

import re
from pathlib import Path

import numpy as np
import pytest
from small_grid import ROOT

from experiments.recover_runs import correct_answers, read_marks
from experiments.report.comparisons import compare
from experiments.report.document import bracketed, difference, intervals
from experiments.report.figures import Strip, dots
from experiments.report.results import load
from experiments.report.statistics import Interval
from experiments.report.verdict import verdict
from mifo_lightning.errors import InputError

PAGES = sorted(path.parent for path in ROOT.glob("docs/results/*/runs.csv"))


def test_every_study_page_has_its_runs() -> None:
    assert len(PAGES) == len(list(ROOT.glob("docs/results/*/report.md"))) >= 11


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_what_its_runs_say(page: Path) -> None:
    ablation, text = load(page), (page / "report.md").read_text(encoding="utf-8").replace("\\", "")
    scores = ablation.scores(ablation.primary)
    found, means = compare(ablation, scores), intervals(ablation, scores)
    assert [line for line in [*verdict(ablation), ablation.note] if line.replace("<", "&lt;") not in text] == []
    for arm in ablation.names:
        c = found.get((arm, ablation.reference))
        row = re.search(rf"^\| {re.escape(arm)}(?: \(reference\))? \| (.*?) \| (.*?) \|", text, re.M)
        assert row
        assert (row[1], row[2]) == (bracketed(means[arm]), difference(c) if c else "")


def test_an_old_page_says_so_at_its_top() -> None:
    for page in ROOT.glob("docs/results/*/before_fix.*"):
        text = page.read_text(encoding="utf-8")
        assert "This page predates the mending of its statistics" in text[: text.index("3 bases") + 2000]
        assert "predate the mending" in (page.parent / "report.md").read_text(encoding="utf-8")[:1000]


def test_marks_are_read_to_the_last_question() -> None:
    rng = np.random.default_rng(0)
    scores = {f"arm {i} <&> with a long name": rng.integers(0, 4097, (3, 5)) / 4096 for i in range(4)}
    picture = dots("m", {arm: [Strip(x, Interval(float(x.mean())))] for arm, x in scores.items()}, "m", line=0.5)
    marks = read_marks(picture, list(scores), 3, 5)
    np.testing.assert_array_equal(correct_answers(marks, 4096, "m") / 4096, list(scores.values()))
    with pytest.raises(InputError, match="off a whole number"):
        correct_answers(marks, 1000, "m")
    for arms, seeds in ((list(reversed(scores)), 5), (list(scores), 4)):
        with pytest.raises(InputError, match="60 marks"):
            read_marks(picture, arms, 3, seeds)
