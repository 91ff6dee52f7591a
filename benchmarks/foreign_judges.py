"""What `benchmarks.foreign_modules` sees of a fit; each judge says what is wrong with a callback in it, or nothing."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks import foreign_zoo as zoo
from mifo_callbacks import (
    BufferPhaseSwitch,
    EntropyTokenSelection,
    GradientDropping,
    GradientFreezing,
    ImportanceEMA,
    dropping_mask,
)


@dataclass
class Case:
    """One row: a module, and how it is trained."""

    name: str
    module: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    others: Callable[[], list[Callback]] = list
    phase: Any = "phase"
    batches: Callable[[], zoo.Batches] = zoo.Batches
    wrap: Callable[[zoo.Batches], Any] = lambda loader: loader
    run: Callable[..., None] | None = None


@dataclass
class Step:
    """One optimizer step: its number in the fit, its phase, and gradients and weights of the parameters stepped."""

    number: int
    label: str
    gradients: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class Watch(Callback):
    """Weights and buffers before and after every batch, and every optimizer step."""

    def __init__(self, case: Case, freezing: Any) -> None:
        self.case, self.freezing = case, freezing
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.labels: list[str] = []
        self.masks: list[dict[str, Tensor]] = []
        self.steps: list[Step] = []
        self.names: list[set[str]] = []  # what was trainable at some batch start so far

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.number = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop._skip_backward:
            return
        trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        self.names.append(trained.union(*self.names[-1:]))
        phase = self.case.phase
        known = batch[1] if isinstance(batch, (tuple, list)) else batch
        self.labels.append(phase(trainer, pl_module, batch) if callable(phase) else known[phase])
        self.before.append(state(pl_module))

        running: list[Any] = []  # an optimizer may be made of others

        def starts(optimizer: Any, *args: Any) -> None:
            running.append((optimizer, owned(optimizer, pl_module)))

        def ends(optimizer: Any, *args: Any) -> None:
            _, before = running.pop()
            if not running:
                found = {n: full(p.grad) for n, p in pl_module.named_parameters() if n in before and p.grad is not None}
                self.steps.append(Step(self.number, self.labels[-1], found, before, owned(optimizer, pl_module)))
                self.number += 1

        self.handles = [register_optimizer_step_pre_hook(starts), register_optimizer_step_post_hook(ends)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.fit_loop._skip_backward:
            return
        for handle in self.handles:
            handle.remove()
        self.after.append(state(pl_module))
        masks = getattr(self.freezing, "masks", {})
        self.masks.append({name: mask.clone() for name, mask in masks.items()})

    def spans(self, label: str) -> list[range]:
        """Batches of every phase of this label."""
        changes = [i for i in range(1, len(self.labels)) if self.labels[i] != self.labels[i - 1]]
        found = itertools.pairwise([0, *changes, len(self.labels)])
        return [range(start, end) for start, end in found if self.labels[start] == label]


def full(tensor: Tensor) -> Tensor:
    """A copy; of all shards, dense."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return (tensor.to_dense() if tensor.layout != torch.strided else tensor).clone()


def owned(optimizer: Any, module: LightningModule) -> dict[str, Tensor]:
    """Copies of the parameters that `optimizer` steps, by name."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: full(p) for name, p in module.named_parameters() if id(p) in known}


def state(module: LightningModule) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name."""
    return {name: full(t) for name, t in [*module.named_parameters(), *module.named_buffers()]}


def judge_freezing(freezing: GradientFreezing, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """Frozen coordinates and buffers bit-identical in the phase, free ones moved, all free afterwards."""
    buffers = {name for name, _ in module.named_buffers()}
    for span in watch.spans("sft"):
        start, last = watch.before[span[0]], watch.after[span[-1]]
        if not watch.masks[span[0]]:
            return "nothing was frozen"
        for i in span:
            for name, mask in watch.masks[i].items():
                if not torch.equal(watch.after[i][name][mask], start[name][mask]):
                    return f"frozen coordinates of {name} moved in batch {i}"
            for name in buffers:
                if not torch.equal(watch.after[i][name], start[name]):
                    return f"buffer {name} moved in batch {i}"
        if not any((last[name] != start[name])[~mask].any() for name, mask in watch.masks[span[0]].items()):
            return "free coordinates did not move"
    return "masks outside of the phase" if any(watch.masks[i] for span in watch.spans("rl") for i in span) else ""


def judge_importance(importance: ImportanceEMA, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """The map is the formula's, from weights copied at the edges of phases, or around optimizer steps."""
    expected: dict[str, Tensor] = {}
    if importance.accumulate == "phase":
        edges = [(watch.names[s[-1]], watch.before[s[0]], watch.after[s[-1]]) for s in watch.spans("rl")]
    else:
        edges = [(set(step.before), step.before, step.after) for step in watch.steps if step.label == "rl"]
    for names, before, after in edges:
        for name in names:
            moved = (after[name] - before[name]).square()
            expected[name] = 0.5 * expected[name] + 0.5 * moved if name in expected else moved
    found = {name: full(value) for name, value in (importance.importance or {}).items()}
    if missing := watch.names[-1] - found.keys():
        return f"no score for {sorted(missing)[0]}"
    for name, value in found.items():
        if not torch.allclose(value, expected.get(name, torch.zeros(())), rtol=1e-5, atol=1e-12):
            return f"scores of {name} are not the formula's"
    return ""


def judge_dropping(dropping: GradientDropping, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """Each step's gradient is exactly 0 under the mask of its number and not all 0 elsewhere."""
    everything = [name for name, _ in module.named_parameters() if name in watch.names[-1]]
    steps = [step for step in watch.steps if step.label == "sft"]
    for step in steps:
        for name, gradient in step.gradients.items():
            if gradient.any() and name in everything:
                mask = dropping_mask(gradient.shape, 0.5, 0, step.number, everything.index(name))
                if gradient[mask].any():
                    return f"gradient of {name} is not dropped in step {step.number}"
    return "" if steps else "no step was seen"


def judge_tokens(selection: EntropyTokenSelection, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """The fifth with the highest entropy."""
    if not module.selected or not all(getattr(module, "could_select", [])):
        return "select_tokens was not there"
    for entropy, mask in module.selected:
        if set(entropy[mask].tolist()) != set(entropy.flatten().topk(entropy.numel() // 5).values.tolist()):
            return "not the tokens of highest entropy"
    return ""


def judge_buffer(switch: BufferPhaseSwitch, watch: Watch, module: Any, loader: zoo.Batches) -> str:
    """Every second question fails, and three of them are pushed together."""
    failed = list(dict.fromkeys(i % 16 for i in range(0, len(watch.labels), 2)))
    expected = [failed[i : i + 3] for i in range(0, len(failed) - 2, 3)]
    return "" if loader.pushed[: len(expected)] == expected else f"pushed {loader.pushed}"
