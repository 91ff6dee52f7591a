"""The ablation runner: what a cell goes on from, and that a grid survives being killed."""

import contextlib
import fcntl
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
import yaml
from small_grid import BASE, GRID, ROOT, write

from mifo_lightning.common.errors import InputError
from mifo_lightning.lab import ablation, plan
from mifo_lightning.lab.cell import Outcome, check_fingerprint, fit, outcome, prepare, record_death, record_outcome
from mifo_lightning.lab.fingerprint import digest, fingerprint
from mifo_lightning.lab.grid import cells, choose
from mifo_lightning.lab.reading import read_ablation


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    warm.ready()


def start(config: Path, *arguments: str) -> warm.Program:
    """The runner in a process of its own."""
    words = ["-m", "mifo_lightning.lab", "ablation", "--config", str(config), *arguments]
    return warm.Program(words, config.with_name("printed.txt"))


def until(condition: Any, seconds: float = 60) -> bool:
    """Wait for something; whether it came."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(met)


def test_a_fingerprint_tells_settings_configurations_and_base_apart(tmp_path: Path) -> None:
    base, method = tmp_path / "base", tmp_path / "method.yaml"
    base.mkdir()
    (base / "config.json").write_text("{}", encoding="utf-8")
    method.write_text("freeze: null  # none\n", encoding="utf-8")

    def present(**changes: Any) -> dict[str, Any]:
        arms = {"mifo": {"configs": [str(method)]}, "other": {}}
        fingerprint.__globals__["_digest_config"].cache_clear()
        digest.cache_clear()
        changed = {"bases": {"b": str(base)}, "arms": arms, "primary_contrast": ["other", "mifo"], **changes}
        return fingerprint(cells(read_ablation(write(tmp_path, **changed)))[0])

    first = present()
    assert present(jobs=1, wandb={}, out=str(tmp_path / "elsewhere")) == first
    method.write_text("freeze:   null\n", encoding="utf-8")
    assert present() == first
    assert present(seeds=[4]) != first
    method.write_text("freeze: {fraction: 0.3}\n", encoding="utf-8")
    assert {key for key, value in present().items() if value != first[key]} == {"configurations"}
    (base / "README.md").write_text("made elsewhere", encoding="utf-8")
    assert {key for key, value in present().items() if value != first[key]} == {"configurations"}
    (base / "model.safetensors").write_bytes(b"other weights")
    assert {key for key, value in present().items() if value != first[key]} == {"configurations", "base model"}


def test_an_unfinished_cell_goes_on_only_from_a_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    torch.save({"global_step": 2, "weights": torch.zeros(1000)}, checkpoint)
    (tmp_path / "log.txt").write_text("before\n", encoding="utf-8")
    (tmp_path / "samples.jsonl").write_text("", encoding="utf-8")
    assert prepare(tmp_path) == ["--ckpt_path", str(checkpoint)]
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    previous = checkpoint.with_name("previous.ckpt")
    previous.write_bytes(whole)
    with pytest.warns(UserWarning, match="going on from"):
        assert prepare(tmp_path) == ["--ckpt_path", str(previous)]
    previous.unlink()
    assert prepare(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    cell = cells(read_ablation(write(tmp_path)))[0]
    present = fingerprint(cell)
    cell.directory.mkdir(parents=True)
    check_fingerprint(cell, present)
    (cell.directory / "thesis.tex").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="holds other files"):
        fit(cell, present)
    assert (cell.directory / "thesis.tex").exists()


ARMS = {**GRID["arms"], "bad": {"set": {"data.schedule.prompts_per_step": 0}}}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a grid that nobody has disturbed; one of its arms cannot be fitted."""
    config = write(tmp_path_factory.mktemp("calm"), arms=ARMS, seeds=[0])
    with contextlib.chdir(ROOT):
        assert start(config, "--wandb", "offline").wait(300) == 1
    return config


def test_a_failing_fit_stops_no_other_and_a_changed_file_is_not_mixed_in(
    calm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = calm.parent / "out"
    printed = calm.with_name("printed.txt").read_text(encoding="utf-8")
    rows = {row["arm"]: row for row in json.loads((out / "cells.json").read_text(encoding="utf-8"))}
    assert {arm: row["status"] for arm, row in rows.items()} == {**dict.fromkeys(GRID["arms"], "done"), "bad": "failed"}
    assert rows["bad"]["error"].startswith("error: data.schedule.prompts_per_step: 0")
    assert f"failed: bad/shipped/seed0: {rows['bad']['error']}" in printed
    run = out / rows["mifo"]["directory"]
    assert {"summary.json", "samples.jsonl", "config.yaml", "log.txt", "model", "wandb"} <= {
        p.name for p in run.iterdir()
    }
    assert list(run.glob("wandb/wandb/offline-run-*-two_arms-mifo-shipped-seed0/*.wandb"))
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert "W&B run: " in log
    assert "WARNING" not in log  # of what nobody set
    changed = calm.with_name("changed.yaml")
    content = yaml.safe_load(calm.read_text(encoding="utf-8"))
    content["set"]["data.schedule.rl_steps"] = 4
    changed.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    assert ablation.main(["--config", str(changed)]) == 2
    said, refused = capfd.readouterr()
    assert (said, refused.count("\n")) == ("", 1)
    assert "mifo/shipped/seed0" in refused
    assert "other arguments; choose another `out`" in refused


@pytest.mark.parametrize(
    ("after", "error"),
    [
        ({"avg@1": 0.5, "x/avg@1": float("nan"), "sorting/avg@1": 0.1}, "its final x/avg@1 is nan"),
        ({"avg@1": float("inf"), "x/avg@1": 0.5, "sorting/avg@1": 0.1}, "its final avg@1 is inf"),
        ({"x/avg@1": 0.5, "sorting/avg@1": 0.1}, "its final evaluation has no avg@1; it has x/avg@1, sorting/avg@1"),
        ({"avg@1": 0.5}, "its final evaluation has no x/avg@1 and no sorting/avg@1; it has avg@1"),
        ({"avg@1": 0.0, "x/avg@1": 0.5, "sorting/avg@1": 0.1}, None),
    ],
)
def test_a_fit_that_ends_well_without_finite_scores_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: dict[str, float], error: str | None
) -> None:
    sides = {"learned": ["x/avg@1"], "kept": ["sorting/avg@1"]}  # a misspelled metric would end as no number at all
    cell = cells(read_ablation(write(tmp_path, trade_off=sides)))[0]

    def call(arguments: list[str]) -> int:
        (cell.directory / "summary.json").write_text(json.dumps({"after": after}), encoding="utf-8")
        return 0

    monkeypatch.setattr("mifo_lightning.lab.cell._call", call)
    fit(cell, fingerprint(cell))
    assert (outcome(cell.directory).status, outcome(cell.directory).error) == ("failed" if error else "done", error)


def test_what_ends_a_process_after_its_result_takes_the_result_from_nobody(tmp_path: Path) -> None:
    record_death(tmp_path, "its process ended with signal 9", 2.0)
    assert outcome(tmp_path).error == "its process ended with signal 9"
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    for error, status in ((None, "done"), ("error: it broke", "failed")):
        record_outcome(tmp_path, error, 1.0)
        record_death(tmp_path, "job 7: out of time while it removed checkpoints", 2.0)
        assert outcome(tmp_path) == Outcome(status, error, 1.0)


def test_a_contrast_named_after_a_run_is_not_taken_for_one_named_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = read_ablation(write(tmp_path, margin=0.02))
    plan.write_plan(first, "command", fits=True)
    turned = {"arms": {**GRID["arms"], "third": {}}, "primary_contrast": ["third", "mifo"], "margin": 0.02}
    plan.check_named_before(read_ablation(write(tmp_path, **turned)), cells(first))  # nothing had been seen yet
    record_outcome(cells(first)[0].directory, "it broke", 1.0)
    plan.check_named_before(read_ablation(write(tmp_path, **turned)), cells(first))  # nor by a fit that failed
    (cells(first)[0].directory / "summary.json").write_text('{"after": {}}', encoding="utf-8")
    record_outcome(cells(first)[0].directory, None, 1.0)
    plan.check_named_before(first, cells(first))
    more = {"margin": 0.02, "seeds": [0, 1, 2]}  # runs are not added until a test succeeds
    for changes, key in (
        (turned, "primary_contrast: "),
        ({"margin": 0.1}, "margin: 0.1: was 0.02"),
        (more, "seeds: {'shipped': [0, 1, 2]}: was {'shipped': [0, 1]}"),
    ):
        assert ablation.main(["--config", str(write(tmp_path, **changes))]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {key}")
        assert "put a pair of arms under `contrasts`" in line
        assert "choose another `out`" in line


@pytest.mark.slow
def test_a_grid_of_many_bases_with_a_seed_each_ends_in_a_page(tmp_path: Path) -> None:
    settings = {**GRID["set"], "data.schedule.rl_steps": 1, "data.val.init_args.count": 8}
    bases = {f"b{i}": BASE for i in range(2)}
    config = write(tmp_path, bases=bases, seeds=[0], design="nested", margin=0.5, set=settings)
    assert ablation.main(["--config", str(config)]) == 0
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "**Primary contrast, named before the run: 'interleave, half + lr' minus 'mifo' in avg@1 is" in page
    assert "every base has seeds of its own" in page
    rows = [line.split(",") for line in (tmp_path / "out" / "runs.csv").read_text(encoding="utf-8").splitlines()]
    assert [row[1:3] for row in rows if row[0] == "mifo"] == [[f"b{i}", str(i)] for i in range(2)]
    assert rows[0][:6] == ["arm", "base", "seed", "status", "error", "avg@1"]


def test_commit_and_command_are_those_of_the_calls_that_ran_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, contrasts=[["mifo", "interleave, half + lr"]], setting="Two arms.")
    small = read_ablation(path)

    def call(commit: str, command: str, fits: bool) -> tuple[str | None, str | None]:
        monkeypatch.setattr(plan, "commit", lambda: commit)
        plan.write_plan(small, command, fits)
        record = json.loads((tmp_path / "out" / "ablation.json").read_text(encoding="utf-8"))
        assert (record["contrasts"], record["setting"]) == (small.contrasts, "Two arms.")
        return record["commit"], record["command"]

    assert call("a", "first", fits=False) == (None, None)
    assert call("b", "second", fits=True) == ("b", "second")
    assert call("c", "third", fits=False) == ("b", "second")
    assert call("c", "fourth", fits=True) == ("b, c", "fourth")
    assert call("b", "fifth", fits=True) == ("b, c", "fifth")
    path = tmp_path / "out" / "ablation.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "note": "A fault."}), encoding="utf-8")
    call("b", "sixth", fits=True)
    assert json.loads(path.read_text(encoding="utf-8"))["note"] == "A fault."  # what a person added stays


@pytest.mark.slow
def test_a_grid_killed_at_any_time_ends_as_if_undisturbed(calm: Path, tmp_path: Path) -> None:
    killed, out, halfway = write(tmp_path, seeds=[0]), tmp_path / "out", set()
    # at the first checkpoint at once, so that on a fast machine too something has to go on from one
    for delay in (0, random.Random(0).uniform(0, 0.6)):
        runner = start(killed)
        seen = _stamps(out)
        until(lambda r=runner, s=seen: r.poll() is not None or _stamps(out) != s)
        time.sleep(delay)
        assert delay or not _free(out)
        runner.kill()
        runner.wait()
        assert until(lambda: _free(out), 20), "fits end with their runner"
        halfway |= {path.parents[1] for path in _stamps(out) if outcome(path.parents[1]).status != "done"}
    assert halfway
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/summary.json")}
    ended = {path for path in kept if outcome(path.parent).status == "done"}
    assert ablation.main(["--config", str(killed)]) == 0
    assert all(path.stat().st_mtime_ns == kept[path] for path in ended)
    assert all("Restor" in (cell / "log.txt").read_text(encoding="utf-8") for cell in halfway)
    for cell in cells(read_ablation(killed)):
        other = calm.parent / "out" / cell.directory.relative_to(out)
        before, after = (json.loads((p / "summary.json").read_text(encoding="utf-8")) for p in (cell.directory, other))
        for key in ("before", "after", "optimizer_steps", "sft_phases"):
            assert before[key] == after[key], f"{cell.name}: {key}"
        for file in ("model/model.safetensors", "samples.jsonl"):
            assert (cell.directory / file).read_bytes() == (other / file).read_bytes(), f"{cell.name}: {file}"


def test_the_cluster_runs_what_is_unfinished(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    config = write(tmp_path, slurm={"cluster": "debug", "timeout_min": 5})
    assert ablation.main(["--config", str(config), "--only", "mifo/shipped/0", "--slurm"]) == 0
    cell = choose(cells(read_ablation(config)), ["mifo/shipped/0"])[0]
    assert outcome(cell.directory).status == "done"
    stamp = (cell.directory / "summary.json").stat().st_mtime_ns
    before = (tmp_path / "out" / "ablation.json").read_text(encoding="utf-8")
    assert "--slurm" in json.loads(before)["command"]
    assert ablation.main(["--config", str(config), "--only", "mifo/shipped/0"]) == 0
    assert (tmp_path / "out" / "ablation.json").read_text(encoding="utf-8") == before  # no fit ran: not a new command
    assert (cell.directory / "summary.json").stat().st_mtime_ns == stamp


def test_an_unknown_cluster_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    config = write(tmp_path, slurm={"cluster": "moon"})
    assert ablation.main(["--config", str(config), "--slurm"]) == 2
    assert "moon" in capsys.readouterr().err


def _stamps(out: Path) -> dict[Path, int]:
    """When each checkpoint of a grid was written."""
    stamps = {}
    for path in out.glob("*/*/*/checkpoints/last.ckpt"):
        with contextlib.suppress(FileNotFoundError):  # moved or removed meanwhile
            stamps[path] = path.stat().st_mtime_ns
    return stamps


def _free(out: Path) -> bool:
    """Whether no process holds a cell."""
    for path in out.glob("*/*/*/lock"):
        with open(path, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True
