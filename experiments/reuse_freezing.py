"""Question: do ImportanceEMA and GradientFreezing reduce forgetting in a project without language models?

A small network for tabular data learns task A, then task B; each task is a random teacher network, and two
inputs say which task a row belongs to. The arms differ only while B is learned: nothing added; the half of the
coordinates that moved most during A frozen; and the controls: a random half, the half that moved least,
half the learning rate. Without the controls a smaller change would pass for a better one. Needs torch, lightning
and mifo-callbacks only:

    python -m experiments.reuse_freezing
"""

import argparse
import logging
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mifo_callbacks import GradientFreezing, ImportanceEMA

FEATURES, HIDDEN, CLASSES, BATCH = 32, 128, 8, 128
STEPS = {"a": 400, "b": 200}
LR, WEIGHT_DECAY = 1e-3, 0.01
# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)

Batch = tuple[Tensor, Tensor, str]


class Task:
    """Rows [n, FEATURES + 2] with labels [n] from a random teacher network that belongs to (name, seed)."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.draw = torch.Generator().manual_seed(1000 * seed + ord(name))
        self.hidden = torch.randn(FEATURES, 64, generator=self.draw) / math.sqrt(FEATURES)
        self.out = torch.randn(64, CLASSES, generator=self.draw)
        self.test = self.rows(4096)

    def rows(self, n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, FEATURES, generator=self.draw)
        which = torch.tensor([[1.0, 0.0] if self.name == "a" else [0.0, 1.0]]).expand(n, 2)
        return torch.cat([x, which], 1), ((x @ self.hidden).tanh() @ self.out).argmax(1)


class InTurn:
    """Every step of task A, then every step of task B."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return sum(STEPS.values())

    def __iter__(self) -> Iterator[Batch]:
        for task in self.tasks:
            for _ in range(STEPS[task.name]):
                yield (*task.rows(BATCH), task.name)


class Student(LightningModule):
    """A classifier under one AdamW whose moments are warm when task B begins."""

    def __init__(self, task_a: Task, lr_b: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES + 2, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, CLASSES),
        )
        self.task_a, self.lr_b = task_a, lr_b
        self.learned_a: float | None = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch[2] == "b" and self.learned_a is None:
            self.learned_a = self.accuracy(self.task_a)
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = self.lr_b

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    @torch.no_grad()
    def accuracy(self, task: Task) -> float:
        x, y = task.test
        return (self.net(x).argmax(1) == y).float().mean().item()


def task_of(trainer: Trainer, module: LightningModule, batch: Any) -> str:
    """The phase of a batch, for modules without a batch key."""
    return batch[2]


def freeze(selector: Any) -> list[Callback]:
    return [
        ImportanceEMA(measure="a", phase=task_of),
        GradientFreezing(fraction=0.5, selector=selector, during="b", phase=task_of),
    ]


ARMS = {
    "none": lambda: ([], LR),
    "freeze what moved most": lambda: (freeze("rl_topk"), LR),
    "control: freeze at random": lambda: (freeze("random"), LR),
    "control: freeze what moved least": lambda: (freeze("rl_bottomk"), LR),
    "control: half learning rate": lambda: ([], LR / 2),
}


def run(arm: str, seed: int) -> tuple[float, float, float]:
    """Accuracy on A before B, forgetting of A, and accuracy on B, of one fit."""
    torch.manual_seed(seed)
    callbacks, lr_b = ARMS[arm]()
    tasks = [Task("a", seed), Task("b", seed)]
    student = Student(tasks[0], lr_b)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(student, InTurn(tasks))
    assert student.learned_a is not None
    return student.learned_a, student.learned_a - student.accuracy(tasks[0]), student.accuracy(tasks[1])


def interval(values: list[float]) -> str:
    """Mean and 95% t-interval over the seeds."""
    mean = statistics.mean(values)
    half = T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def report(runs: dict[str, list[tuple[float, float, float]]]) -> None:
    header = ("arm", "forgetting of A", "accuracy on B", "forgetting - none (paired)", "accuracy on B - none")
    print(("{:<34}" + "{:<27}" * 4).format(*header))
    baseline = runs["none"]
    for arm, rows in runs.items():
        cells = [interval([row[i] for row in rows]) for i in (1, 2)]
        if arm != "none":
            cells += [interval([r[i] - b[i] for r, b in zip(rows, baseline, strict=True)]) for i in (1, 2)]
        print(f"{arm:<34}" + "".join(f"{cell:<27}" for cell in cells))
    chosen = runs["freeze what moved most"]
    print("\nDoes it matter which half is frozen? Forgetting, frozen by importance minus control (paired):")
    for arm in list(runs)[2:]:
        print(f"  {arm:<34}{interval([r[1] - c[1] for r, c in zip(chosen, runs[arm], strict=True)])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, choices=range(2, 13), metavar="2..12", help="default 8")
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    began = time.perf_counter()
    runs = {arm: [run(arm, seed) for seed in range(seeds)] for arm in ARMS}
    learned = interval([row[0] for row in runs["none"]])
    print(f"{seeds} seeds, {time.perf_counter() - began:.0f} s. Mean [95% interval over seeds].")
    print(f"Accuracy on A before B begins: {learned} in every arm; chance is {1 / CLASSES:.3f}.\n")
    report(runs)


if __name__ == "__main__":
    main()
