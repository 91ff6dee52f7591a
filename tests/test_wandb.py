"""W&B: one row for an optimizer step, a service that dies in mid-run, a start that fails."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from command_line import MIFO, SHORT, refused, short
from conftest import make_data, make_module, method_callbacks
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from monitoring import Records
from processes import within

from mifo_callbacks.logging import StepRows
from mifo_lightning.cli import main
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.forgetting import Forgetting
from mifo_lightning.monitors.history import History
from mifo_lightning.monitors.update_norm import UpdateNorm

MakeTrainer = Callable[..., Trainer]


def arguments(root: Path, **changes: str) -> list[str]:
    """Those of a run of 3 RL steps with SFT phases that logs to W&B offline."""
    pairs = {**SHORT, "trainer.default_root_dir": str(root), "trainer.enable_checkpointing": "true", **changes}
    del pairs["trainer.logger"]
    pairs = {**pairs, "trainer.logger.init_args.save_dir": str(root)}
    return ["fit", *MIFO, *(text for key, value in pairs.items() for text in (f"--{key}", value))]


def rows_of(root: Path) -> list[dict[str, Any]]:
    """The history that W&B has on disk, one dict of names and values a row."""
    (run,) = root.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    records = map(json.loads, subprocess.check_output(command, text=True).splitlines())
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_all_of_an_optimizer_step_is_one_row(make_trainer: MakeTrainer, micro_batches: int) -> None:
    """Also what callbacks measure at the edges of phases; nothing is lost: each alone would have logged the same."""

    def fit(*more: Any) -> tuple[Records, History, int]:
        records, history = Records(), History(["*"])
        callbacks = [*method_callbacks(size=8), UpdateNorm(), Forgetting(4), *more, history]
        trainer = make_trainer(callbacks, logger=records)
        data = make_data(
            val=Skills(["addition"], 16, split="val"), schedule=Schedule(rl_steps=4, prompts_per_step=4, sft_batch=4)
        )
        trainer.fit(make_module(micro_batches=micro_batches), datamodule=data)
        return records, history, trainer.global_step

    apart, lines, _ = fit()
    together, same_lines, steps = fit(StepRows())
    assert len(apart.metrics) > 3 * steps
    assert len(together.metrics) == steps + 1  # the last one: what is measured when training ends
    first_sft = next(row for row in together.metrics if row.get("phase/is_sft"))
    assert {"sft/loss", "sft/update_norm", "entropy/mean_all", "freeze/share", "importance/updates"} <= set(first_sft)
    rl = [row for row in together.metrics if row.get("phase/is_sft") == 0]
    assert all({"rollout/reward", "buffer/size", "rl/update_norm"} <= set(row) for row in rl)
    names = {name for row in apart.metrics for name in row if not name.startswith(("seconds", "rollout/tokens_per_s"))}
    assert all(apart.series(name) == together.series(name) for name in names)
    timeless = [{k: v for k, v in line.items() if k != "rollout/tokens_per_s"} for line in lines.lines]
    assert timeless == [{k: v for k, v in x.items() if k != "rollout/tokens_per_s"} for x in same_lines.lines]


def test_wandb_holds_one_row_a_step(tmp_path: Path) -> None:
    """And one for the validation before and after; responses stand in the row of their step."""
    main([*arguments(tmp_path), "--history", "{}"])
    rows = rows_of(tmp_path)
    trained = [row for row in rows if "phase/is_sft" in row]
    (history,) = tmp_path.rglob("history.jsonl")
    steps = {json.loads(line)["step"] for line in history.read_text().splitlines()}
    assert [row["trainer/global_step"] for row in trained] == list(range(max(steps)))
    assert len(rows) == len(trained) + 3  # the self-check and both validations
    rl = [row for row in trained if not row["phase/is_sft"]]
    assert all({"rollout/reward", "buffer/size", "rl/update_norm"} <= set(row) for row in rl)
    assert [i for i, row in enumerate(rows) if "samples._type" in row] == [1, 2, len(rows) - 1]
    assert "val/avg@1" in rows[1]
    assert "val/avg@1" in rows[-1]


def test_a_run_outlives_its_wandb_service(tmp_path: Path) -> None:
    """The service is killed once training has begun: one line, all files, status 0."""
    flags = arguments(tmp_path, **{"data.schedule.rl_steps": "8", "progress.init_args.lines": "50"})
    run = warm.Program(["-m", "mifo_lightning", *flags], tmp_path / "said.txt")
    try:
        assert within(120, lambda: "RL step 2" in run.said())
        os.kill(service_of(run.pid), signal.SIGKILL)
        assert run.wait(120) == 0, run.said()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    said = run.said()
    assert "Traceback" not in said
    assert said.count("W&B has failed") == said.count("warning: trainer.logger: ") == 1
    assert "\x1b" not in said
    assert "litlogger" not in said
    (directory,) = [Path(line.removeprefix("files: ")) for line in said.splitlines() if line.startswith("files: ")]
    written = {path.name for path in directory.iterdir()}
    assert {"model", "checkpoints", "summary.json", "samples.jsonl", "config.yaml"} <= written
    assert (directory / "checkpoints" / "last.ckpt").stat().st_size > 0


def test_wandb_that_cannot_begin_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    said = refused(capsys, *arguments(tmp_path / "run", **{"trainer.logger.init_args.mode": "online"}))
    assert said.startswith("error: trainer.logger: W&B cannot begin a run (UsageError: No API key configured.")
    assert "trainer.logger.init_args.mode offline" in said
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


class Full(CSVLogger):
    """A logger on a disk that fills up in mid-run."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if step == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_another_logger_that_cannot_write_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = short(
        tmp_path, trainer__logger=f'{{"class_path": "test_wandb.Full", "init_args": {{"save_dir": "{tmp_path}"}}}}'
    )
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == ["error: the disk cannot be written: No space left on device; what was saved stays"]


def service_of(pid: int) -> int:
    """The process id of wandb-core, a child of `pid`."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process may end meanwhile
            name, _, fields = status.read_text().partition(") ")
            if name.endswith("(wandb-core") and int(fields.split()[1]) == pid:
                return int(status.parent.name)
    raise AssertionError(f"process {pid} has no W&B service")
