"""Flags of the Trainer: each works as in any Lightning project, or one line names it."""

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import make_data, make_module, method_callbacks
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from monitoring import Records, Sums, additions

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.monitors.history import History

MakeTrainer = Callable[..., Trainer]


class Evaluations(Callback):
    """Optimizer steps done at each evaluation, and its batches."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.batches: list[int] = []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.steps.append(trainer.global_step)
        self.batches.append(0)

    def on_validation_batch_end(self, *arguments: Any, **named: Any) -> None:
        self.batches[-1] += 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [("min_steps", 100), ("val_check_interval", 0.5), ("limit_train_batches", 0.5)],
)
def test_a_flag_that_would_do_nothing_or_never_end_is_refused(make_trainer: MakeTrainer, flag: str, value: Any) -> None:
    trainer = make_trainer(max_epochs=-1, **{flag: value})
    # so that without the refusal the test ends
    with pytest.raises(InputError, match=re.escape(f"trainer.{flag}: {value} is not allowed")):
        trainer.fit(
            make_module(engine=Sums(True)), datamodule=additions(schedule=Schedule(rl_steps=2, prompts_per_step=4))
        )


def test_a_learning_rate_monitor_is_refused_in_favour_of_the_rates_that_are_logged(make_trainer: MakeTrainer) -> None:
    records = Records()
    with pytest.raises(InputError, match="rl/lr and sft/lr are logged"):
        make_trainer([LearningRateMonitor()], logger=records).fit(make_module(), datamodule=make_data())


@pytest.mark.parametrize(
    ("flags", "steps", "evaluations", "batches"),
    [
        ({"val_check_interval": 2}, 4, [2, 4], 3),
        ({"limit_train_batches": 2}, 2, [2], 3),
        ({"limit_val_batches": 1, "val_check_interval": 4}, 4, [4], 1),
        ({"limit_val_batches": 0}, 4, [], 0),
        ({"fast_dev_run": True}, 1, [1], 1),
        ({"max_time": timedelta(seconds=0)}, 0, [], 3),
        ({"max_steps": 3, "val_check_interval": 3}, 3, [3], 3),
    ],
)
def test_flags_that_work(
    make_trainer: MakeTrainer, flags: dict[str, Any], steps: int, evaluations: list[int], batches: int
) -> None:
    seen = Evaluations()
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "max_epochs": -1, **flags}
    trainer = make_trainer([seen], **settings)
    data = additions(holdout=3, eval_batch=1, schedule=Schedule(rl_steps=4, prompts_per_step=4))
    trainer.fit(make_module(engine=Sums(True)), datamodule=data)
    assert trainer.global_step == steps
    assert seen.steps == evaluations
    assert set(seen.batches) <= {batches}


def test_a_checkpoint_goes_by_what_training_measures(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Without a logger and without a validation."""
    records = History()
    best = ModelCheckpoint(tmp_path, monitor="rollout/reward", mode="max", every_n_train_steps=1, filename="{step}")
    trainer = make_trainer([*method_callbacks(size=8), records, best], enable_checkpointing=True)
    trainer.fit(make_module(), make_data(schedule=Schedule(rl_steps=4, prompts_per_step=4, sft_batch=4)))
    rewards = {row["step"]: row["rollout/reward"] for row in records.lines if "rollout/reward" in row}
    assert len(set(rewards.values())) > 1
    assert best.best_model_score == max(rewards.values())
    first = min(step for step, reward in rewards.items() if reward == max(rewards.values()))
    assert Path(best.best_model_path).name == f"step={first}.ckpt"
