"""One callback in your own project.

`mifo-callbacks` needs torch and lightning only, and knows nothing of language models. Here a small classifier learns
task A, then task B, and forgets A. `ImportanceEMA` measures which weights A moves, `GradientFreezing` holds the half
that moved most still while B is learned. The module and its training step stay as they are.
"""

# %% A classifier, two tasks
# Each task is a random teacher network; two inputs say which task a row belongs to. Nothing here is special to the
# callbacks but the key `phase` of a batch, which names the task.

import logging
from collections.abc import Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mifo_callbacks import GradientFreezing, ImportanceEMA

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

FEATURES, CLASSES = 32, 8


class Task:
    """Rows [n, FEATURES + 2] with labels [n]."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.draw = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(FEATURES, 64, generator=self.draw) / FEATURES**0.5
        self.out = torch.randn(64, CLASSES, generator=self.draw)
        self.test = self.rows(2048)

    def rows(self, n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, FEATURES, generator=self.draw)
        which = torch.tensor([float(self.name == "a"), float(self.name == "b")]).expand(n, 2)
        return torch.cat([x, which], 1), ((x @ self.hidden).tanh() @ self.out).argmax(1)


class InTurn:
    """300 batches of task A, then 150 of task B."""

    def __init__(self, a: Task, b: Task) -> None:
        self.plan = [a] * 300 + [b] * 150

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[dict]:
        for task in self.plan:
            x, y = task.rows(128)
            yield {"phase": task.name, "x": x, "y": y}


class Classifier(LightningModule):
    """Knows nothing of phases."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES + 2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES)
        )

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    @torch.no_grad()
    def accuracy(self, task: Task) -> float:
        x, y = task.test
        return (self.net(x).argmax(1) == y).float().mean().item()


def fit(*callbacks: Callback) -> tuple[Classifier, Task, Task]:
    """The same start, the same data, other callbacks."""
    torch.manual_seed(0)
    a, b = Task("a", 1), Task("b", 2)
    classifier = Classifier()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, InTurn(a, b))
    return classifier, a, b


# %% Without and with the callbacks
# `measure="a"` and `during="b"` are labels of phases: what stands in `batch["phase"]`. A project whose batches have
# no such key gives `phase=callable(trainer, pl_module, batch)` instead. `ImportanceEMA` stands first, so that its map
# is complete when the mask is drawn; the other order is refused in one line. `Watch` only looks: it keeps the weights
# with which task B begins.


class Watch(Callback):
    """Keeps a copy of the weights from before the first step on task B."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch["phase"] == "b" and not self.weights:
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


plain, a, b = fit()
watch, importance = Watch(), ImportanceEMA(measure="a")
frozen, *_ = fit(importance, GradientFreezing(fraction=0.5, during="b"), watch)

print(f"{'accuracy on':<12}{'A':>8}{'B':>8}")
print(f"{'plain':<12}{plain.accuracy(a):>8.3f}{plain.accuracy(b):>8.3f}")
print(f"{'half frozen':<12}{frozen.accuracy(a):>8.3f}{frozen.accuracy(b):>8.3f}")

# %% What the callbacks did
# The map has a number for every weight: how far task A moved it, squared. In each tensor, the half of the weights
# with the largest numbers is bit for bit where task A left it. A zero gradient would not do that: AdamW's momentum
# goes on moving a weight, so the callback puts frozen weights back after each step.

moved = importance.importance
assert moved is not None
print("map:", {name: tuple(values.shape) for name, values in moved.items()})
for name, p in frozen.named_parameters():
    still = p == watch.weights[name]
    print(
        f"{name:<14}{still.float().mean():>6.1%} stand still; they moved {moved[name][still].mean():.1e} in A, ", end=""
    )
    print(f"the others {moved[name][~still].mean():.1e}")

# %% Is it the choice of weights?
# Less forgetting alone does not show that importance chose well: freezing half of *anything* slows training down. So
# compare with a random half and with a smaller learning rate before you credit the map. [A study with these
# controls](../results/reuse_freezing.md) found on tasks like these that a random half and half the learning rate do
# as well: the gain came from moving less.
