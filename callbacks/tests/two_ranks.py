"""One run of ImportanceEMA + GradientFreezing under a strategy, and runs resumed inside each phase of it."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from toy import Log, Phases, Toy, fit

from mifo_callbacks import CumulativeFreezing, GradientFreezing, ImportanceEMA, LowGain, OverlapShares

SCHEDULE = ["rl"] * 3 + ["sft"] * 3 + ["rl"] * 2 + ["sft"]
VARIANTS = [
    ("rl_topk", "tensor"),
    ("rl_topk", "global"),
    ("random", "tensor"),
    ("low_gain", "tensor"),
    ("overlap_shares", "global"),
    ("cumulative", "tensor"),
    ("cumulative", "global"),
]
# inside rl, inside sft, and after the last sft step; of the others inside sft, where they hold a mask of their own,
# and where one carries a mask over to the next phase also before that
RESUME_FROM = {VARIANTS[0]: (2, 5, 6), ("cumulative", "tensor"): (5, 6)}


class Sharded(Toy):
    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is not None and mesh["data_parallel"].size() > 1:
            fully_shard(self.net[0], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Keep(Callback):
    def __init__(self, freezing: GradientFreezing) -> None:
        self.freezing = freezing
        self.weights: list[dict[str, Tensor]] = []
        self.masks: list[dict[str, Tensor]] = []
        self.logged = Log()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.weights.append({name: full(p) for name, p in pl_module.named_parameters()})
        self.masks.append({name: mask.clone() for name, mask in self.freezing.masks.items()})


def run(strategy: str, folder: Path) -> None:
    """All variants under "single", "ddp", "fsdp2" or "tensor_parallel"; writes rank0.pt and rank1.pt into `folder`."""
    kept = {}
    for variant in VARIANTS:
        save = ModelCheckpoint(folder / "-".join(variant), "{step}", every_n_train_steps=1, save_top_k=-1)
        straight = once(strategy, variant, [save], enable_checkpointing=True)
        resumed = [
            once(strategy, variant, [], ckpt_path=Path(save.dirpath or "") / f"step={step}.ckpt").weights[-1]
            for step in (RESUME_FROM.get(variant, (5,)) if strategy != "single" else ())
        ]
        kept[variant] = {
            "weights": straight.weights,
            "masks": straight.masks,
            "resumed": resumed,
            "logged": straight.logged.rows,
        }
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(kept, folder / f"rank{rank}.pt")


def once(strategy: str, variant: tuple[Any, Any], extra: list[Callback], **options: Any) -> Keep:
    if strategy == "ddp":
        options["strategy"] = "ddp"
    elif strategy != "single":
        sizes = (2, 1) if strategy == "fsdp2" else (1, 2)
        options["strategy"] = ModelParallelStrategy(*sizes)
    freezing = freezing_of(*variant)
    keep = Keep(freezing)
    devices = 1 if strategy == "single" else 2
    options |= {"devices": devices, "logger": keep.logged}
    fit([ImportanceEMA(), freezing, keep, *extra], Phases(SCHEDULE), Sharded(), **options)
    return keep


def freezing_of(selector: Any, scope: Any) -> GradientFreezing:
    if selector == "cumulative":
        return CumulativeFreezing(0.2, 0.3, "random", scope)
    rules = {"low_gain": LowGain(), "overlap_shares": OverlapShares()}
    return GradientFreezing(selector=rules.get(selector, selector), scope=scope)
