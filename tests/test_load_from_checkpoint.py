"""A checkpoint gives its module back: what is an object is named, what may run code is never taken from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLING, make_data, make_trainer  # noqa: F401  (a fixture)
from rl_steps import Coin

import mifo_lightning as mifo
from mifo_lightning.common.errors import InputError
from mifo_lightning.losses.distillation import SelfDistillation
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.policy.loading import locate
from mifo_lightning.rollout.in_process import InProcessEngine

ONE = mifo.Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4)


def run(make: Callable[..., Any], module: mifo.MifoModule, place: Path) -> Path:
    trainer = make([LastCheckpoint(dirpath=str(place))], enable_checkpointing=True, max_epochs=-1)
    trainer.fit(module, make_data(schedule=ONE))
    return place / "last.ckpt"


def test_an_object_in_a_group_is_given_again_by_its_name(make_trainer: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    rollout = mifo.Rollout(5, 0.5, SAMPLING, InProcessEngine(64))
    path = run(make_trainer, mifo.MifoModule("embedded", Coin(), rollout, seed=0), tmp_path)
    with pytest.raises(
        InputError, match=r'reward, rollout\.engine: an object .*; give reward=…, \*\*\{"rollout\.engine": …\}'
    ):
        mifo.MifoModule.load_from_checkpoint(path)
    engine = InProcessEngine(8)
    again = mifo.MifoModule.load_from_checkpoint(path, reward=Coin(), **{"rollout.engine": engine})
    assert again.responder.engine is engine
    assert (again.reinforcement.group_size, again.success_threshold, again.sampling) == (5, 0.5, SAMPLING)


def test_settings_whose_default_is_none_come_back(make_trainer: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    loss = mifo.SFTLoss(distillation=SelfDistillation("{prompt} {demonstration}"))
    rollout = mifo.Rollout(4, sampling=SAMPLING)
    module = mifo.MifoModule(Path(locate("embedded")), Coin(), rollout, sft_loss=loss, seed=0)  # type: ignore[arg-type]
    again = mifo.MifoModule.load_from_checkpoint(run(make_trainer, module, tmp_path), reward=Coin())
    assert again.teacher_template == "{prompt} {demonstration}"
    assert again.model_name == module.model_name


class Trusts(mifo.MifoModule):
    """Has a setting of that name itself."""

    def __init__(self, model: str, reward: Any, trust_remote_code: bool = False) -> None:
        loading = mifo.Loading(trust_remote_code=trust_remote_code)
        super().__init__(model, reward, mifo.Rollout(4, sampling=SAMPLING), loading=loading, seed=0)
        self.save_hyperparameters("trust_remote_code", logger=False)


def test_whether_code_may_run_is_taken_from_no_file(make_trainer: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    path = run(make_trainer, Trusts("embedded", Coin(), trust_remote_code=True), tmp_path)
    assert not Trusts.load_from_checkpoint(path, reward=Coin()).loading.trust_remote_code


@pytest.mark.parametrize("loading", [None, "text", []])
def test_a_checkpoint_of_another_version_is_one_line(tmp_path: Path, loading: Any) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"model": "embedded", "loading": loading}}, tmp_path / "old.ckpt")
    with pytest.raises(InputError, match=r"old\.ckpt was written by another version"):
        mifo.MifoModule.load_from_checkpoint(tmp_path / "old.ckpt", reward=Coin())


class Own(mifo.MifoModule):
    """Evaluates in its own way."""

    asked = 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        self.asked += 1
        return super().validation_step(batch, batch_idx, dataloader_idx)


def test_a_subclass_s_validation_is_that_of_test_too(make_trainer: Callable[..., Any]) -> None:  # noqa: F811
    module = Own("embedded", Coin(), mifo.Rollout(4, sampling=SAMPLING), seed=0)
    found = make_trainer([]).test(module, make_data(test=mifo.Skills(["sorting"], 8, split="test")), verbose=False)
    assert module.asked == 1
    assert "test/avg@1" in found[0]
