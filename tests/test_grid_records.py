"""Finished cells travel in one file: another machine goes on with the others, and mixes nothing up."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_grid import ROOT, write

from mifo_lightning.lab import ablation as runner
from mifo_lightning.lab import plan
from mifo_lightning.lab.cell import outcome, record_outcome, write_json
from mifo_lightning.lab.fingerprint import digest, fingerprint
from mifo_lightning.lab.grid import Cell, cells
from mifo_lightning.lab.reading import read_ablation
from mifo_lightning.lab.records import keep

ARMS = {"mifo": {"configs": ["methods/mifo"]}, "interleave": {"configs": ["methods/interleave"]}}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    digest.cache_clear()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that were run, each of them at once."""
    found: list[str] = []

    def run_here(work: Any, *rest: Any) -> None:
        for cell, _ in work:
            finish(cell)
            found.append(cell.name)

    monkeypatch.setattr(runner, "run_here", run_here)
    return found


def finish(cell: Cell) -> None:
    """What a fit leaves behind."""
    write_json(cell.directory / "fingerprint.json", fingerprint(cell))
    write_json(cell.directory / "summary.json", {"after": {"avg@1": len(cell.name) / 100}})
    record_outcome(cell.directory, None, 7.0)


def grid_of(root: Path, out: str, **changes: Any) -> Path:
    """An ablation of two arms on two bases that lie under `root`."""
    bases = {name: str(root / "bases" / name) for name in ("one", "two")}
    for directory in bases.values():
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "config.json").write_text("{}", encoding="utf-8")
    fixed = {"arms": ARMS, "reference": "interleave", "primary_contrast": ["mifo", "interleave"], "metrics": []}
    return write(root, **{**fixed, "bases": bases, "seeds": [0], "out": str(root / out), **changes})


def test_another_machine_runs_the_other_cells_alone_and_reports_all(tmp_path: Path, ran: list[str]) -> None:
    records = str(tmp_path / "kept" / "cells.jsonl")
    first = grid_of(tmp_path, "here", records=records)
    assert runner.main(["--config", str(first), "--only", "mifo/one", "interleave/one"]) == 0
    assert sorted(ran) == ["interleave/one/seed0", "mifo/one/seed0"]
    (tmp_path / "bases/one/config.json").unlink()  # what is finished needs no base
    (tmp_path / "bases/one").rmdir()
    digest.cache_clear()
    other = tmp_path / "other.yaml"
    other.write_text(first.read_text(encoding="utf-8").replace(str(tmp_path / "here"), str(tmp_path / "there")))
    assert [json.loads(line)["cell"] for line in Path(records).read_text().splitlines()] == [
        "mifo/one/seed0",
        "interleave/one/seed0",
    ]
    ran.clear()
    assert runner.main(["--config", str(other)]) == 0
    assert sorted(ran) == ["interleave/two/seed1", "mifo/two/seed1"]
    found = json.loads((tmp_path / "there/cells.json").read_text(encoding="utf-8"))
    assert [row["status"] for row in found] == ["done"] * 4
    runs = (tmp_path / "there/runs.csv").read_text(encoding="utf-8")
    assert "mifo,one,0,done,,0.14" in runs
    assert len(Path(records).read_text().splitlines()) == 4
    ran.clear()
    assert runner.main(["--config", str(other)]) == 0
    assert ran == []


def test_a_finished_fit_is_kept_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may go in the next one."""
    records, kept = tmp_path / "cells.jsonl", []

    def run_here(work: Any, jobs: int, imports: Any, view: Any) -> None:
        for cell, _ in work:
            finish(cell)
            view.end(cell, outcome(cell.directory), 0)
            kept.append(len(records.read_text(encoding="utf-8").splitlines()))

    monkeypatch.setattr(runner, "run_here", run_here)
    assert runner.main(["--config", str(grid_of(tmp_path, "here", records=str(records)))]) == 0
    assert kept == [1, 2, 3, 4]


def test_records_that_cannot_be_written_end_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records, ended = tmp_path / "cells.jsonl", []

    def run_here(work: Any, jobs: int, imports: Any, view: Any) -> None:
        records.write_text("<<<<<<< HEAD\n", encoding="utf-8")  # a merge, while the grid runs
        for cell, _ in work:
            finish(cell)
            view.end(cell, outcome(cell.directory), 0)
            ended.append(cell.name)

    monkeypatch.setattr(runner, "run_here", run_here)
    assert runner.main(["--config", str(grid_of(tmp_path, "here", records=str(records)))]) == 2
    found = capsys.readouterr()
    assert len(ended) == 4
    assert found.out.count("line 1: is no record of a finished cell") == 4
    assert found.err.count("line 1: is no record of a finished cell") == 1
    assert records.read_text(encoding="utf-8") == "<<<<<<< HEAD\n"


def test_cells_of_one_base_run_on_one_model(tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = grid_of(tmp_path, "here", records=str(tmp_path / "cells.jsonl"))
    assert runner.main(["--config", str(config), "--only", "mifo/one"]) == 0
    (tmp_path / "bases/one/config.json").write_text('{"other": 1}', encoding="utf-8")
    digest.cache_clear()
    capsys.readouterr()
    assert runner.main(["--config", str(config), "--only", "interleave/one"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: bases.one: ")
    assert "another one for interleave/one/seed0 than for mifo/one/seed0, which has been run" in error
    assert error.count("\n") == 1
    assert runner.main(["--config", str(config), "--only", "interleave/two"]) == 0
    assert ran == ["mifo/one/seed0", "interleave/two/seed1"]


def test_a_cell_of_other_settings_is_refused(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    records = str(tmp_path / "cells.jsonl")
    assert runner.main(["--config", str(grid_of(tmp_path, "here", records=records)), "--only", "mifo/one"]) == 0
    changed = grid_of(tmp_path, "there", records=records, set={"data.schedule.rl_steps": 9})
    assert runner.main(["--config", str(changed), "--only", "mifo/one"]) == 2
    assert "was run with other arguments" in capsys.readouterr().err
    assert ran == ["mifo/one/seed0"]


def test_a_line_that_is_no_record_is_named_and_lines_of_other_grids_stay(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "cells.jsonl"
    config = grid_of(tmp_path, "here", records=str(records))
    foreign = {"cell": "gone/one/seed0", "seconds": 1.0, "fingerprint": {}, "summary": {}}
    records.write_text(json.dumps(foreign) + "\n", encoding="utf-8")
    keep(records, read_ablation(config), cells(read_ablation(config)))
    assert runner.main(["--config", str(config), "--only", "mifo/one"]) == 0
    assert [json.loads(line)["cell"] for line in records.read_text().splitlines()] == [
        "gone/one/seed0",
        "mifo/one/seed0",
    ]
    records.write_text('{"cell": "mifo/one/seed0"}\n', encoding="utf-8")
    assert runner.main(["--config", str(config)]) == 2
    assert f"{records}, line 1: is no record of a finished cell" in capsys.readouterr().err


def test_what_was_named_before_holds_on_every_machine(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    records = str(tmp_path / "cells.jsonl")
    assert runner.main(["--config", str(grid_of(tmp_path, "here", records=records)), "--only", "mifo/one"]) == 0
    arms = {**ARMS, "third": {}}
    turned = {"primary_contrast": ["third", "interleave"], "arms": arms}
    fewer = {"bases": {"one": str(tmp_path / "bases/one")}}
    for place, (changes, key) in enumerate([({"margin": 0.1}, "margin: 0.1"), (turned, "primary_c"), (fewer, "bases")]):
        config = grid_of(tmp_path, f"elsewhere{place}", records=records, **changes)
        assert runner.main(["--config", str(config)]) == 2
        line = capsys.readouterr().err
        assert f"error: {key}" in line
        assert f"when runs of {records} were made" in line
    other_study = grid_of(tmp_path, "there", records=records, margin=0.1, name="another study")
    assert runner.main(["--config", str(other_study), "--only", "mifo/two"]) == 0
    assert ran == ["mifo/one/seed0", "mifo/two/seed1"]


def test_a_page_of_restored_runs_says_when_they_were_made(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = str(tmp_path / "cells.jsonl")
    for commit, arm in (("aaa", "mifo"), ("bbb", "interleave")):
        monkeypatch.setattr("mifo_lightning.lab.plan.commit", lambda commit=commit: commit)
        monkeypatch.setattr(runner, "commit", lambda commit=commit: commit)
        assert runner.main(["--config", str(grid_of(tmp_path, "here", records=records)), "--only", arm]) == 0
    monkeypatch.setattr("mifo_lightning.lab.plan.commit", lambda: "ccc")
    monkeypatch.setattr(runner, "commit", lambda: "ccc")
    ran.clear()
    assert runner.main(["--config", str(grid_of(tmp_path, "there", records=records))]) == 0
    assert ran == []
    plan = json.loads((tmp_path / "there/ablation.json").read_text(encoding="utf-8"))
    assert plan["commit"].split(", ") == ["aaa", "bbb"]
    assert "--config" in plan["command"]
    kept = [json.loads(line)["commit"] for line in Path(records).read_text(encoding="utf-8").splitlines()]
    assert sorted(kept) == ["aaa", "aaa", "bbb", "bbb"]


def test_two_finished_cells_of_one_base_began_with_one_model(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "cells.jsonl"
    config = grid_of(tmp_path, "here", records=str(records))
    assert runner.main(["--config", str(config), "--only", "mifo/one", "interleave/one"]) == 0
    rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    rows[1]["fingerprint"]["base model"] = "made elsewhere"
    records.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for file in (tmp_path / "bases/one").iterdir():
        file.unlink()
    (tmp_path / "bases/one").rmdir()  # nothing here says which of them is right
    digest.cache_clear()
    there = tmp_path / "there.yaml"
    there.write_text(config.read_text(encoding="utf-8").replace(str(tmp_path / "here"), str(tmp_path / "there")))
    capsys.readouterr()
    assert runner.main(["--config", str(there), "--only", "mifo/two"]) == 2
    line = capsys.readouterr().err
    assert "another one for interleave/one/seed0 than for mifo/one/seed0" in line
    assert line.count("\n") == 1


def test_cells_of_one_grid_read_the_same_rows(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, other = tmp_path / "rows.jsonl", tmp_path / "bases" / "other"
    rows.write_text("{}\n", encoding="utf-8")
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setenv("MIFO_DATA", str(tmp_path))
    reads = tmp_path / "reads.yaml"  # a path as configurations have it, beside what is none
    reads.write_text(
        f"data:\n  train: ${{oc.env:MIFO_DATA,data}}/rows.jsonl\n  val: owner/name\n"
        f"  prompts: {{system_prompt: {'Think. ' * 60}, chat_template: '${{oc.env:NOWHERE}}'}}\n"
        f"retention: {{others: {{one: {other}}}}}\n",
        encoding="utf-8",
    )
    changes = {"records": str(tmp_path / "cells.jsonl"), "config": ["tiny", str(reads)]}
    assert runner.main(["--config", str(grid_of(tmp_path, "here", **changes)), "--only", "mifo/one"]) == 0
    there = grid_of(tmp_path, "there", **changes)
    for place, content in ((rows, '{"other": 1}\n'), (other / "config.json", '{"other": 1}')):
        before = place.read_text(encoding="utf-8")
        place.write_text(content, encoding="utf-8")
        digest.cache_clear()
        for only in ("interleave/one", "mifo/one"):
            assert runner.main(["--config", str(there), "--only", only]) == 2
            line = capsys.readouterr().err
            assert ("rows.jsonl" if place == rows else str(other)) in line
        place.write_text(before, encoding="utf-8")
    rows.unlink()  # what is not there is not compared: another machine may report
    digest.cache_clear()
    assert runner.main(["--config", str(there), "--only", "mifo/one"]) == 0
    assert ran == ["mifo/one/seed0"]


def test_what_is_given_later_takes_the_place_of_what_was_given_before(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n", encoding="utf-8")
    reads = tmp_path / "reads.yaml"
    reads.write_text(f"data: {{train: [{rows}, {rows}]}}\n", encoding="utf-8")
    for settings, files in (({}, {str(rows)}), ({"data.train": "owner/name"}, set())):
        config = grid_of(tmp_path, "here", config=["tiny", str(reads)], set=settings)
        assert set(fingerprint(cells(read_ablation(config))[0])["files"]) == files


def test_finished_cells_of_other_settings_are_no_part_of_the_report(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(["--config", str(grid_of(tmp_path, "here"))]) == 0
    changed = grid_of(tmp_path, "here", set={"data.schedule.rl_steps": 9})
    shutil.rmtree(tmp_path / "here/mifo")
    ran.clear()
    assert runner.main(["--config", str(changed), "--only", "mifo"]) == 2
    assert "interleave/one/seed0: " in (line := capsys.readouterr().err)
    assert "was run with other arguments" in line
    assert ran == []


def test_records_that_are_kept_do_not_make_the_code_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    code, kept = tmp_path / "lab" / "plan.py", tmp_path / "experiments" / "records" / "a.jsonl"
    monkeypatch.setattr(plan, "__file__", str(code))
    for path in (code, kept):
        path.parent.mkdir(parents=True)
        path.write_text("", encoding="utf-8")
    assert plan.commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = plan.commit()
    assert clean
    assert len(clean) == 40
    kept.write_text("more", encoding="utf-8")
    assert plan.commit() == clean
    code.write_text("more", encoding="utf-8")
    assert plan.commit() == f"{clean}-dirty"
