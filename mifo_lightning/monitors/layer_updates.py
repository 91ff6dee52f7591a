"""How far each phase moves each part of the model."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from mifo_callbacks.collectives import sum_over
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.sharding import (
    full_on_first_rank,
    local,
    require_visible_weights,
    shard_group,
    shard_like,
    trainable,
)
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.monitors.phase_monitor import PhaseMonitor
from mifo_lightning.monitors.trained import as_trained
from mifo_lightning.policy.adapter import Adapters, adapters_of


class LayerUpdates(PhaseMonitor):
    """Measures what each phase changes: L2 norm of the net change and share of changed weights, by part of the model.

    Logs `layer_updates/<phase>/<part>/l2` and `.../changed` when a phase ends; parts are `embedding`, of every layer
    `layers.<n>.attention`, `.mlp` and `.norm`, the last `norm` and the `head` where it is not the embedding. Embedding
    and head are told apart into `.trained`, the rows of tokens that training prompts or demonstrations hold, and
    `.untrained`, where there are such rows. With `model.adapter` the weights are those beside which there is an
    adapter, as an export has them. Costs one fp32 copy of what is trained, also in checkpoints, and two passes over it
    per phase.
    """

    summary_key = "layer_updates"

    def __init__(self) -> None:
        super().__init__()
        self._start: dict[str, Tensor] = {}
        self._start_step = 0
        self._rows: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put a restored copy where its parameters are."""
        super().on_train_start(trainer, pl_module)
        require_visible_weights(trainer, pl_module, "LayerUpdates")
        params = trainable(pl_module)
        if self._start and self._start.keys() != params.keys():
            unlike = sorted(self._start.keys() ^ params.keys())[0]
            raise InputError(f"ckpt_path: weight {unlike!r} is trained by the checkpoint or by the model, not by both")
        self._start = {name: shard_like(t, params[name]) for name, t in self._start.items()}
        questions = getattr(trainer.train_dataloader, "questions", [])
        self._rows = rows_of(questions, pl_module) if questions and adapters_of(pl_module) is None else {}

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the weights, into the memory of the last copy."""
        self._start_step = trainer.global_step
        for name, p in trainable(pl_module).items():
            if name in self._start:
                self._start[name].copy_(p.detach())
            else:
                self._start[name] = p.detach().clone()

    def end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> dict[str, Any]:
        """Compare."""
        adapter = adapters_of(pl_module)
        if adapter is None:
            layers = layer_changes(self._start, trainable(pl_module), self._rows)
        else:
            layers = adapted_changes(adapter, self._start, dict(pl_module.named_parameters()))
        metrics = {f"layer_updates/{phase}/{part}/{name}": x for part, v in layers.items() for name, x in v.items()}
        log_metrics(trainer, metrics)
        return {"steps": trainer.global_step - self._start_step, "layers": layers}

    def own_state(self) -> dict[str, Any]:
        """The weights at the start of the running phase."""
        return {"start": full_on_first_rank(self._start), "start_step": self._start_step}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._start, self._start_step = dict(state["start"]), state["start_step"]


def rows_of(questions: Iterable[Question], pl_module: LightningModule) -> dict[str, Tensor]:
    """Which rows of embedding and head are those of tokens that `questions` hold, by the weight's name.

    Args:
        questions: Those of training: their prompts and demonstrations count.
        pl_module: Its `policy` holds the model.

    Returns:
        Bool [rows] of each trained weight that has a row a token, sharded or not its rows on this rank; empty if
        every token occurs.
    """
    model = as_trained(pl_module, "layer_updates").policy.model
    ids = set[int]().union(*(tokens for q in questions for tokens in (q.prompt, q.demonstration or ())))
    ends = [getattr(end, "weight", None) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
    found = {}
    for name, p in trainable(pl_module).items():
        if any(p is weight for weight in ends):
            shown = torch.zeros(len(p), dtype=torch.bool, device=p.device)
            shown[list(ids)] = True
            if not shown.all():
                found[name] = local(shard_like(shown[:, None].expand_as(p), p))[:, 0].clone()
    return found


def layer_changes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], rows: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, dict[str, float]]:
    """Of each part of the model `l2` (norm of the change) and `changed` (share of its weights that differ).

    Args:
        before: fp32 weights by name, sharded or not.
        after: The same weights later, sharded alike; collective then.
        rows: As `rows_of` tells: the part of these weights is told apart by them.
    """
    found, sums = [], []
    for name, old in before.items():
        part, was, now = layer_group(name), local(old), local(after[name])
        cuts = (
            {part: slice(None)}
            if name not in rows
            else {f"{part}.trained": rows[name], f"{part}.untrained": ~rows[name]}
        )
        for key, cut in cuts.items():
            found.append(key)
            sums.append(_squares_changes_and_size(was[cut], now[cut]))
    totals = sum_over(torch.stack(sums), shard_group(before.values())).tolist()
    return _by_part([(part, *values) for part, values in zip(found, totals, strict=True)])


def adapted_changes(
    adapter: Adapters, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """The same of the weights that adapters change, one layer at a time; collective if they are sharded.

    Args:
        adapter: Those of the module.
        before: What was trained, by its names in the module, as it was.
        after: All parameters of the module.
    """
    found = []
    for name, change in adapter.changes(before, after):
        old, new = adapter.merged(name, {**after, **before}), adapter.merged(name, after)
        found.append((layer_group(name), float(change.squares()), float((old != new).sum()), float(new.numel())))
    return _by_part(found)


def _by_part(found: Iterable[tuple[str, float, float, float]]) -> dict[str, dict[str, float]]:
    """Norms and shares of the parts from parts, squares, numbers of changed weights and of all."""
    totals: dict[str, list[float]] = {}
    for part, *values in found:
        total = totals.setdefault(part, [0.0, 0.0, 0.0])
        for i, value in enumerate(values):
            total[i] += value
    return {part: {"l2": squares**0.5, "changed": changed / n} for part, (squares, changed, n) in totals.items()}


def _squares_changes_and_size(before: Tensor, after: Tensor) -> Tensor:
    """[3] fp64: sum of the squared differences, number of weights that differ, number of weights."""
    squares, changed = (after - before).square().sum(dtype=torch.float64), (before != after).sum().double()
    return torch.stack([squares, changed, torch.full_like(changed, before.numel())])


def layer_group(name: str) -> str:
    """The part of the model that a parameter belongs to, by its Hugging Face name."""
    inside = re.search(r"\.(\d+)\.(\w+)", name)
    if inside is None:
        last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        return "norm" if _is_norm(last) else "head" if "head" in last or last == "embed_out" else "embedding"
    layer, module = inside.groups()
    attention = "attn" in module or "attention" in module
    return f"layers.{layer}.{'norm' if _is_norm(module) else 'attention' if attention else module}"


def _is_norm(module: str) -> bool:
    return "norm" in module or module.startswith("ln")
