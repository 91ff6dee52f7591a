"""Resuming from a checkpoint at any step, inside either phase, gives the same run bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_buffer import Loader, Rollouts, group
from toy import Phases, Recorder, Toy, fit

from mifo_callbacks import BufferPhaseSwitch, GradientDropping, GradientFreezing, ImportanceEMA

SCHEDULE = ["rl"] * 3 + ["sft"] * 3 + ["rl"] * 2 + ["sft"] * 3 + ["rl"] * 2
NUMBERED = ["rl 0"] * 2 + ["sft 0"] * 2 + ["sft 1"] * 2 + ["rl 2"]  # two SFT phases in a row


def every_step(folder: Path) -> Callback:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize(
    ("importance", "freezing", "schedule"),
    [
        ({}, {}, SCHEDULE),
        ({"accumulate": "step"}, {"scope": "global"}, SCHEDULE),
        ({"alpha": 0.0, "dtype": "bfloat16"}, {"selector": "rl_bottomk"}, SCHEDULE),
        ({}, {"selector": "random"}, SCHEDULE),
        ({"measure": "sft"}, {"selector": "random"}, NUMBERED),
    ],
)
def test_resumed_weights_are_bit_identical(tmp_path: Path, importance: Any, freezing: Any, schedule: list[str]) -> None:
    def callbacks() -> list[Any]:
        return [ImportanceEMA(**importance), GradientFreezing(**freezing)]

    straight = callbacks()
    recorder = Recorder()
    module = fit([*straight, recorder, every_step(tmp_path)], Phases(schedule), enable_checkpointing=True)
    for step in range(1, len(schedule)):
        resumed = callbacks()
        loader = Phases(schedule)
        again = fit([*resumed], loader, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.trainer.global_step == len(schedule)
        for a, b in zip(module.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), f"resumed from step {step}"
        for name, value in straight[0].importance.items():
            assert torch.equal(value, resumed[0].importance[name])


class Unfreezing(Toy):
    """Its first layer is trained from the second step on; a resumed run learns of it after training has started."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.net[0].requires_grad_(self.trainer.global_step > 0)


@pytest.mark.parametrize("freezing", [{}, {"selector": "random"}])
def test_what_was_trained_before_is_known_after_a_resume(tmp_path: Path, freezing: Any) -> None:
    def callbacks() -> list[Any]:
        return [ImportanceEMA(), GradientFreezing(**freezing), GradientDropping(0.3, during="rl")]

    module = fit([*callbacks(), every_step(tmp_path)], Phases(SCHEDULE), Unfreezing(), enable_checkpointing=True)
    for step in (1, 2, 4, 7, 10):
        again = fit(callbacks(), Phases(SCHEDULE), Unfreezing(), ckpt_path=tmp_path / f"step={step}.ckpt")
        for a, b in zip(module.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), f"resumed from step {step}"


def test_checkpoints_hold_plain_types(tmp_path: Path) -> None:
    fit(
        [ImportanceEMA(), GradientFreezing(), every_step(tmp_path)],
        Phases(SCHEDULE),
        enable_checkpointing=True,
    )
    state = torch.load(tmp_path / "step=8.ckpt", weights_only=True)["callbacks"]
    importance, freezing = state["ImportanceEMA{'measure': 'rl'}"], state["GradientFreezing{'during': 'sft'}"]
    common = {"phase", "phase_number", "phases_seen", "uncounted_steps", "trained"}
    assert importance.keys() == common | {"updates", "importance", "start"}
    assert importance["start"].keys() == importance["importance"].keys()
    assert freezing.keys() == common | {"number", "seed"}
    assert (freezing["phase"], freezing["phases_seen"], freezing["number"]) == ("rl", ["rl", "sft"], 1)


def test_buffer_survives(tmp_path: Path) -> None:
    rollouts = [
        [group(1), group(2)],
        [group(2), group(3, has_demonstration=False)],
        [group(4), group(5)],
        [group(6)],
    ]
    straight, loader = BufferPhaseSwitch(size=3), Loader(rollouts)
    fit([straight, every_step(tmp_path)], loader, Rollouts(), enable_checkpointing=True)
    resumed, rest = BufferPhaseSwitch(size=3), Loader(rollouts[2:])
    fit([resumed], rest, Rollouts(), ckpt_path=tmp_path / "step=2.ckpt", max_epochs=1)
    assert resumed.state_dict() == straight.state_dict()
    assert rest.pushed == loader.pushed


def test_a_foreign_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    importance = ImportanceEMA()
    fit([importance], Phases(["rl", "sft"]))
    state = importance.state_dict()
    state["importance"] = {"gone": torch.zeros(3)}
    other = ImportanceEMA()
    other.load_state_dict(state)
    with pytest.raises(MisconfigurationException, match="names 'gone'"):
        fit([other], Phases(["rl"]))
