"""One seed from Python and from the command line: the same gives the same bits, another gives others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, short
from conftest import make_data, make_module, method_callbacks, weights
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mifo_callbacks.seeds import GLOBAL
from mifo_lightning.cli import main
from mifo_lightning.data.schedule import Schedule

MakeTrainer = Callable[..., Trainer]
TWO = Schedule(rl_steps=2, prompts_per_step=4, sft_batch=4)


@pytest.fixture(autouse=True)
def unseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits the seed of another."""
    monkeypatch.setenv(GLOBAL, "0")  # so that it is put back
    monkeypatch.delenv(GLOBAL)


def trained(make_trainer: MakeTrainer, **given: Any) -> dict[str, torch.Tensor]:
    module = make_module(seed=None, **given)
    make_trainer(method_callbacks(size=8)).fit(module, datamodule=make_data(seed=None, schedule=TWO, **given))
    return weights(module)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_two_seeds_differ_and_the_same_is_the_same(make_trainer: MakeTrainer) -> None:
    found = {}
    for seed in (1, 2, 1):
        seed_everything(seed, verbose=False)
        again = trained(make_trainer)
        assert equal(found.setdefault(seed, again), again)
    assert not equal(found[1], found[2])


def test_module_and_data_keep_the_seed_of_a_run_that_goes_on(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(directory: Path, steps: int, start: Path | None = None, **given: Any) -> dict[str, torch.Tensor]:
        module, data = make_module(seed=None), make_data(seed=None, holdout=9, schedule=TWO, **given)
        saver = ModelCheckpoint(directory, save_last=True, every_n_train_steps=1)
        trainer = make_trainer([saver], enable_checkpointing=True, max_steps=steps)
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=False)
        return weights(module)

    seed_everything(1, verbose=False)
    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "cut", 1)
    seed_everything(2, verbose=False)
    assert equal(run(tmp_path / "again", 2, tmp_path / "cut" / "last.ckpt"), whole)
    module = make_module(seed=2)
    with pytest.raises(MisconfigurationException, match=r"model.seed is 2, and 1 in the run of the checkpoint"):
        make_trainer([]).fit(module, make_data(schedule=TWO), ckpt_path=tmp_path / "cut" / "last.ckpt")


def test_the_command_line_does_not_go_on_with_another_seed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(short(tmp_path, trainer__enable_checkpointing="true", checkpoint__every="1", trainer__max_steps="2"))
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    line = refused(capsys, *short(tmp_path, trainer__enable_checkpointing="true", ckpt_path=last, seed_everything="3"))
    assert "seed is 3, and 0 in the run of the checkpoint" in line
