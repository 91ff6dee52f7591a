"""Checkpoint files: whole at every moment, however a run ends, and verified when they are read."""

import errno
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, short
from conftest import make_data, make_module, method_callbacks, weights
from kills import contents, in_child, kill_at
from lightning import Callback, Trainer

from mifo_lightning.checkpoints import files as checkpoint_io
from mifo_lightning.checkpoints.files import CheckedCheckpointIO, read_checkpoint, write_checkpoint
from mifo_lightning.cli import main
from mifo_lightning.cli.command_line import MifoCLI
from mifo_lightning.cli.resume import read_or_previous
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.monitors import checkpoint as monitor
from mifo_lightning.monitors.checkpoint import LastCheckpoint, disk_problem

MakeTrainer = Callable[..., Trainer]
SHORT = Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4)


def fit(make: MakeTrainer, root: Path, *callbacks: Callback, ckpt: Path | None = None, every: int = 1) -> Any:
    """A run of the method that writes a checkpoint at every step; its module."""
    trainer = make(
        [*method_callbacks(), LastCheckpoint(every), *callbacks],
        default_root_dir=root,
        enable_checkpointing=True,
        plugins=[CheckedCheckpointIO()],
    )
    module = make_module()
    trainer.fit(module, datamodule=make_data(schedule=SHORT), ckpt_path=ckpt, weights_only=True)
    return module


def trainer_of(callbacks: list[Callback], **settings: Any) -> Trainer:
    common: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_val_batches": 0}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=callbacks, **common, **quiet, **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights at the end of a run that nobody kills."""
    return weights(fit(trainer_of, tmp_path_factory.mktemp("calm")))


# the third write: half a file; then before its fsync, its rename, the directory's, two more renames, the directory's
EVENTS = range(12, 18)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of what the kill at each event leaves: one run that is killed at the last, copied before each."""
    root = tmp_path_factory.mktemp("killed")

    def keep(event: int) -> None:
        if event in EVENTS:
            shutil.copytree(root / "checkpoints", root / str(event))

    def run() -> None:
        kill_at(EVENTS[-1], keep)
        fit(trainer_of, root)

    assert in_child(run) == signal.SIGKILL
    assert contents(root / str(EVENTS[-1])) == contents(root / "checkpoints"), "a copy is what the kill leaves"
    return root


@pytest.mark.parametrize("event", [-3, *EVENTS])
def test_a_run_that_is_killed_while_it_writes_resumes_to_the_same_bits(
    make_trainer: MakeTrainer, undisturbed: dict[str, torch.Tensor], killed: Path, tmp_path: Path, event: int
) -> None:
    def run() -> None:
        kill_at(event)
        fit(make_trainer, tmp_path)

    if event < 0:
        assert in_child(run) == signal.SIGKILL
    else:
        shutil.copytree(killed / str(event), tmp_path / "checkpoints")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, state = read_or_previous(tmp_path / "checkpoints" / "last.ckpt")
    assert state["global_step"] == (3 if event == 17 else 2)
    assert (path.name == "previous.ckpt") == (event == 16)
    again = weights(fit(make_trainer, tmp_path, ckpt=path))
    assert all(torch.equal(again[name], w) for name, w in undisturbed.items())
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_nothing_goes_by_way_of_the_directory_for_temporary_files(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    fit(make_trainer, tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] > 2


class Limit(Callback):
    """From the third step on no file can be larger than 100 kB, as on a disk that is full."""

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_disk_that_is_full_costs_neither_the_run_nor_the_older_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def run() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(make_trainer, tmp_path, Limit())
        lines = [str(w.message) for w in caught if "File too large" in str(w.message)]
        (tmp_path / "said.txt").write_text("\n".join(lines), encoding="utf-8")

    assert in_child(run) == 0
    (line,) = (tmp_path / "said.txt").read_text(encoding="utf-8").split("\n")
    assert f"{tmp_path}/checkpoints/" in line
    assert re.search(r"this checkpoint takes \d,\d{3},\d{3} bytes, and [\d,]+ are free", line)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_a_run_whose_end_cannot_be_saved_has_its_model_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_io.os, "fsync", full)
    arguments = short(tmp_path, trainer__enable_checkpointing="true", checkpoint__every="1")
    with pytest.warns(UserWarning, match="No space left on device") as said, pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 1
    assert len([w for w in said if "No space left" in str(w.message)]) == 1
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert "No space left on device; this checkpoint takes" in line
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "summary.json").is_file()
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("free", "name", "text"),
    [
        (1000, "new", "1,000 are free"),
        (1 << 40, "file/below", "cannot be written to"),
    ],
)
def test_a_disk_that_holds_no_checkpoint_is_said_before_anything_else(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    free: int,
    name: str,
    text: str,
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(monitor, "free_bytes", lambda path: free)
    arguments = [*short(tmp_path / "run", trainer__enable_checkpointing="true")]
    line = refused(capsys, *arguments, "--checkpoint.dirpath", str(tmp_path / name))
    assert text in line
    assert "checkpoint.dirpath" in line
    assert not (tmp_path / "run").exists()


def test_two_are_kept_where_three_fit_and_else_one_with_a_line(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = 4 * monitor.PARTS * sum(p.numel() for p in make_module().blueprint().parameters())
    assert disk_problem(tmp_path, needed, 0) is None
    monkeypatch.setattr(monitor, "free_bytes", lambda path: 5 * needed // 2)
    with pytest.warns(UserWarning, match="does not hold three checkpoints"):
        fit(make_trainer, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (tmp_path / "checkpoints" / "last.ckpt").stat().st_size < needed


def test_the_clock_asks_for_one_too_at_the_end_of_an_optimizer_step(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[int] = []

    class Look(Callback):
        def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            written.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def run(name: str, seconds: float, share: float) -> None:
        written.clear()
        monkeypatch.setattr(monitor, "SECONDS", seconds)
        monkeypatch.setattr(monitor, "SHARE", share)
        callbacks = [LastCheckpoint(every=0, dirpath=str(tmp_path / name)), Look()]
        trainer = make_trainer(callbacks, enable_checkpointing=True)
        trainer.fit(
            make_module(micro_batches=2), datamodule=make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4))
        )

    run("always", 0, 0)
    assert written == [1, 2, 3]
    run("never", 600, 20)
    assert written == [3]  # the end
    run("once", 0, 1e9)  # the first is due at once; what it took puts the next one off
    assert written == [1, 3]


def checkpoint_file(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    write_checkpoint({"state_dict": {"w": torch.randn(50, 100, generator=generator)}, "global_step": 7}, path)
    return path


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = checkpoint_file(tmp_path / "a.ckpt")
    good, generator, found = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        place = generator.randrange(len(good) * 8)
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        try:
            state = read_checkpoint(path)
        except InputError:
            found += 1
        else:
            path.write_bytes(good)
            assert torch.equal(state["state_dict"]["w"], read_checkpoint(path)["state_dict"]["w"])
            assert state["global_step"] == 7
    assert found > 270


def test_zeroed_bytes_and_every_cut_are_found(tmp_path: Path) -> None:
    path = checkpoint_file(tmp_path / "a.ckpt")
    good = path.read_bytes()
    for place in (0, 100, len(good) // 2):
        path.write_bytes(good[:place] + bytes(64) + good[place + 64 :])
        with pytest.raises(InputError, match=r"damaged|no checkpoint"):
            read_checkpoint(path)
    for size in range(0, len(good), 499):
        path.write_bytes(good[:size])
        with pytest.raises(InputError, match=r"damaged or cut off|is empty|no checkpoint"):
            CheckedCheckpointIO().load_checkpoint(path)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(("command", "legacy"), [("fit", False), ("validate", True)])
def test_no_code_in_a_checkpoint_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, legacy: bool
) -> None:
    path, marker = tmp_path / "a.ckpt", tmp_path / "marker"
    torch.save({"state_dict": {}, "evil": Evil(marker)}, path, _use_new_zipfile_serialization=not legacy)
    arguments = [command, *short(tmp_path / "run")[1:], "--ckpt_path", str(path)]
    assert str(path) in refused(capsys, *arguments)
    with pytest.raises(InputError):
        CheckedCheckpointIO().load_checkpoint(path, weights_only=False)
    assert all("weights_only" in left_out for left_out in MifoCLI.subcommands().values()), "there is no such flag"
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert marker.exists()
