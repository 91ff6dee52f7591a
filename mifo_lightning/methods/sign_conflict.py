"""SignConflict: SFT may move a weight on in the direction in which RL moved it, and not back."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from mifo_callbacks.collectives import sum_over
from mifo_callbacks.freezing_rules import Scope, frozen_blocks
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.seeds import Seed
from mifo_callbacks.sharding import full_on_first_rank, local, shard_group, shard_like
from mifo_callbacks.thresholds import random_scores
from mifo_lightning.common.errors import require
from mifo_lightning.methods.protection import AroundSteps

Signs = Literal["rl", "random"]
SIGNS = 0x7369676E  # "sign": other random numbers than freezing draws from the same seed


class SignConflict(AroundSteps):
    """Block, of the coordinates that the last RL phase moved most, every SFT step that goes against RL's sign.

    D is RL's net displacement; watched is the share `fraction` of coordinates of largest |D|. After each SFT optimizer
    step a watched coordinate that moved with the opposite sign of D is put back to the bit; one that moved on, or is
    not watched, keeps its step. What moved is compared, not the gradient: AdamW's momentum and weight decay can
    turn a step against its gradient. Gradients and moments are those of plain SFT. Costs a copy of the weights
    during the step and in RL phases, and a byte a weight between.

    Args:
        fraction: Share of the coordinates that are watched, in (0, 1].
        scope: Rank |D| within each "tensor", or over all together ("global").
        signs: Those of D, or as many at random, anew after each RL phase: a control that blocks without a reason.
        seed: Seed of random signs; null follows `seed_everything`.

    Raises:
        InputError: If a setting is not allowed; when training starts, with adapters.
    """

    group = "conflict"

    def __init__(
        self, fraction: float = 0.5, scope: Scope = "tensor", signs: Signs = "rl", seed: int | None = None
    ) -> None:
        super().__init__()
        require("conflict.fraction", fraction, 0 < fraction <= 1, "above 0 and at most 1")
        require("conflict.scope", scope, scope in ("tensor", "global"), "tensor or global")
        require("conflict.signs", signs, signs in ("rl", "random"), "rl or random")
        self.fraction, self.signs = fraction, signs
        self.scope: Scope = scope
        self.seed = Seed(seed, "conflict.seed")
        self._phases = 0  # RL phases so far: random signs depend on it
        self._start: dict[str, Tensor] = {}  # the weights when the RL phase under way began
        self._signs: dict[str, Tensor] = {}  # int8: -1 and 1 where watched, 0 elsewhere

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place what a checkpoint held."""
        super().on_train_start(trainer, pl_module)
        params = dict(pl_module.named_parameters())
        for held in (self._start, self._signs):
            held.update({name: shard_like(tensor, params[name]) for name, tensor in held.items()})

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Note where RL begins, and what it moved where it ends."""
        super().on_phase_change(trainer, pl_module, previous, current)
        if previous == "rl":
            self._phases += 1
            self._signs = self._watched(pl_module)
            self._start = {}
        if current == "rl":
            self._start = {name: p.detach().clone() for name, p in self.trained(pl_module).items()}
        elif not self._signs:
            rank_zero_warn("conflict: SFT begins before RL has moved anything: nothing is blocked")

    def _watched(self, pl_module: LightningModule) -> dict[str, Tensor]:
        params = self.trained(pl_module)
        moved = {name: params[name].detach() - start for name, start in self._start.items()}
        signs: dict[str, Tensor] = {}
        scores = ((name, change.abs()) for name, change in moved.items())
        for block in frozen_blocks(scores, self.fraction, self.scope, "largest"):
            for name, mask in block.masks.items():
                signs[name] = self._signs_of(moved[name], params[name], len(signs))
                local(signs[name]).mul_(mask)
        return signs

    def _signs_of(self, change: Tensor, p: nn.Parameter, position: int) -> Tensor:
        if self.signs == "rl":
            return change.sign().to(torch.int8)
        # on the full shape and the CPU: the same on every rank and device; what RL did not move is watched by neither
        drawn = random_scores(p.shape, self.seed.value, self._phases, position, SIGNS)
        return shard_like(torch.where(drawn < 0.5, -1, 1).to(torch.int8), p) * change.sign().abs().to(torch.int8)

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Put back what went against the signs."""
        counts: dict[str, Tensor] = {}
        for name, p, before in self.moves(pl_module, optimizer):
            if name in self._signs:
                counts[name] = undo_conflicts_(local(p), local(before), local(self._signs[name]))
        if counts and trainer.loggers:
            log_metrics(trainer, {"conflict/blocked": self._share(counts)})

    def _share(self, counts: Mapping[str, Tensor]) -> float:
        """Share of all coordinates of the step, over all shards."""
        signs = [self._signs[name] for name in counts]
        blocked = sum_over(torch.stack([*counts.values()]).sum(), shard_group(signs))
        return int(blocked) / sum(s.numel() for s in signs)

    def state_dict(self) -> dict[str, Any]:
        """Signs, and the weights at the start of the RL phase under way."""
        return super().state_dict() | {
            "number": self._phases,
            "seed": self.seed.settled,
            "start": full_on_first_rank(self._start),
            "signs": full_on_first_rank(self._signs),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self._phases = state_dict["number"]
        self.seed.restore(state_dict["seed"])
        self._start, self._signs = dict(state_dict["start"]), dict(state_dict["signs"])


def undo_conflicts_(weight: Tensor, before: Tensor, signs: Tensor) -> Tensor:
    """Put `weight` back to `before`, bit by bit, where it moved against `signs`; how many did: int64, scalar.

    Args:
        weight: After the step, fp32, changed in place.
        before: Before it.
        signs: int8 of -1 and 1; 0 allows either direction.
    """
    against = (weight - before).sign() * signs < 0
    weight.copy_(torch.where(against, before, weight))
    return against.count_nonzero()
