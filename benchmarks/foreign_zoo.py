"""LightningModules as others write them, small: what `benchmarks.foreign_modules` runs every callback in."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

PHASES = (["rl"] * 4 + ["sft"] * 4) * 2
F = nn.functional


class Batches:
    """A sized loader, each batch a function of its position: features, labels, entropies, rollout groups, phase."""

    def __init__(self, phases: list[str] = PHASES) -> None:
        self.phases, self.position, self.pushed = phases, 0, list[list[int]]()

    def __len__(self) -> int:
        return len(self.phases)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.position %= len(self.phases)
        while self.position < len(self.phases):
            i, draw = self.position, torch.Generator().manual_seed(self.position)
            self.position += 1
            yield {
                "phase": self.phases[i],
                "x": torch.randn(8, 6, generator=draw),
                "y": torch.randint(3, (8,), generator=draw),
                "entropy": torch.rand(4, 5, generator=draw),
                "groups": [{"id": i, "n_correct": i % 2 * 8, "size": 8, "has_demonstration": True}],
            }

    def push(self, entries: list[dict[str, Any]]) -> None:
        self.pushed.append([entry["id"] for entry in entries])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Foreign(LightningModule):
    """AdamW with decay, which moves a weight without a gradient; subclasses change one thing."""

    select_tokens: Any  # where EntropyTokenSelection puts it

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: Any = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.selected: list[tuple[Tensor, Tensor]] = []  # entropies, and what was selected

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def learn(self, batch: dict[str, Any]) -> Tensor | None:
        return self.loss(batch)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if batch["phase"] == "sft" and hasattr(self, "select_tokens"):
            entropy = batch["entropy"].float()
            self.selected.append((entropy, self.select_tokens(entropy, entropy > -1).mask))
        loss = self.learn(batch)
        return ({} if loss is None else {"loss": loss}) | {"groups": batch["groups"]}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Convolution(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)
        )


class Experts(Foreign):
    """Top-1 routing: an expert that no token chose has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 3) for _ in range(4))

    def loss(self, batch: dict[str, Any]) -> Tensor:
        gate = self.router(batch["x"]).softmax(-1)
        chosen = gate.argmax(-1)
        logits = batch["x"].new_zeros(len(chosen), 3)
        for i in chosen.unique().tolist():
            rows = chosen == i
            logits[rows] = self.experts[i](batch["x"][rows]).to(logits.dtype) * gate[rows, i, None].to(logits.dtype)
        return F.cross_entropy(logits, batch["y"])


class Adapters(Foreign):
    """Low-rank adapters on weights that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(2, 3))

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]) + batch["x"] @ self.down @ self.up, batch["y"])


class Compiled(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Tied(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
        self.net[2].weight = self.net[0].weight


class Groups(Foreign):
    def configure_optimizers(self) -> Any:
        first, *rest = self.parameters()
        groups: list[dict[str, Any]] = [{"params": [first], "lr": 1e-1, "weight_decay": 0.0}, {"params": rest}]
        return torch.optim.AdamW(groups, lr=1e-3)


class PartlyFrozen(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class LBFGS(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class Momentum(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)


class Adafactor(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters(), lr=1e-2, weight_decay=0.1)


class MuonAndAdam(torch.optim.Optimizer):
    """One optimizer made of two: Muon for matrices, AdamW for the rest."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params, {})
        matrices, rest = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
        self.parts = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1)]

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


class Muon(Foreign):
    def configure_optimizers(self) -> Any:
        return MuonAndAdam(self.parameters())


class Configured(Foreign):
    """Layers that exist only from `configure_model` on; sharded under FSDP2."""

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.head = nn.Linear(3, 3)
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None and mesh["data_parallel"].size() > 1:
            for part in (self.net, self.head):
                fully_shard(part, mesh=mesh["data_parallel"])

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self.head(self.net(batch["x"])), batch["y"])


class AddedLate(Foreign):
    def on_fit_start(self) -> None:
        self.late = nn.Linear(3, 3)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self.late(self.net(batch["x"])), batch["y"])


class Recreated(Foreign):
    """A new optimizer at each change of phase, unknown to the trainer's list until then."""

    last = ""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch["phase"] != self.last:
            self.last = batch["phase"]
            self.trainer.strategy.optimizers = [self.configure_optimizers()]


class SparseEmbedding(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 3, sparse=True)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]) + self.table(batch["y"]), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tuples(Foreign):
    """Batches are tuples, as a DataLoader of a TensorDataset gives them."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return super().training_step(batch[1], batch_idx)


class Combined(Foreign):
    """Batches of a CombinedLoader."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return super().training_step(batch["a"], batch_idx)


class Validates(Foreign):
    """Validation, before training too, chooses tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.could_select: list[bool] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.could_select.append(hasattr(self, "select_tokens"))
        if self.could_select[-1]:
            self.select_tokens(batch["entropy"], batch["entropy"] > -1)
