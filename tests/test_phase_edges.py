"""Where phases begin and end: SFT phases in a row, runs that end on SFT, steps without a gradient, warnings."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks, weights
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from monitoring import Records, monitors, summaries
from rl_steps import Coin

from mifo_callbacks import BufferPhaseSwitch, GradientFreezing
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.costs import Costs
from mifo_lightning.monitors.summary import RunSummary
from mifo_lightning.rewards.base import Reward
from mifo_lightning.steps.optimizer import AdamWSettings
from mifo_lightning.steps.settings import PolicyLoss

MakeTrainer = Callable[..., Trainer]
VAL = Skills(["addition", "mirrored"], 12, split="val")


class Push(Callback):
    """Hands the loader SFT phases of 8 demonstrations, as many after each RL rollout as told."""

    def __init__(self, *phases: int) -> None:
        self.phases = phases

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "groups" in outputs:
            for number in range(self.phases[batch["rollout"]]):
                trainer.train_dataloader.push([{"id": 8 * number + i} for i in range(8)])


class Vanish(Callback):
    """Sets the whole gradient to 0 at some optimizer steps, as masks may; stateless, so that a resumed run does too."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step in self.steps:
            for p in pl_module.parameters():
                p.grad.zero_()


class Watch(Callback):
    """Phase, mask, steps of the moments and weights after every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.masks: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(weights(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = next(iter(trainer.optimizers[0].state.values()), {"step": 0})
        self.seen.append((batch["phase"][0], int(state["step"])))
        freeze = next((c for c in trainer.callbacks if isinstance(c, GradientFreezing)), None)
        self.masks.append({n: m.clone() for n, m in freeze.masks.items()} if freeze else {})
        self.weights.append(weights(pl_module))


class SaveAll(ModelCheckpoint):
    """A checkpoint after every optimizer step."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def said(caught: list[warnings.WarningMessage], text: str) -> int:
    return sum(text in str(w.message) for w in caught)


# --- two SFT phases in a row ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The dirpath has changed.*")
def test_two_sft_phases_in_a_row_are_two_phases_to_everything(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(ckpt: Path | None = None) -> tuple[Watch, Any, dict[str, Any]]:
        watch, found = Watch(), monitors(2)
        method = [GradientFreezing(selector="random"), Push(2)]
        trainer = make_trainer([*method, *found, watch, SaveAll(tmp_path)], enable_checkpointing=True)
        module = make_module(reward=Coin())
        schedule = Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4, sft_after=2)
        trainer.fit(module, datamodule=make_data(val=VAL, holdout=4, schedule=schedule), ckpt_path=ckpt)
        return watch, module, summaries(found)

    watch, module, records = fit()
    assert watch.seen == [("r", 1), *[("s", 1), ("s", 2)] * 3]  # moments of AdamW begin anew in each
    for name, record in records.items():
        if name != "costs":
            expected = [("sft", n) for n in (1, 2, 3)]
            expected = {"overlap": expected, "retention": [("rl", 1)]}.get(name, [("rl", 1), *expected])
            assert [(r["phase"], r["number"]) for r in record["phases"]] == expected, name
    assert [r["steps"] for r in records["layer_updates"]["phases"]] == [1, 2, 2, 2]
    assert equal(watch.masks[1], watch.masks[2])
    assert not equal(watch.masks[2], watch.masks[3])
    assert not equal(watch.masks[4], watch.masks[5])
    for step in (2, 3):  # inside an SFT phase, and between two
        again, resumed, same = fit(tmp_path / f"step={step}.ckpt")
        assert again.seen == watch.seen[step:]
        assert same == records
        assert equal(weights(resumed), weights(module))


# --- how a run ends ---------------------------------------------------------------------------------------------------


def ended(
    make_trainer: MakeTrainer,
    path: Path,
    rl_steps: int | None = 2,
    size: int = 8,
    sft_lr: float = 1e-3,
    ckpt: Path | None = None,
    **changes: Any,
) -> tuple[dict[str, Any], Any]:
    """`summary.json` and module of a run that is validated before and after; two RL steps bring 8 questions."""
    limits = {key: changes.pop(key) for key in ("max_steps",) if key in changes}
    summary, saver = RunSummary(), SaveAll(path)
    callbacks = [BufferPhaseSwitch(size=size, max_accuracy=1.0), summary, Costs(), saver]
    trainer = make_trainer(
        callbacks,
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        default_root_dir=path,
        max_epochs=-1,
        **limits,
    )
    module = make_module(reward=Coin(), sft=AdamWSettings(lr=sft_lr))
    settings = {"rl_steps": rl_steps, "prompts_per_step": 4, "sft_batch": 4, **changes}
    data = make_data(train=Skills(["addition"], 64), val=VAL, schedule=Schedule(**settings), eval_batch=8)
    if ckpt is None:
        trainer.validate(module, data, verbose=False)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    trainer.validate(module, data, verbose=False)
    summary.report(trainer)
    return json.loads((path / "summary.json").read_text()), module


def test_a_run_that_ends_on_sft_is_scored_before_it_too(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    # a rate of 0: nothing happens in SFT, so both scores are of the same weights, and the same to the last bit
    still, _ = ended(make_trainer, tmp_path / "still", sft_lr=0.0)
    assert still["ends_on"] == "sft"
    assert still["after_rl"] == still["after"]
    for name, changes in (("moved", {}), ("cut off", {"rl_steps": None, "max_steps": 4})):
        record, _ = ended(make_trainer, tmp_path / name, **changes)
        assert record["ends_on"] == "sft"
        assert record["after_rl"] == still["after"]
        assert record["after_rl"].keys() == record["after"].keys()
        assert record["after_rl"] != record["after"]


def test_a_run_that_ends_on_rl_is_not(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    record, _ = ended(make_trainer, tmp_path, rl_steps=3)
    assert (record["ends_on"], record["after_rl"]) == ("rl", {})


def test_the_score_before_the_last_sft_survives_and_changes_no_bit(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    record, module = ended(make_trainer, tmp_path)
    for step in (2, 3):  # after the last RL step, and inside the SFT phase after it
        again, resumed = ended(make_trainer, tmp_path / "on", ckpt=tmp_path / f"step={step}.ckpt")
        assert {k: again[k] for k in ("before", "after_rl", "after", "ends_on")} == {
            k: record[k] for k in ("before", "after_rl", "after", "ends_on")
        }
        assert equal(weights(resumed), weights(module))
    trainer, plain = make_trainer([BufferPhaseSwitch(size=8, max_accuracy=1.0)]), make_module(reward=Coin())
    schedule = Schedule(rl_steps=2, prompts_per_step=4, sft_batch=4)
    trainer.fit(plain, datamodule=make_data(train=Skills(["addition"], 64), schedule=schedule))
    assert equal(weights(plain), weights(module))
    # the account of an extended run knows nothing of its earlier end
    extended, _ = ended(make_trainer, tmp_path / "more", rl_steps=3, ckpt=tmp_path / "step=4.ckpt")
    assert (extended["ends_on"], extended["after_rl"]) == ("rl", {})


def test_the_last_sft_phase_can_be_dropped(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    record, module = ended(make_trainer, tmp_path / "drop", final_sft="drop")
    _, without = ended(make_trainer, tmp_path / "none", size=64)
    assert (record["ends_on"], record["after_rl"]) == ("rl", {})
    assert (record["sft_phases"], record["sft_phases_dropped"]) == (0, 1)
    assert record["optimizer_steps"] == 2
    assert equal(weights(module), weights(without))


# --- steps whose gradient is 0 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.filterwarnings("ignore:The dirpath has changed.*")
def test_a_step_without_gradient_moves_nothing_if_told_and_is_counted(
    make_trainer: MakeTrainer, tmp_path: Path, micro: int
) -> None:
    """Steps 0 and 1 are RL, 2 to 3 SFT, then RL: nothing moves at the first step of all, in the middle and in SFT."""

    def fit(skip: bool, ckpt: Path | None = None) -> tuple[Watch, Records, Any]:
        watch, log = Watch(), Records()
        callbacks = [*method_callbacks(size=8)[1:3], Push(0, 1, 0, 0), Vanish(0, 2, 5), watch]
        trainer = make_trainer(
            [*callbacks, SaveAll(tmp_path / f"{skip}")],
            logger=log,
            enable_checkpointing=True,
        )
        rl = AdamWSettings(lr=5e-4, weight_decay=0.1, schedule="linear", decay_steps=8)
        module = make_module(reward=Coin(), rl=rl, skip_zero_gradient=skip, micro_batches=micro)
        schedule = Schedule(rl_steps=4, prompts_per_step=4, sft_batch=4)
        trainer.fit(module, datamodule=make_data(schedule=schedule), ckpt_path=ckpt)
        assert trainer.global_step == 6
        return watch, log, module

    watch, log, module = fit(skip=True)
    assert [equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)] == [
        step in (0, 2, 5) for step in range(6)
    ]
    assert watch.seen == [("r", 0), ("r", 1), ("s", 0), ("s", 1), ("r", 2), ("r", 2)]
    assert log.series("rl/zero_gradient_steps") == [1, 1, 1, 2]
    assert log.series("sft/zero_gradient_steps") == [1, 1]
    assert log.series("rl/lr") == pytest.approx([5e-4 * (1 - i / 8) for i in range(4)])
    if micro == 2:  # chunks change how a gradient comes about, not what is kept of it
        return
    for step in (1, 3, 5):
        _, more, resumed = fit(True, tmp_path / "True" / f"step={step}.ckpt")
        assert equal(weights(resumed), weights(module)), step
        assert log.series("rl/zero_gradient_steps")[-1:] == more.series("rl/zero_gradient_steps")[-1:]
    moved, _, _ = fit(skip=False)
    assert not equal(moved.weights[5], moved.weights[6])


class Same(Reward):
    """The same for every response, so that no group has a signal."""

    isolate = False

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [1.0] * len(responses)


@pytest.mark.parametrize("loss", [PolicyLoss(), PolicyLoss(dynamic_sampling=2)])
def test_groups_without_a_signal_give_a_gradient_of_exactly_zero(make_trainer: MakeTrainer, loss: PolicyLoss) -> None:
    log = Records()
    module = make_module(reward=Same(), loss=loss, skip_zero_gradient=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer([Start := Watch()], logger=log)
        trainer.fit(module, datamodule=make_data(schedule=Schedule(rl_steps=2, prompts_per_step=4)))
    assert equal(weights(module), Start.weights[0])
    assert log.series("rl/zero_gradient_steps") == [1, 2]
    assert log.series("rollout/groups_trained") == [0, 0]
    assert said(caught, "dynamic_sampling: 2 batches of questions gave 0 of 4 groups") == bool(loss.dynamic_sampling)


def test_groups_that_train_are_counted(make_trainer: MakeTrainer) -> None:
    log = Records()
    make_trainer(logger=log).fit(
        make_module(reward=Coin()), datamodule=make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4))
    )
    trained = log.series("rollout/groups_trained")
    without = log.series("rollout/groups_without_signal")
    assert trained == [pytest.approx(4 * (1 - share)) for share in without]
    assert min(trained) < 4


# --- a phase of one step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moments", "changes", "size", "text"),
    [
        ("reset", {}, 4, r"(buffer.size x data.schedule.sft_epochs / data.schedule.sft_batch = 1)"),
        ("reset", {"sft_before": 1}, None, r"(data.schedule.sft_before = 1)"),
        ("reset", {"sft_epochs": 2, "sft_after": 2}, 4, ""),
        ("keep", {}, 4, ""),
        ("reset", {}, None, ""),
    ],
)
def test_an_sft_phase_of_one_step_with_fresh_moments_is_said(
    make_trainer: MakeTrainer, moments: Any, changes: dict[str, Any], size: int | None, text: str
) -> None:
    switch = [BufferPhaseSwitch(size=size)] if size else []
    schedule = Schedule(**{"rl_steps": 1, "prompts_per_step": 4, "sft_batch": 4, **changes})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(switch).fit(make_module(moments=moments), datamodule=make_data(schedule=schedule))
    assert said(caught, "an SFT phase is one optimizer step") == bool(text)
    assert said(caught, text + " with model.optimizer.moments reset") == bool(text)
    assert said(caught, "model.optimizer.moments: keep") == bool(text)
