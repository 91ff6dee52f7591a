"""Whether SFT pulls at the weights that RL moved: agreement of two rankings, by part of the model, matrix and head."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from mifo_callbacks.contracts import Importance, map_of
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.sharding import full, shard_like, usable
from mifo_lightning.monitors.layer_updates import layer_group
from mifo_lightning.monitors.phase_monitor import PhaseMonitor

# projections of one row or column a head's dimension, by the end of their names: dimension, and whose heads
HEADS = {
    "q_proj": (0, "num_attention_heads"),
    "k_proj": (0, "num_key_value_heads"),
    "v_proj": (0, "num_key_value_heads"),
    "o_proj": (1, "num_attention_heads"),
}


class RankAgreement(PhaseMonitor):
    """Measures, at the first optimizer step of an SFT phase, how alike RL's importance and SFT's gradient rank weights.

    Spearman's rho of C and |g| over the coordinates of a weight: 0 where they know nothing of each other, 1 where SFT
    would move what RL moved. Logs `agreement/<part>`, the mean over the matrices of a part of the model, weighted by
    their sizes; the record has each matrix and, of query, key, value and output projections, each head. Records nothing
    without a callback that has importance. Costs two sorts of the weights an SFT phase.
    """

    summary_key = "agreement"

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[str, Any] | None = None  # of the running phase

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last phase."""
        self._found = None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the first step's gradient, before anything masks it."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        sources = [c for c in callbacks if isinstance(c, Importance) and c.importance]
        if self._current != "sft" or self._found is not None or not sources or not usable(pl_module.parameters()):
            return
        with self.timed():
            known, config = map_of(sources[0], pl_module), getattr(_model(pl_module), "config", None)
            matrices: dict[str, float] = {}
            heads: dict[str, list[float]] = {}
            sizes: dict[str, int] = {}
            for name, p in pl_module.named_parameters():
                if name in known and p.grad is not None and p.ndim == 2:
                    importance, gradient = full(shard_like(known[name], p)), full(p.grad).abs()
                    matrices[name], sizes[name] = spearman(importance, gradient), p.numel()
                    if dim_and_count := _heads(name, config):
                        heads[name] = by_head(importance, gradient, *dim_and_count)
            self._found = {"parts": _parts(matrices, sizes), "matrices": matrices, "heads": heads}

    def end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> dict[str, Any] | None:
        """Log the parts."""
        if self._found is not None:
            log_metrics(trainer, {f"agreement/{part}": rho for part, rho in self._found["parts"].items()})
        return self._found

    def own_state(self) -> dict[str, Any]:
        """What the running phase has found."""
        return {"found": self._found}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._found = state["found"]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two tensors of one shape, tied values at their mean rank; 0 where one of them is constant."""
    centred = [ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b))]
    norms = centred[0].norm() * centred[1].norm()
    return float((centred[0] @ centred[1]) / norms) if norms > 0 else 0.0


def by_head(a: Tensor, b: Tensor, dim: int, count: int) -> list[float]:
    """`spearman` of each head: `count` equal slices of two matrices along `dim`."""
    return [spearman(x, y) for x, y in zip(a.chunk(count, dim), b.chunk(count, dim), strict=True)]


def _ranks(values: Tensor) -> Tensor:
    """Flat fp64 ranks from 0, of tied values their mean."""
    flat = values.reshape(-1)
    ordered = flat.sort().values
    below, upto = (torch.searchsorted(ordered, flat, right=right) for right in (False, True))
    return (below + upto - 1).double() / 2


def _parts(matrices: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for name, rho in matrices.items():
        total = sums.setdefault(layer_group(name), [0.0, 0.0])
        total[0] += rho * sizes[name]
        total[1] += sizes[name]
    return {part: weighted / size for part, (weighted, size) in sums.items()}


def _heads(name: str, config: Any) -> tuple[int, int] | None:
    """Along which dimension a projection's heads lie, and how many; None for what has no heads or hides them."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    if last not in HEADS or getattr(config, HEADS[last][1], None) is None:
        return None
    dim, key = HEADS[last]
    return dim, getattr(config, key)


def _model(pl_module: LightningModule) -> Any:
    return getattr(getattr(pl_module, "policy", None), "model", None)
