"""ImportanceEMA: a running map of how far every weight moves in one phase."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from mifo_callbacks.checks import require_choice
from mifo_callbacks.collectives import sum_over
from mifo_callbacks.contracts import PhaseOf
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.masking import INTEGERS, Converted, flat_chunks
from mifo_callbacks.ownership import claim, distinct, renew
from mifo_callbacks.phase import PhaseCallback
from mifo_callbacks.sharding import full_on_first_rank, local, require_visible_weights, shard_group, shard_like
from mifo_callbacks.thresholds import ceil_share, find_cuts

Movement = Literal["square", "abs"]
Accumulate = Literal["phase", "step"]
MapDtype = Literal["float32", "bfloat16"]
QUANTILES = (0.5, 0.9, 0.99)


class ImportanceEMA(PhaseCallback):
    """Average how far weights move in one phase: C = alpha * C + (1 - alpha) * g(Delta) (MIFO, importance).

    `importance` is the map by parameter name. The start of a phase is taken before its first optimizer step, so
    movement in other phases never counts. Beside the map there is at most one fp32 copy of the weights, and only
    during the measured phase.

    Args:
        alpha: Weight of the past in the moving average, in [0, 1); 0 keeps the last phase only (MIFO-dagger).
        movement: g, the size of a movement: "square" or "abs".
        accumulate: Delta is the net displacement of a "phase", or of every optimizer "step" of it.
        measure: Label of the phase whose movement is measured.
        phase: Batch key that holds the phase label, or callable(trainer, pl_module, batch) -> label.
        dtype: In which the map is kept, "float32" or "bfloat16", half the bytes: each update is computed in fp32 and
            rounded once, so that C is off by at most 2^-8 / (1 - alpha) of the largest that it was.

    Raises:
        MisconfigurationException: If an argument is outside what is allowed; when training starts, if a
            trainable weight is not fp32 (differences of bf16 weights are mostly exact zeros) or the strategy
            hides the weights.

    Example::

        importance = ImportanceEMA(alpha=0.5, measure="rl")
        Trainer(callbacks=[importance]).fit(module)  # batches are {"phase": "rl" or "sft", ...}
        importance.importance["layer.weight"]  # C of that parameter
    """

    def __init__(
        self,
        alpha: float = 0.5,
        movement: Movement = "square",
        accumulate: Accumulate = "phase",
        measure: str = "rl",
        phase: str | PhaseOf = "phase",
        dtype: MapDtype = "float32",
    ) -> None:
        super().__init__(phase, measure)
        if not 0 <= alpha < 1:
            raise MisconfigurationException(f"ImportanceEMA.alpha is {alpha}; allowed: at least 0 and below 1")
        require_choice("ImportanceEMA.movement", movement, Movement)
        require_choice("ImportanceEMA.accumulate", accumulate, Accumulate)
        require_choice("ImportanceEMA.dtype", dtype, MapDtype)
        self.alpha = alpha
        self.movement: Movement = movement
        self.accumulate: Accumulate = accumulate
        self.measure = measure
        self.dtype: MapDtype = dtype
        self.updates = 0
        self._map: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._unscored_said = False
        # accumulate "step": the optimizer that is about to step, and the weights whose movement is not counted yet
        self._stepping: Optimizer | None = None
        self._pending: list[str] = []

    @property
    def state_key(self) -> str:
        return distinct(self, self._generate_state_key(measure=self.measure))

    @property
    def importance(self) -> Mapping[str, Tensor] | None:
        """C by parameter name, fp32, sharded like the parameters; None before the first C.

        A map that is kept in bfloat16 is widened a parameter at a time, when it is asked for.
        """
        return (self._map if self.dtype == "float32" else Converted(self._map, Tensor.float)) or None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        params = self.trained(pl_module)
        require_fp32(params)
        require_visible_weights(trainer, pl_module, "ImportanceEMA")
        claim(self, pl_module)
        for stored in (self._map, self._start):
            if unknown := sorted(stored.keys() - params.keys()):
                raise MisconfigurationException(
                    f"the state of ImportanceEMA names {unknown[0]!r}, no trainable parameter of this module"
                )
            stored.update({name: shard_like(t, params[name]) for name, t in stored.items()})

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        if previous != self.measure:
            return
        if self.accumulate == "phase":
            self._update(pl_module, list(self._start))
        self._start.clear()
        self._stepping, self._pending = None, []
        self._warn_of_unscored(pl_module)
        if self._map and trainer.loggers:
            log_metrics(trainer, {"importance/updates": self.updates} | importance_metrics(self._map))

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        params = self.trained(pl_module)
        require_fp32(params)
        if self.accumulate == "phase":
            # Not at the phase change: there a later callback may still hold a copy of the weights.
            self._start |= {name: p.detach().clone() for name, p in params.items() if name not in self._start}
            return
        self._measure_step(pl_module)
        if self._stepping is optimizer:  # its closure is evaluated again, from where the step has got to
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._stepping, self._pending = optimizer, [name for name, p in params.items() if id(p) in stepped]
        for name in self._pending:
            if name in self._start:
                self._start[name].copy_(params[name].detach())
            else:
                self._start[name] = params[name].detach().clone()

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stepping = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._measure_step(pl_module)

    def _measure_step(self, pl_module: LightningModule) -> None:
        """Count the last step, now that a `GradientFreezing` has put back what it holds, wherever it stands."""
        if self._stepping is None and self._pending:
            self._update(pl_module, self._pending)
            self._pending = []

    def _warn_of_unscored(self, pl_module: LightningModule) -> None:
        """Say once that a trainable parameter has no score."""
        unscored = [name for name in self.trained(pl_module) if name not in self._map]
        if self._unscored_said or not unscored or not self._map:
            return
        self._unscored_said = True
        more = f" and {len(unscored) - 1} more" if len(unscored) > 1 else ""
        rank_zero_warn(
            f"ImportanceEMA: parameter {unscored[0]!r}{more} of this module can be trained but has no importance: no "
            f"optimizer stepped it in phase {self.measure!r}, and GradientFreezing leaves it free"
        )

    def _update(self, pl_module: LightningModule, names: list[str]) -> None:
        params = dict(pl_module.named_parameters())
        for name in names:
            known = self._map.get(name)
            update_importance(
                None if known is None else local(known),
                local(self._start[name]),
                local(params[name]),
                self.alpha,
                self.movement,
            )
            if known is None:
                self._map[name] = self._kept(self._start.pop(name))
        self.updates += bool(names)

    def _kept(self, scores: Tensor) -> Tensor:
        """`scores` in the dtype of the map."""
        return scores.to(getattr(torch, self.dtype))

    def state_dict(self) -> dict[str, Any]:
        start = self._start if self.accumulate == "phase" else {}
        return super().state_dict() | {
            "updates": self.updates,
            "importance": full_on_first_rank(self._map),
            "start": full_on_first_rank(start),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        renew(self)
        self.updates = state_dict["updates"]
        self._map = {name: self._kept(scores) for name, scores in state_dict["importance"].items()}
        self._start = dict(state_dict["start"])


def require_fp32(params: Mapping[str, Tensor]) -> None:
    """Raise unless all of `params` are fp32."""
    for name, p in params.items():
        if p.dtype != torch.float32:
            raise MisconfigurationException(
                f"ImportanceEMA cannot measure parameter {name!r} of {p.dtype}; allowed: torch.float32 "
                "(precision 32-true, bf16-mixed or 16-mixed)"
            )


def update_importance(
    importance: Tensor | None, start: Tensor, end: Tensor, alpha: float = 0.5, movement: Movement = "square"
) -> Tensor:
    """C = alpha * C + (1 - alpha) * g(end - start), or g(end - start) while `importance` is None.

    Args:
        importance: C so far, fp32 or bf16, changed in place; None for the first update.
        start: Weights before the movement, fp32; overwritten.
        end: Weights after it, fp32.
        alpha: Weight of the past, in [0, 1).
        movement: g, the size of a movement: "square" or "abs".

    Returns:
        The new C: `importance`, or `start` if that was None, so no memory is allocated.
    """
    known = () if importance is None else (importance,)
    for before, after, *scores in flat_chunks(start, end, *known):  # one pass over memory instead of three
        before.sub_(after)
        moved = before.square_() if movement == "square" else before.abs_()
        for c in scores:
            c.copy_(c.float().lerp_(moved, 1 - alpha))  # fp32 is changed in place; bf16 is rounded once
    return start if importance is None else importance


def importance_metrics(importance: Mapping[str, Tensor]) -> dict[str, float]:
    """Exact quantiles of C, fp32 or bf16, its mean and its share of zeros, over all parameters and shards."""
    group = shard_group(importance.values())
    parts = [local(t) for t in importance.values()]
    n = sum(t.numel() for t in importance.values())
    sums = [torch.stack([t.sum(dtype=torch.float32).double(), _zeros(t)]) for t in parts]
    total, zeros = sum_over(torch.stack(sums).sum(0), group).tolist()
    cuts = find_cuts(parts, [n + 1 - ceil_share(q, n) for q in QUANTILES], group)
    metrics = {f"importance/q{q}": cut.value for q, cut in zip(QUANTILES, cuts, strict=True)}
    return metrics | {"importance/mean": total / n, "importance/zero_share": zeros / n}


def _zeros(scores: Tensor) -> Tensor:
    """How many of `scores` are 0, fp64; as integers they are counted seven times as fast on a CPU."""
    return scores.numel() - scores.view(INTEGERS[scores.element_size()]).count_nonzero().double()
