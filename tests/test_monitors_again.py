"""Monitors in a second fit: another module's numbers are refused, the same one's go on, other questions are refused."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks
from lightning import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_module import SaveAt

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.monitors.costs import Costs
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.monitors.forgetting import Forgetting
from mifo_lightning.monitors.heldout import HeldOutLoss
from mifo_lightning.monitors.history import History
from mifo_lightning.monitors.overlap import FrozenOverlap
from mifo_lightning.monitors.retention import Retention
from mifo_lightning.monitors.samples import SampleTable
from mifo_lightning.monitors.summary import RunSummary

MakeTrainer = Callable[..., Trainer]
ONE = Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4)
VAL = Skills(["addition"], 4, split="val")
OTHER = Skills(["addition"], 4, split="test")


def fit(make: MakeTrainer, monitor: Callback, module: Any = None, **options: Any) -> None:
    data = make_data(val=options.pop("val", VAL), schedule=options.pop("schedule", ONE))
    settings = {"enable_checkpointing": isinstance(monitor, LastCheckpoint), "limit_val_batches": 1, **options}
    ckpt = settings.pop("ckpt_path", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make([*settings.pop("extra", []), monitor], max_epochs=-1, **settings)
        trainer.fit(module or make_module(), datamodule=data, ckpt_path=ckpt)


def test_what_one_run_recorded_is_not_mixed_with_that_of_another_module(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saver = LastCheckpoint()
    others = [
        HeldOutLoss(),
        Forgetting(),
        Retention(1, samples=1),
        Costs(),
        History(),
        RunSummary(),
        ExportModel("model"),
    ]
    fit(make_trainer, saver, extra=others)
    for monitor in (*others, saver):
        name = type(monitor).__name__
        with pytest.raises(
            MisconfigurationException, match=f"{name} has the state of another module's run; allowed: a new"
        ):
            fit(make_trainer, monitor)


def test_a_second_fit_of_one_module_lists_every_phase_once(make_trainer: MakeTrainer) -> None:
    """RL goes on where it ended: the phase that was measured at the end of the first fit was not over."""
    monitor, module = HeldOutLoss(), make_module()
    for _ in range(2):
        fit(make_trainer, monitor, module)
    assert [(phase["phase"], phase["number"]) for phase in monitor.phases] == [("rl", 1)]


def test_a_run_that_goes_on_is_measured_on_the_questions_that_it_began_with(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def made() -> list[Callback]:
        return [HeldOutLoss(), Forgetting(), Retention(2, samples=1)]

    two = Schedule(rl_steps=2, prompts_per_step=4, sft_batch=4)
    saver = LastCheckpoint(every=1, dirpath=str(tmp_path / "kept"))
    fit(make_trainer, saver, extra=made(), max_steps=1, schedule=two)
    path = tmp_path / "kept" / "last.ckpt"
    for monitor in made():
        with pytest.raises(InputError, match=r"was measured on other questions; keep data\.val") as refused:
            fit(make_trainer, monitor, val=OTHER, ckpt_path=path, schedule=two)
        assert "\n" not in str(refused.value)
    *others, last = made()
    fit(make_trainer, last, extra=others, ckpt_path=path, schedule=two)


def test_arguments_that_would_record_nothing_or_all_are_refused() -> None:
    for wrong in ("rl/*", [3], [""], []):
        with pytest.raises(InputError, match=r"history\.keys: "):
            History(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"samples\.per_evaluation: -1 is not allowed"):
        SampleTable(per_evaluation=-1)


def test_a_gradient_that_is_no_number_is_in_no_share(make_trainer: MakeTrainer) -> None:
    """Its step is skipped; one NaN would make the whole phase's share one."""

    class Broken(Callback):
        first = True

        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            if self.first and any(type(c).__name__ == "GradientFreezing" and c.masks for c in trainer.callbacks):  # type: ignore[attr-defined]
                self.first = False
                next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(float("nan"))

    monitor, broken = FrozenOverlap(), Broken()
    schedule = Schedule(rl_steps=3, prompts_per_step=8, sft_batch=4)
    fit(make_trainer, monitor, extra=[broken, *method_callbacks(8)], schedule=schedule)
    assert not broken.first
    assert monitor.phases
    shares = torch.tensor([[phase[key] for key in ("frozen", "gradient")] for phase in monitor.phases])
    assert shares.isfinite().all()


def test_a_step_that_is_done_anew_is_not_measured_again(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path, schedule = tmp_path / "inside.ckpt", Schedule(rl_steps=4, prompts_per_step=4, epochs_per_rollout=2)

    def fit(*callbacks: Callback, ckpt: Path | None = None) -> int:
        monitor = Forgetting(questions=4, every=1)
        data = make_data(val=Skills(["addition"], 8, split="val"), schedule=schedule)
        make_trainer([monitor, *callbacks]).fit(make_module(), datamodule=data, ckpt_path=ckpt)
        return monitor.responses

    whole = fit(SaveAt("on_before_backward", 4, path))  # the first update of the third rollout, measured before it
    assert whole == 4 * (4 + 1)  # before each rollout, and at the end
    assert fit(ckpt=path) == whole
