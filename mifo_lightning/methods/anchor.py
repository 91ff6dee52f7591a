"""Anchor: a penalty draws SFT's weights back to where the phase began, in all directions or in those that count."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from mifo_callbacks.collectives import sum_over
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.seeds import Seed
from mifo_callbacks.sharding import full_on_first_rank, local, shard_group, shard_like
from mifo_lightning.common.errors import require
from mifo_lightning.methods.directions import at_random, singular_directions
from mifo_lightning.methods.protection import Protection

Selector = Literal["top", "random"]
Bases = tuple[Tensor, Tensor]


class Anchor(Protection):
    """Add to SFT's loss strength * sum_W ||U_k^T (W - W_0) V_k||_F^2, as a gradient, ahead of clipping.

    W_0 are the weights when the SFT phase begins, U_k and V_k the first k singular vectors of W_0 (RPSFT, arXiv
    2605.10973, whose W_0 is the model before its one SFT). With k null it is strength * ||W - W_0||^2 over all
    trained weights (L2); with k over matrices alone, and the whole of one whose smaller side is at most k, as in
    the authors' code. No graph: the gradient 2 strength U_k (U_k^T (W - W_0) V_k) V_k^T is added to that of the loss,
    once an optimizer step. Costs a copy of the weights in SFT phases, with k the two bases beside it, and a
    decomposition of each matrix where a phase begins or is resumed.

    Args:
        strength: lambda, weight of the penalty beside a loss that is a mean over tokens.
        k: Singular vectors on each side, fp32, found in fp64; null: all of every weight.
        selector: The first singular vectors of W_0, or as many directions at random, anew in each phase (a control).
        seed: Seed of random directions; null follows `seed_everything`.

    Raises:
        InputError: If a setting is not allowed; when training starts, with adapters, or k and sharded weights.
    """

    group = "anchor"

    def __init__(
        self, strength: float = 1.0, k: int | None = None, selector: Selector = "top", seed: int | None = None
    ) -> None:
        super().__init__()
        require("anchor.strength", strength, strength > 0, "above 0")
        require("anchor.k", k, k is None or k >= 1, "at least 1, or null")
        require("anchor.selector", selector, selector in ("top", "random"), "top or random")
        require("anchor.selector", selector, selector == "top" or k is not None, "top where k is null")
        self.strength, self.k, self.selector = strength, k, selector
        self.needs_whole = k is not None
        self.seed = Seed(seed, "anchor.seed")
        self._phases = 0  # SFT phases so far: random directions depend on it
        self._start: dict[str, Tensor] = {}  # W_0
        self._bases: dict[str, Bases | None] = {}  # None: the whole weight

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be decomposed; inside a phase, go on from where it began."""
        super().on_train_start(trainer, pl_module)
        params = dict(pl_module.named_parameters())
        self._start = {name: shard_like(weight, params[name]) for name, weight in self._start.items()}
        self._bases = dict(self._found())

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Note where SFT begins."""
        self._start, self._bases = {}, {}
        if current == "sft":
            self._phases += 1
            anchored = (one for one in self.trained(pl_module).items() if self.k is None or one[1].ndim == 2)
            self._start = {name: p.detach().clone() for name, p in anchored}
            self._bases = dict(self._found())

    def _found(self) -> Iterator[tuple[str, Bases | None]]:
        """The bases of each weight; they follow from W_0, the seed and the number of the phase."""
        for position, (name, weight) in enumerate(self._start.items()):
            if self.k is None or self.k >= min(weight.shape):
                yield name, None
                continue
            u, v = singular_directions(weight, self.k)
            if self.selector == "random":
                u, v = at_random(u, v, self.seed.value, self._phases, position)
            yield name, (u, v)

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty."""
        anchored: list[nn.Parameter] = []
        values = []
        for name, p in self.stepped(pl_module, optimizer):
            if p.grad is not None and name in self._start:
                value, gradient = penalty(local(p) - local(self._start[name]), self._bases[name])
                local(p.grad).add_(gradient, alpha=self.strength)
                anchored.append(p)
                values.append(value)
        if values and trainer.loggers:
            total = sum_over(torch.stack(values).sum(), shard_group(anchored))
            log_metrics(trainer, {"anchor/penalty": self.strength * float(total)})

    def state_dict(self) -> dict[str, Any]:
        """W_0, the seed and the number of the phase."""
        return super().state_dict() | {
            "number": self._phases,
            "seed": self.seed.settled,
            "start": full_on_first_rank(self._start),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self._phases = state_dict["number"]
        self.seed.restore(state_dict["seed"])
        self._start = dict(state_dict["start"])


def penalty(change: Tensor, bases: Bases | None) -> tuple[Tensor, Tensor]:
    """||U^T D V||_F^2, fp64, and its gradient 2 U (U^T D V) V^T; ||D||^2 and 2 D without bases.

    Args:
        change: D = W - W_0, fp32; [n, m] with bases.
        bases: Orthonormal U [n, k] and V [m, k].
    """
    if bases is None:
        return change.double().square().sum(), 2 * change
    u, v = bases
    core = u.T @ change @ v
    return core.double().square().sum(), 2 * (u @ core @ v.T)
