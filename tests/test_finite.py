"""Nothing broken passes as finished: numbers that are not finite skip one step, then stop the run."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks, weights
from lightning import Callback, Trainer

from mifo_lightning.cli import main
from mifo_lightning.common.errors import InputError, TrainingError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.module import MifoModule
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.monitors.history import History
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy
from mifo_lightning.steps.finite import check_weights

MakeTrainer = Callable[..., Trainer]


class Poison(Callback):
    """Makes one gradient coordinate NaN in the given optimizer steps; keeps the weights after every step."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.after: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step in self.steps:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[3] = float("nan")

    def on_train_batch_end(self, trainer: Any, pl_module: MifoModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.append(weights(pl_module))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_one_broken_step_is_skipped_said_and_counted(make_trainer: MakeTrainer) -> None:
    poison, history = Poison(2), History(["skipped_steps", "*/grad_norm"])
    with pytest.warns(UserWarning, match=r"(rl|sft) step \d+: (rl|sft)/grad_norm not finite; this .* skipped"):
        make_trainer([*method_callbacks(), poison, history]).fit(make_module(), datamodule=make_data())
    assert equal(poison.after[1], poison.after[2])
    assert not equal(poison.after[2], poison.after[3])
    assert [line.get("skipped_steps", 0.0) for line in history.lines] == [0, 0] + [1] * (len(history.lines) - 2)
    assert all(w.isfinite().all() for w in poison.after[-1].values())


def test_a_second_one_in_a_row_stops_and_leaves_the_last_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callbacks = [Poison(2, 3), ExportModel(str(tmp_path / "model")), LastCheckpoint(every=1, dirpath=str(tmp_path))]
    trainer = make_trainer(callbacks, enable_checkpointing=True)
    with pytest.raises(TrainingError, match=r"rl step 4: rl/grad_norm not finite; the run stops"), pytest.warns():
        trainer.fit(make_module(), datamodule=make_data())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert all(w.isfinite().all() for w in state["state_dict"].values())
    assert not (tmp_path / "model").exists()


class Stops(Callback):
    """Ends the training between the backward of a step and its update, as Ctrl-C or a lack of memory may."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1:
            raise RuntimeError("stopped")


@pytest.mark.parametrize("how", [Stops(), Poison(0, 1)])
def test_a_module_whose_training_ended_in_an_error_trains_again_as_a_fresh_one(
    make_trainer: MakeTrainer, how: Callback
) -> None:
    module, fresh = make_module(), make_module()
    trainer = make_trainer([how])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((RuntimeError, TrainingError)):
            trainer.fit(module, datamodule=make_data())
    fresh.load()
    fresh.load_state_dict(module.state_dict())
    lines = []
    for one in (module, fresh):
        history = History(["rl/*", "rollout/reward", "rollout/entropy"])
        make_trainer([history], max_steps=2).fit(one, datamodule=make_data())
        lines.append(history.lines)
    assert lines[0] == lines[1]


def test_a_run_resumed_between_two_broken_steps_stops_as_the_undisturbed_one(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    saved = tmp_path / "between.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(saved)

    with pytest.warns(UserWarning, match="skipped"):
        make_trainer([Poison(2), Save()]).fit(make_module(), datamodule=make_data())
    with pytest.raises(TrainingError, match="rl step 4"):
        make_trainer([Poison(3)]).fit(make_module(), datamodule=make_data(), ckpt_path=saved)


def test_a_run_that_ends_on_a_broken_step_has_not_finished(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    data = make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4))
    with pytest.raises(TrainingError, match="the last optimizer step was skipped"), pytest.warns():
        make_trainer([Poison(2), ExportModel(str(tmp_path / "model"))]).fit(make_module(), datamodule=data)
    assert not (tmp_path / "model").exists()


def test_weights_that_a_step_breaks_stop_the_run(make_trainer: MakeTrainer) -> None:
    class Break(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: MifoModule, optimizer: Any) -> None:
            if trainer.global_step == 1:
                optimizer.param_groups[0]["lr"] = float("inf")

    with pytest.raises(TrainingError, match=r"rl step 2: weights of \d+ tensors are not finite"):
        make_trainer([Break()]).fit(make_module(), datamodule=make_data())


def test_an_absurd_learning_rate_ends_with_one_line_and_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "fit",
        "--config",
        "configs/tiny.yaml",
        "--config",
        "configs/logger/csv.yaml",
        "--model.optimizer.rl.lr",
        "1e30",
    ]
    arguments += ["--trainer.logger.init_args.save_dir", str(tmp_path), "--data.val", "null", "--progress", "null"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--data.train.init_args.count", "256", "--data.schedule.rl_steps", "5"])
    assert ended.value.code == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: rl step ")
    assert "not finite" in error
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_checkpoint_of_another_format_is_refused_in_one_line(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer([])
    trainer.fit(make_module(), datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)
    for old in ({**state["mifo"], "format": 2}, {k: v for k, v in state["mifo"].items() if k != "format"}):
        torch.save({**state, "mifo": old}, tmp_path / "old.ckpt")
        with pytest.raises(InputError, match=r"ckpt_path: its format is (2|None), this version"):
            make_trainer([]).fit(make_module(), datamodule=make_data(), ckpt_path=tmp_path / "old.ckpt")


def test_a_model_with_a_broken_weight_is_not_trained(policy: Policy, tokenizer: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    policy.model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"not finite, in model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_policy(str(tmp_path))


def test_huge_weights_are_finite() -> None:
    model = torch.nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.fill_(1e25)  # the sum of their squares is not
    check_weights(model, "rl step 1")
    with torch.no_grad():
        model.bias[3] = -float("inf")
    with pytest.raises(TrainingError, match="rl step 1: weights of 1 tensors"):
        check_weights(model, "rl step 1")
