"""A foreign LightningModule, a stateful loader of phases, a recorder and a logger for the tests."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

torch.set_num_threads(1)


class Toy(LightningModule):
    """A small classifier under AdamW with weight decay, so that weights move without a gradient."""

    def __init__(self, lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.lr, self.weight_decay = lr, weight_decay

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class Phases:
    """A sized, stateful loader: one batch per entry of `schedule`, a function of its position alone.

    An entry is the label of a phase, `sft`, or label and number, `sft 1`.
    """

    def __init__(self, schedule: list[str], key: str = "phase") -> None:
        self.schedule, self.key = schedule, key
        self.position = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.position < len(self.schedule):
            draw = torch.Generator().manual_seed(self.position)
            label, _, number = self.schedule[self.position].partition(" ")
            self.position += 1
            yield {
                "x": torch.randn(8, 6, generator=draw),
                "y": torch.randint(3, (8,), generator=draw),
                self.key: label,
                **({"phase_number": int(number)} if number else {}),
            }

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Recorder(Callback):
    """Weights before the first and after every optimizer step, and what `look` returns after each."""

    def __init__(self, look: Any = None) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.looks: list[Any] = []
        self.look = look

    def _copy(self, module: LightningModule) -> None:
        self.weights.append({name: p.detach().clone() for name, p in module.named_parameters()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._copy(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._copy(pl_module)
        if self.look is not None:
            self.looks.append(self.look())


class Log(DummyLogger):
    """Keeps what is logged, by metric name, as a list of (step, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[tuple[int, float]]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.rows.setdefault(name, []).append((step, value))

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.rows[name]]


def fit(callbacks: list[Any], loader: Any, module: Any = None, **options: Any) -> Any:
    """One quiet CPU fit over the whole loader; `ckpt_path` and Trainer arguments go into `options`."""
    module = module or Toy()
    ckpt_path = options.pop("ckpt_path", None)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(callbacks=callbacks, **(settings | options)).fit(module, loader, ckpt_path=ckpt_path)
    return module
