"""The report of an ablation: that nothing from data becomes markup, its files, its other questions, what is missing."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from ablation_data import EVIL, PAPER, bare, edit, make, rows_of, verdict, write

from mifo_lightning.common.errors import InputError
from mifo_lightning.lab.__main__ import main
from mifo_lightning.lab.report import write_report
from mifo_lightning.lab.report.figures import beside


class Page(HTMLParser):
    """Checks that tags nest, and collects text, tags and attributes."""

    VOID = {"meta", "link", "br", "img", "input", "wbr"}

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
    for name in ("report.md", "report.svg"):
        assert (again.parent / name).read_bytes() == (small / name).read_bytes()


def test_the_markdown_shows_every_run_in_a_picture_that_stands_alone(small: Path) -> None:
    assert "![avg@1 of every run](report.svg)" in (small / "report.md").read_text()
    picture = (small / "report.svg").read_text()
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "currentColor" not in picture
    assert EVIL not in picture
    marks = [use for use in root.iter("{http://www.w3.org/2000/svg}use") if "fill-opacity: 0.6" in use.get("style", "")]
    assert len(marks) == 16  # of 18 runs one has failed and one is missing


def test_failed_and_missing_runs_are_listed(small: Path) -> None:
    text = (small / "report.md").read_text()
    assert "2 of 18 runs have no result. An arm that misses one has no mean and no rank." in text
    assert re.search(r"\| ref \| seed1 \| 0 \| failed \|", text)
    assert re.search(r"\| sft \| seed1 \| 2 \| missing \|", text)
    _, first, *rows = rows_of(small, "highest first")
    assert first[1] != "-"
    # 5 of 6 runs say nothing of what the sixth would have been
    assert [(row[0], row[1], row[-1]) for row in rows[:2]] == [
        ("ref (reference)", "-", "5 of 6"),
        ("sft", "-", "5 of 6"),
    ]
    assert "'ref' has 5 of 6 runs, and so no mean" in text


def test_runs_that_end_on_an_sft_phase_are_counted(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=1, seeds=3))
    for seed, kind in enumerate(["sft", "rl", "sft"]):
        edit(root / f"arm1/seed0/seed{seed}/summary.json", lambda record, kind=kind: record.update(ends_on=kind))
    edit(root / "arm0/seed0/seed0/summary.json", lambda record: record.update(ends_on="rl"))
    assert "Ended on an SFT phase that no RL follows: 2 of 3 runs of arm 'a'." in verdict(root)


def test_statistics_are_remade_from_the_committed_runs_alone(tmp_path: Path) -> None:
    root = make(tmp_path / "runs", {"ref": 0.5, "a": 0.6, "b": 0.4}, bases=7, seeds=1, design="nested")
    edit(root / "ablation.json", lambda plan: plan.update(primary_contrast=["a", "ref"], seeds={
        base: [i] for i, base in enumerate(plan["bases"])}, note="Read this first."))  # fmt: skip
    edit(root / "cells.json", lambda cells: ([cell.update(seed=int(cell["base"][-1])) for cell in cells],
                                             cells[-1].update(status="failed", error="a, \"b\"\nand c")))  # fmt: skip
    first, again = tmp_path / "docs", tmp_path / "again"
    write_report(root, first)
    again.mkdir()
    for name in ("ablation.json", "runs.csv"):
        (again / name).write_bytes((first / name).read_bytes())
    write_report(again)
    assert (again / "runs.csv").read_bytes() == (first / "runs.csv").read_bytes()
    assert (
        (first / "runs.csv").read_text().splitlines()[0].startswith("arm,base,seed,status,error,avg@1,addition/avg@1")
    )
    whole, scores = ((path / "report.md").read_text() for path in (first, again))
    assert scores.split("## What was run")[0] == whole.split("## What was run")[0]
    assert "> Read this first." in scores
    for caption in ("highest first", "Further metrics", "Mean difference on", "Runs without a result", "avg@1 by base"):
        assert rows_of(again, caption) == rows_of(first, caption)
    assert "What did it cost?" in whole
    assert "What did it cost?" not in scores


def test_what_no_monitor_recorded_is_left_out_in_one_line(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=1, seeds=2))
    text = verdict(root) + (root / "report.md").read_text().replace("\\", "")
    assert "nan" not in text
    for monitor in ("history", "forgetting", "phase_kl", "layer_updates", "overlap", "costs", "samples"):
        assert f"? (monitor {monitor})" in text


def test_a_run_without_an_sft_phase_takes_no_part_in_what_was_held(tmp_path: Path) -> None:
    root = make(tmp_path, {"ref": 0.5, "mifo": 0.6}, bases=2, seeds=1)

    def other(summary: dict[str, Any]) -> None:
        for phase in summary["overlap"]["phases"]:
            phase["gradient"] = 0.75

    edit(root / "arm1/seed1/seed0/summary.json", other)
    write_report(root)
    assert rows_of(root, "Mean over SFT phases and runs")[-1][1:] == ["0.500", "0.650", "0.600"]
    edit(root / "arm1/seed1/seed0/summary.json", lambda summary: summary["overlap"].update(phases=[]))
    write_report(root)
    assert rows_of(root, "Mean over SFT phases and runs")[-1][1:] == ["0.500", "0.550", "0.600"]


def test_curves_of_an_arm_are_of_all_its_runs_or_not_drawn(tmp_path: Path) -> None:
    root = make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=2, seeds=1)
    write_report(root)
    assert "Learning curves of a" in (root / "report.html").read_text()
    assert "Not drawn" not in (root / "report.html").read_text()
    (root / "arm1/seed1/seed0/history.jsonl").unlink()  # restored from another machine: its summary alone
    write_report(root)
    page = (root / "report.html").read_text()
    assert "Learning curves of a" not in page
    assert "Learning curves of ref" in page
    assert "Not drawn, since some of their runs have no history here: &#39;a&#39;." in page


def test_a_page_of_the_bases_that_are_whole_says_so_and_is_remade_from_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = bare(make(tmp_path / "runs", {"ref": 0.5, "a": 0.6}, bases=3, seeds=1))
    edit(root / "cells.json", lambda cells: [cells.remove(cell) for cell in list(cells) if cell["base"] == "seed1"])
    assert main(["report", str(root), "--out", str(tmp_path / "docs")]) == 0
    assert [row[1] for row in rows_of(tmp_path / "docs", "highest first")[1:]] == ["-", "-"]
    some = ["--bases", "seed2", "seed0"]
    assert main(["report", str(root), "--out", str(tmp_path / "docs"), *some]) == 0
    text = (tmp_path / "docs" / "report.md").read_text()
    assert "> Of the 3 bases of this study 2 are in these numbers: seed0, seed2." in text
    assert "None: all 4 runs are done." in text
    rows = rows_of(tmp_path / "docs", "highest first")
    assert "-" not in [row[1] for row in rows]
    write_report(tmp_path / "docs")
    assert rows_of(tmp_path / "docs", "highest first") == rows
    assert main(["report", str(root), "--out", str(tmp_path / "docs"), "--bases", "seed7"]) == 2
    assert "--bases: seed7 is not allowed; it must be some of seed0, seed1, seed2" in capsys.readouterr().err
    assert main(["report", str(root), *some]) == 2
    assert "needs --out" in capsys.readouterr().err


def test_old_abilities_have_a_section_of_their_own(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=2, seeds=1))
    found = {"lost": 0.25, "kl": 0.125, "kl_to_other": 0.5, "sorting/floor": 0.75}
    found = {f"retention/{name}": value for name, value in found.items()}
    for path in root.glob("arm*/*/*/summary.json"):
        edit(path, lambda record: record["after"].update(found))
    edit(root / "ablation.json", lambda plan: plan["metrics"].extend(found))
    write_report(root)
    header, row, *_ = rows_of(root, "Old abilities")
    assert header == ["arm", "lost", "kl", "kl_to_other", "sorting/floor"]
    assert [cell.split()[0] for cell in row[1:]] == ["0.250", "0.125", "0.500", "0.750"]
    assert not any("retention" in name for name in rows_of(root, "Further metrics")[0])
    text = (root / "report.md").read_text().replace("\\", "")
    assert "kl_to_: that of the initial model to another one." in text
    assert "floor: what sampling alone turns" in text
    assert "kl_from_" not in text


def test_whether_rl_learns_after_sft_is_told_apart_from_how_it_began(tmp_path: Path) -> None:
    root = bare(make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=2, seeds=1))
    one = {"phase": "rl", "number": 1, "rl_step": 3, "rl_steps": 3}
    first = {**one, "after_sft_steps": 0, "groups_with_signal": 0.5, "grad_norm": 0.25}
    later = [{**one, "after_sft_steps": 2, "groups_with_signal": s, "grad_norm": 1.0} for s in (0.125, 0.375)]
    for path in root.glob("arm*/*/*/summary.json"):
        phases = [first, *later] if "arm1" in str(path) else [first]  # the reference is RL alone
        edit(path, lambda record, phases=phases: (
            record.update(retention={"phases": phases}), record["after"].update({"retention/lost": 0.25})
        ))  # fmt: skip
    write_report(root)
    assert "Does RL still learn after SFT?" not in (root / "report.md").read_text()  # no metric asks for it
    edit(root / "ablation.json", lambda plan: plan["metrics"].append("retention/lost"))
    write_report(root)
    header, *rows = rows_of(root, "Mean of a phase")
    found = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert found["a"] == {
        "SFT steps before": "2", "groups with signal after SFT": "0.25", "gradient norm after SFT": "1",
        "groups with signal at first": "0.5", "gradient norm at first": "0.25",
    }  # fmt: skip
    assert found["ref"]["groups with signal after SFT"] == "-"
    assert found["ref"]["groups with signal at first"] == "0.5"


def test_scores_are_sorted_and_the_reference_is_marked(small: Path) -> None:
    _, *rows, last = rows_of(small, "highest first")
    assert last[0] == "before training"
    means = [float(row[1].split()[0]) if row[1] != "-" else -1.0 for row in rows]
    assert means == sorted(means, reverse=True)
    assert "ref (reference)" in [row[0] for row in rows]


def test_command_reports_into_out_and_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = bare(make(tmp_path / "runs", {"ref": 0.5, "a": 0.6}, bases=1, seeds=2))
    command = ["report", str(root), "--out", str(tmp_path / "docs")]
    assert main(command) == 0
    assert (tmp_path / "docs" / "report.html").is_file()
    text = (tmp_path / "docs" / "report.md").read_text()
    assert "python -m mifo_lightning.lab ablation --config x.yaml" in text.replace("\\", "")
    edit(root / "ablation.json", lambda record: record.update(reference="rlx"))
    assert main(command) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "'rlx'" in line
    assert "'ref', 'a'" in line


def test_costs_leave_out_zeros_and_sum_what_is_small(tmp_path: Path) -> None:
    root = make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=1, seeds=2)
    for path in root.glob("arm*/*/*/summary.json"):
        edit(path, lambda record: (record["costs"]["rl"].update(scored_tokens=0),
                                   record["costs"]["sft"].update(scored_tokens=0),
                                   record["costs"]["callbacks"].update(Costs=0.01, History=0.02)))  # fmt: skip
    for path in root.glob("arm1/*/*/summary.json"):
        edit(path, lambda record: record["costs"]["rl"].update(flops=2.6e12))
    write_report(root)
    assert "scored" not in rows_of(root, "are distinct ones")[0]
    assert "generated" in " ".join(rows_of(root, "are distinct ones")[0])
    header, first, _ = rows_of(root, "by group of the configuration")
    assert header == ["arm", "forgetting", "freeze", "importance", "other"]
    assert first[-1] == "0.03"
    header, *rows = rows_of(root, "highest first")
    assert {row[0]: row[header.index("FLOPs")] for row in rows[:-1]} == {"a": "x1.50", "ref (reference)": "x1.00"}
    assert "A run took 1.000 ('ref') to 1.500 ('a') times the FLOPs" in (root / "report.md").read_text()


def test_changed_shares_are_pictures_only_where_layers_differ(tmp_path: Path) -> None:
    root = make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=1, seeds=2)
    page = write_report(root).read_text()
    assert ">changed share<" not in page
    assert "0.900 in SFT phases of 'ref', 'a'." in (root / "report.md").read_text()
    for path in root.glob("arm1/*/*/summary.json"):
        edit(path, lambda record: [p["layers"]["head"].update(changed=0.2) for p in record["layer_updates"]["phases"]])
    page = write_report(root).read_text()
    assert page.count(">changed share<") == 1
    assert "0.900 in SFT phases of 'ref'." in (root / "report.md").read_text()


def test_how_responses_were_drawn_comes_from_the_runs_configuration(tmp_path: Path) -> None:
    root = make(tmp_path, {"ref": 0.5, "a": 0.6}, bases=1, seeds=1)
    data = {"val": {"init_args": {"count": 400, "split": "test"}}}
    model = {"evaluation": {"sampling": {"temperature": 0.5}}}
    write(root / "arm0/seed0/seed0/config.yaml", {"model": model, "data": data})
    write_report(root)
    text = (root / "report.md").read_text()
    assert "responses sampled at T = 0.5, n to a question, of 400 test questions" in text
    assert "greedy responses to the first 64 questions of each source among the 400 test questions" in text


def test_markdown_stands_alone(small: Path) -> None:
    text = (small / "report.md").read_text()
    assert "report.html" not in text
    for word in ("Shaded", "dashed", "A point is"):
        assert word in (small / "report.html").read_text()
        assert word not in text
    assert "## What was run\n\nA small model.\n\nFour skills.\n" in text


def test_numbers_beside_points_that_crowd_do_not_overlap() -> None:
    points = np.random.default_rng(0).normal(0, 12, (14, 2))
    numbers = points + beside(points)
    apart = np.linalg.norm(numbers[:, None] - numbers[None], axis=2) + 99 * np.eye(14)
    assert apart.min() >= 11
    assert np.linalg.norm(numbers[:, None] - points[None], axis=2).min() >= 8


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
    assert "(monitor" not in text
    assert "**'mifo' has the highest avg@1" in text
