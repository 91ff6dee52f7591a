"""The report of an ablation: what it says first, that nothing from data becomes markup, what is left out or missing."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ablation_data import EVIL, PAPER, bare, edit, make, write

from experiments.report import write_report
from experiments.report.__main__ import main
from mifo_lightning.errors import InputError


class Page(HTMLParser):
    """Checks that tags nest, and collects text, tags and attributes."""

    VOID = {"meta", "link", "br", "img", "input"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def verdict(root: Path) -> str:
    """The sentences before the first question."""
    write_report(root)
    return (root / "report.md").read_text().split("## ")[0].replace("\\", "")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make(tmp_path_factory.mktemp("small"), {"ref": 0.5, f"$\\x$ {EVIL}": 0.6, "sft": 0.5}, bases=2, seeds=3)
    fail = {"status": "failed", "error": f"model.lr: {EVIL} is not allowed"}
    edit(root / "cells.json", lambda cells: (cells[3].update(fail), cells.pop()))
    (root / "arm1/seed0/seed0/samples.jsonl").open("a").write('{"half": ')
    write_report(root)
    return root


def test_page_is_self_contained_and_nothing_from_data_is_markup(small: Path) -> None:
    page = Page(small / "report.html")
    assert "script" not in page.tags
    assert EVIL in page.text  # shown as text: arm name, error and response
    assert f"{EVIL} & addition" in page.text
    assert f"model.lr: {EVIL} is not allowed" in page.text
    assert not [value for name, value in page.attributes if name in ("src", "href") and value]
    links = [value for name, value in page.attributes if name == "xlink:href"]
    assert links
    assert all(value and value.startswith("#") for value in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(http" not in (small / "report.html").read_text()
    assert EVIL not in (small / "report.md").read_text()


def test_pictures_take_the_colour_of_the_page_and_share_no_identifier(small: Path) -> None:
    page = Page(small / "report.html")
    text = (small / "report.html").read_text()
    assert "currentColor" in text
    assert "#010203" not in text
    assert "prefers-color-scheme: dark" in text
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', text))
    assert used <= set(identifiers)
    assert "image" not in page.tags


def test_the_same_results_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    again = write_report(small, tmp_path / "results" / "again")
    assert again.read_bytes() == (small / "report.html").read_bytes()
    assert (again.parent / "report.md").read_bytes() == (small / "report.md").read_bytes()


def test_failed_and_missing_runs_are_listed(small: Path) -> None:
    text = (small / "report.md").read_text()
    assert "2 of 18 runs are not done" in text
    assert re.search(r"\| ref \| seed1 \| 0 \| failed \|", text)
    assert re.search(r"\| sft \| seed1 \| 2 \| missing \|", text)
    assert "5 of 6" in text


def test_first_sentence_names_the_winner_and_its_lead(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "good": 0.6, "same": 0.5, "bad": 0.3})))
    assert re.search(
        r"good has the highest avg@1, 0\.\d+ \[.*\], and is significantly ahead of ref, by \+0\.\d+ \[", text
    )
    assert re.search(r"Significantly behind ref: bad by -0\.\d+ \[", text)
    assert "No other difference is significant." in text
    assert "same by" not in text
    assert "There are 3 bases" in text


def test_no_difference_is_said_to_be_none(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "a": 0.5, "b": 0.5}, noise=0.03)))
    assert "No arm differs significantly from ref." in text
    assert "significantly ahead" not in text.replace("not significantly ahead", "")


def test_too_few_runs_and_one_base_are_said(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "a": 0.9}, bases=1, seeds=3)))
    assert "is not significantly ahead of ref" in text
    assert "no difference can be significant" in text
    assert "nothing is known about other bases" in text


@pytest.mark.parametrize(("arm", "words"), [("ref", "the reference ref has no run"), ("a", "no arm but the reference")])
def test_without_two_results_nothing_is_compared(arm: str, words: str, tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.9}, bases=1, seeds=2))
    edit(root / "cells.json", lambda cells: [cell.update(status="failed") for cell in cells if cell["arm"] == arm])
    text = verdict(root)
    assert f"Nothing can be compared: {words}" in text
    assert "significantly" not in text.split("Every arm")[0]


def test_what_no_monitor_recorded_is_left_out_in_one_line(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=1, seeds=2))
    text = verdict(root) + (root / "report.md").read_text().replace("\\", "")
    assert "nan" not in text
    for monitor in ("history", "forgetting", "phase_kl", "layer_updates", "overlap", "costs", "samples"):
        assert f"Not recorded: the monitor {monitor} would show it." in text


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    text = verdict(bare(make(tmp_path, {"ref": 0.5, "a": 0.9}, bases=1, seeds=1)))
    assert re.search(
        r"a has the highest avg@1, 0\.\d{3} \[-\], and is not significantly ahead of ref: \+0\.\d{3} \[-\]", text
    )


def test_scores_are_sorted_and_the_reference_is_marked(small: Path) -> None:
    table = (small / "report.md").read_text().split("highest first:")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:-1]]
    means = [float(row[1].split()[0]) for row in rows]
    assert means == sorted(means, reverse=True)
    assert "ref (reference)" in [row[0] for row in rows]


def test_command_reports_into_out_and_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = bare(make(tmp_path / "runs", {"ref": 0.5, "a": 0.6}, bases=1, seeds=2))
    monkeypatch.setattr(sys, "argv", ["report", str(root), "--out", str(tmp_path / "docs")])
    main()
    assert (tmp_path / "docs" / "report.html").is_file()
    assert "python -m experiments.ablation --config x.yaml" in (tmp_path / "docs" / "report.md").read_text()
    edit(root / "ablation.json", lambda record: record.update(reference="rlx"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "'rlx'" in line
    assert "'ref', 'a'" in line


@pytest.mark.parametrize("name", ["ablation.json", "cells.json", "arm0/seed0/seed0/summary.json"])
def test_a_file_that_is_not_there_or_not_json_is_named(name: str, tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=1, seeds=1))
    (root / name).write_text("{")
    with pytest.raises(InputError, match=rf"{re.escape(name)} is not JSON"):
        write_report(root)
    (root / name).unlink()
    with pytest.raises(InputError, match=rf"{re.escape(name)} cannot be read"):
        write_report(root)
    write(root / name, [{"arm": "ref"}])
    with pytest.raises(InputError, match=r"summary\.json" if "arm0" in name else r"ablation\.json or cells\.json"):
        write_report(root)


@pytest.mark.slow
def test_page_of_a_large_ablation_is_small(tmp_path: Path) -> None:
    page = write_report(make(tmp_path, PAPER))
    assert page.stat().st_size < 2_000_000
    text = page.with_name("report.md").read_text()
    assert "Not recorded" not in text
    assert "**mifo has the highest avg@1" in text
