"""Pages that are committed: their statistics and pictures are those of the committed runs."""

import re
from pathlib import Path

import pytest
from small_grid import ROOT

from experiments.circuits.__main__ import main as circuits
from mifo_lightning.lab.report import front
from mifo_lightning.lab.report.comparisons import compare
from mifo_lightning.lab.report.document import Table, bracketed, difference, intervals
from mifo_lightning.lab.report.results import load
from mifo_lightning.lab.report.verdict import verdict

PAGES = sorted(path.parent for path in ROOT.glob("docs/results/**/runs.csv"))


def test_every_study_page_has_what_it_is_made_of() -> None:
    pages = [page.parent for page in ROOT.glob("docs/results/**/report.md")]
    assert [page for page in pages if not any((page / name).is_file() for name in ("runs.csv", "records.json"))] == []
    assert all((page / "report.svg").is_file() for page in PAGES)


def test_the_page_of_circuits_is_what_its_records_say(tmp_path: Path) -> None:
    circuits(["--report", str(ROOT / "docs/results/circuits"), "--out", str(tmp_path)])
    for name in ("report.md", "records.json", "circuits.svg"):
        assert (tmp_path / name).read_text() == (ROOT / "docs/results/circuits" / name).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_what_its_runs_say(page: Path) -> None:
    ablation, text = load(page), (page / "report.md").read_text(encoding="utf-8").replace("\\", "")
    if ablation.sweep:  # at equal learning
        arms, found, skipped = list(ablation.swept), front.at_equal(ablation), 3
        means = {arm: front.reached(values) for arm, values in front.equal(ablation).items()}
        tables = [block for block in front.front(ablation).blocks if isinstance(block, Table)]
        rows = [f"| {' | '.join(row)} |" for table in tables for row in (table.header, *table.rows)]
        assert [row for row in rows if row not in text.splitlines()] == []
    else:
        arms, scores, skipped = ablation.names, ablation.scores(ablation.primary), 0
        found, means = compare(ablation, scores), intervals(ablation, scores)
    assert [line for line in [*verdict(ablation), ablation.note] if line.replace("<", "&lt;") not in text] == []
    for arm in arms:
        c = found.get((arm, ablation.reference))
        between = rf"(?: [^|]* \|){{{skipped}}}"
        row = re.search(rf"^\| {re.escape(arm)}(?: \(reference\))? \| (.*?) \|{between} (.*?) \|", text, re.M)
        assert row
        assert (row[1], row[2]) == (bracketed(means[arm]), difference(c) if c else "")


def test_an_old_page_says_so_at_its_top() -> None:
    for page in ROOT.glob("docs/results/tied/*/report.md"):
        assert page.read_text(encoding="utf-8").split("\n")[2].startswith("> Superseded: the head of these bases is")
