"""A program for test_strategies.py: fits under a strategy on CPU processes and writes what rank 0 saw.

python tests/two_processes.py {single|ddp|fsdp2} OUT.pt

The gradients of every case; where there are two processes also a fit, and others from two of its checkpoints.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from conftest import make_data, make_module, method_callbacks
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from rl_steps import Coin

from mifo_callbacks import GradientFreezing
from mifo_callbacks.collectives import gather_dealt, leave_group
from mifo_callbacks.sharding import full, shard_like
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.losses.distillation import SelfDistillation
from mifo_lightning.losses.sed import SED
from mifo_lightning.methods import HPT, SRFT
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.monitors.summary import RunSummary
from mifo_lightning.policy.adapter import Adapter
from mifo_lightning.steps import supervision
from mifo_lightning.steps.optimizer import AdamWSettings
from mifo_lightning.steps.settings import PolicyLoss


class Watch(Callback):
    """Phases, whole gradients, whether frozen coordinates moved, and whether nothing did."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {
            "phases": [],
            "gradients": [],
            "frozen": [],
            "moved": [],
            "still": [],
            "drawn": [],
        }

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen["phases"].append(batch["phase"])
        freeze = next(c for c in trainer.callbacks if isinstance(c, GradientFreezing))
        self.masks = dict(freeze.masks)
        self.before = {n: _local(p).clone() for n, p in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        found = {n: full(p.grad).clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.seen["gradients"].append(found)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "groups" in outputs:
            self.seen["drawn"].append([group["id"] for group in gather_dealt(outputs["groups"])])
        parameters = dict(pl_module.named_parameters())
        moved = [(self.before[n] != _local(parameters[n]))[m].any() for n, m in self.masks.items()]
        self.seen["still"].append(all((self.before[n] == _local(p)).all() for n, p in parameters.items()))
        self.seen["frozen"].append(sum(int(m.sum()) for m in self.masks.values()))
        self.seen["moved"].append(bool(moved and torch.stack(moved).any()))


class Vanish(Callback):
    """Sets the whole gradient of the second optimizer step to 0."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1:
            optimizer.zero_grad(set_to_none=False)


def _local(p: torch.Tensor) -> torch.Tensor:
    p = p.detach()
    return p.to_local() if hasattr(p, "to_local") else p


class Apart(Callback):
    """Moves the weights of a teacher away from the model's, as training does that is not at a rate of 0."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        teacher = pl_module.supervision.teacher
        if trainer.global_step == 0 and teacher is not None:
            for number, weight in enumerate(teacher.weights.values()):
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
                weight.add_(shard_like(0.05 * noise, weight))


# what the module does; each case turns on all that a rank must not see alone
CASES: dict[str, dict[str, Any]] = {
    "phases": {"loss": PolicyLoss(kl_coefficient=0.05, entropy_fraction=0.5, reference_sync_steps=2)},
    "mixed": {
        "loss": PolicyLoss(kl_coefficient=0.1, entropy_bonus=0.1, aggregation="token"),
        "mixing": SRFT(),
        "weight": "flow",
        "sed": SED(4.0, mask_ratio=0.5),
        "micro_batch_tokens": 60,  # ranks cut their steps into different numbers of chunks
    },
    # ranks drop different numbers of rollouts, and a sum must not grow with the number of ranks (HPT; ReLIFT's SFT)
    "summed": {
        "loss": PolicyLoss("group_mean", "unclipped", aggregation="sum", entropy_bonus=0.1),
        "mixing": HPT(),
        "weight": "eaft",
        "entropy_bonus": 0.1,
    },
    # each rank draws for a part of the questions, and some ranks have nothing left to draw before others
    "own responses": {"demonstrations": "refreshed", "attempts": 3, "reward": Coin()},
    # the model runs twice before each backward pass, and the teacher's prompts are longer
    "distilled": {"distillation": SelfDistillation(teacher_rate=0.5), "micro_batch_tokens": 60},
    # half of the questions are out of reach: further ones are asked for, and ranks keep different numbers of them;
    # SFT sees all tokens here
    # prompts run once a group, whatever a rank has of it
    "dynamic sampling": {
        "loss": PolicyLoss(
            "batch_std",
            clip_high=0.28,
            aggregation="token",
            dynamic_sampling=3,
            kl_coefficient=0.05,
            kl_in_reward=True,
        ),
        "share_prompts": True,
    },
    # a part of each shard has a gradient; the reference is the sharded model itself
    "adapters": {"adapter": Adapter(4, 8.0, frozen_a=True), "loss": PolicyLoss(kl_coefficient=0.05)},
}


# the run that is stopped and goes on: a reference and a teacher that follow the model
WHOLE = {**CASES["phases"], **CASES["distilled"]}


supervision.INITIAL_ROWS = 8  # ranks score different numbers of blocks before training


def fit(strategy: str, case: str, lr: float, out: Path, ckpt: Path | None = None) -> dict[str, Any]:
    devices = 1 if strategy == "single" else 2
    chosen: Any = {
        "single": "auto",
        "ddp": "ddp",
        "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }[strategy]
    watch = Watch()
    method = method_callbacks(size=8)[case == "dynamic sampling" :]  # the first one selects tokens
    module = make_module(
        rl=AdamWSettings(lr=lr), sft=AdamWSettings(lr=lr), skip_zero_gradient=True, **CASES.get(case, WHOLE)
    )
    saver = ModelCheckpoint(out.parent / strategy, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    summary = RunSummary()
    export = ExportModel(str(out.parent / f"model-{strategy}")) if lr and ckpt is None else Callback()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=chosen,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            *method,
            *([Vanish()] if lr else [Apart()]),
            watch,
            summary,
            export,
            *([saver] if lr and ckpt is None else []),
        ],
        enable_checkpointing=bool(lr) and ckpt is None,
        default_root_dir=out.parent,
    )
    schedule = Schedule(rl_steps=3 if lr else 2, prompts_per_step=8, sft_batch=4, epochs_per_rollout=2)
    data = make_data(schedule=schedule, holdout=9, eval_batch=2)
    if case == "phases" and not lr:
        values = trainer.validate(module, data, verbose=False)[0]
        watch.seen["validation"] = [values]
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    watch.seen["after_rl"] = [summary.after_rl]
    watch.seen["weights"] = [{n: full(p).detach().clone() for n, p in module.named_parameters()}]
    return {**watch.seen, "rank": trainer.global_rank}


def main() -> None:
    strategy, out = sys.argv[1], Path(sys.argv[2])
    seen: dict[str, Any] = {"cases": {case: fit(strategy, case, 0.0, out) for case in CASES}}
    if strategy != "single":
        seen["whole"] = whole = fit(strategy, "whole", 5e-4, out)
        # after the first of a rollout's two passes, and after the first of an SFT phase's two steps
        steps = (1, whole["phases"].index("sft") + 1)
        kept = out.parent / strategy
        seen["again"] = {s: fit(strategy, "whole", 5e-4, out, kept / f"step={s}.ckpt") for s in steps}
    if seen["cases"]["phases"]["rank"] == 0:
        torch.save(seen, out)
    leave_group()


if __name__ == "__main__":
    main()
