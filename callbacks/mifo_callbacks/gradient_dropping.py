"""GradientDropping: leave out a random share of the gradient at every optimizer step of one phase."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mifo_callbacks.checks import require_fraction
from mifo_callbacks.contracts import PhaseOf
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.masking import zero_
from mifo_callbacks.ownership import distinct
from mifo_callbacks.phase import PhaseCallback
from mifo_callbacks.seeds import Seed
from mifo_callbacks.sharding import local, require_visible_weights, shard_like
from mifo_callbacks.thresholds import random_scores

DROPPING = 0x64726F70  # "drop": other random numbers than `GradientFreezing` draws from the same seed


class GradientDropping(PhaseCallback):
    """Drop each coordinate of the gradient with a probability, anew at every optimizer step (MIFO, section 3.1).

    Before every optimizer step of the phase, ahead of clipping, dropped coordinates are set to zero; the others are
    not rescaled. Dropping is not freezing: under Adam momentum and weight decay still move a dropped coordinate. A
    mask depends on the seed, the number of the optimizer step and the parameter alone, so it is the same on every
    rank, under every strategy and in a resumed run.

    Args:
        probability: Probability that a coordinate is dropped, in (0, 1].
        during: Label of the phase in which gradients are dropped.
        seed: Seed of the masks; None follows `seed_everything`.
        phase: Batch key that holds the phase label, or callable(trainer, pl_module, batch) -> label.

    Raises:
        MisconfigurationException: If the probability is outside what is allowed; when training starts, if the
            strategy hides the gradients.

    Example::

        trainer = Trainer(callbacks=[GradientDropping(probability=0.5, during="sft")])
        trainer.fit(module)  # batches are {"phase": "rl" or "sft", ...}
    """

    def __init__(
        self, probability: float = 0.5, during: str = "sft", seed: int | None = None, phase: str | PhaseOf = "phase"
    ) -> None:
        super().__init__(phase, during)
        require_fraction("GradientDropping.probability", probability)
        self.probability = probability
        self.during = during
        self.seed = Seed(seed, "GradientDropping.seed")

    @property
    def state_key(self) -> str:
        return distinct(self, self._generate_state_key(during=self.during))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        require_visible_weights(trainer, pl_module, "GradientDropping")

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = trainer.global_step + self._uncounted
        stepped = {p for group in optimizer.param_groups for p in group["params"]}
        dropped = total = 0
        for position, p in enumerate(self.trained(pl_module).values()):
            if p.grad is None or p not in stepped:
                continue
            # On the full shape and the CPU: the same mask for every strategy and device.
            mask = dropping_mask(p.shape, self.probability, self.seed.value, step, position)
            dropped, total = dropped + int(mask.count_nonzero()), total + mask.numel()
            zero_(local(p.grad), local(shard_like(mask, p)))
        if total:
            log_metrics(trainer, {"drop/share": dropped / total})

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seed": self.seed.settled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.seed.restore(state_dict.get("seed"))


def dropping_mask(shape: Sequence[int], probability: float, *seed: int) -> Tensor:
    """Bool mask of `shape` on the CPU, each entry True with `probability`; depends on the integers in `seed` alone."""
    return torch.lt(random_scores(shape, *seed, DROPPING), probability)
