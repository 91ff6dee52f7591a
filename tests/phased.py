"""A small foreign module in RL and SFT phases, what a protection did to it step by step, and two ranks of the same.

python tests/phased.py {single|ddp|fsdp2} OUT.pt
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from mifo_callbacks import ImportanceEMA, PhaseCallback
from mifo_callbacks.collectives import leave_group
from mifo_callbacks.sharding import full
from mifo_lightning.common.errors import InputError
from mifo_lightning.methods import Anchor, SignConflict, SoftFreezing, SubspaceFreezing

SCHEDULE = ["rl"] * 3 + ["sft"] * 3 + ["rl"] * 2 + ["sft"] * 3 + ["rl"]
SHARDED: dict[str, Callable[[], list[Callback]]] = {
    "l2": lambda: [Anchor(0.3)],
    "soft": lambda: [ImportanceEMA(), SoftFreezing()],
    "conflict": lambda: [SignConflict(0.5)],
    "conflict over all, random": lambda: [SignConflict(0.3, "global", "random", seed=0)],
}
Weights = dict[str, Tensor]


class Toy(LightningModule):
    """A classifier under one AdamW for both phases, with weight decay: its moments are warm where a phase begins."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is not None and mesh["data_parallel"].size() > 1:
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Phases:
    """A batch for each label of the schedule, a function of its place alone; in `parts` where steps accumulate."""

    def __init__(self, schedule: list[str], parts: int = 1) -> None:
        self.schedule, self.parts, self.position = schedule, parts, 0

    def __len__(self) -> int:
        return len(self.schedule) * self.parts

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.position < len(self.schedule):
            label, draw = self.schedule[self.position], torch.Generator().manual_seed(self.position)
            self.position += 1
            x, y = torch.randn(8, 8, generator=draw), torch.randint(4, (8,), generator=draw)
            for rows in zip(x.chunk(self.parts), y.chunk(self.parts), strict=True):
                yield {"phase": label, "x": rows[0], "y": rows[1]}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Look(PhaseCallback):
    """Gradients as the loss made them, weights before a step, right after the optimizer and at the batch's end.

    Stands before a protection in the list, so that its hooks run first.
    """

    def __init__(self, look: Callable[[], Any] = lambda: None) -> None:
        super().__init__(acts_on="sft")
        self.look = look
        self.before, self.raw, self.after = list[Weights](), list[Weights](), list[Weights]()
        self.gradients, self.given, self.looks = list[Weights](), list[Weights](), list[Any]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.begin = copies(pl_module)

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.before.append(copies(pl_module))
        self.gradients.append(gradients(pl_module))
        self.looks.append(self.look())

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.raw.append(copies(pl_module))
        self.given.append(gradients(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        self.after.append(copies(pl_module))


def copies(module: nn.Module) -> Weights:
    return {name: full(p).detach().clone() for name, p in module.named_parameters()}


def gradients(module: nn.Module) -> Weights:
    return {name: full(p.grad).detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def fit(callbacks: list[Callback], schedule: list[str] = SCHEDULE, parts: int = 1, **options: Any) -> Toy:
    """A quiet fit on the CPU; `ckpt_path`, `module` and arguments of the Trainer are options."""
    module, ckpt = options.pop("module", None) or Toy(), options.pop("ckpt_path", None)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accumulate_grad_batches": parts,
    }
    Trainer(callbacks=callbacks, **(settings | options)).fit(module, Phases(schedule, parts), ckpt_path=ckpt)
    return module


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


def under(strategy: str, folder: Path) -> dict[str, Any]:
    """Weights after every step of each case and at the end of runs resumed inside either phase; what is refused."""

    def run(callbacks: list[Callback], **options: Any) -> Toy:
        if strategy != "single":
            options |= {"devices": 2, "strategy": "ddp" if strategy == "ddp" else ModelParallelStrategy(2, 1)}
        return fit(callbacks, **options)

    found: dict[str, Any] = {"refused": []}
    for case, make in SHARDED.items():
        look, saver = Look(), every_step(folder / case.replace(" ", "_"))
        run([look, *make(), saver], enable_checkpointing=True)
        saved = Path(str(saver.dirpath))
        again = [copies(run(make(), ckpt_path=saved / f"step={step}.ckpt")) for step in (2, 4, 9)]
        found[case] = {"after": look.after, "resumed": again}
    for whole in (Anchor(0.3, 3), SubspaceFreezing(2)):
        try:
            run([whole], schedule=["rl"])
        except InputError as error:
            found["refused"].append(str(error))
    return found


if __name__ == "__main__":
    result = under(sys.argv[1], Path(sys.argv[2]).parent)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(result, sys.argv[2])
    leave_group()
