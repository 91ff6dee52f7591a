"""LightningModules that step their optimizers themselves: the second half of `benchmarks.foreign_zoo`."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.foreign_zoo import F, Foreign


class Manual(Foreign):
    """Two optimizer steps a batch."""

    raw = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def learn(self, batch: dict[str, Any]) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=not self.raw)
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


class Raw(Manual):
    raw = True


class RawLBFGS(Raw):
    def learn(self, batch: dict[str, Any]) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class TwoPlayers(Manual):
    """Lightning's recipe for a GAN: each optimizer toggled on in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Linear(6, 3)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (self.net, self.critic)]

    def learn(self, batch: dict[str, Any]) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.loss(batch) + F.cross_entropy(self.critic(batch["x"]), batch["y"]))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


class HandToggled(TwoPlayers):
    """The critic is left switched off at the end of each batch, and its weights are clamped."""

    def learn(self, batch: dict[str, Any]) -> None:
        for part, optimizer in zip((self.critic, self.net), self.optimizers()[::-1], strict=True):  # type: ignore[index]
            self.critic.requires_grad_(part is self.critic)
            optimizer.zero_grad()
            out = F.cross_entropy(self.critic(batch["x"]), batch["y"]) if part is self.critic else self.loss(batch)
            self.manual_backward(out)
            optimizer.step()
        for p in self.critic.parameters():
            p.data.clamp_(-0.5, 0.5)


class OwnOptimizer(Manual):
    """An optimizer the trainer never hears of."""

    def configure_optimizers(self) -> Any:
        return None

    def learn(self, batch: dict[str, Any]) -> None:
        if not hasattr(self, "own"):
            self.own = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        self.own.zero_grad()
        self.loss(batch).backward()
        self.own.step()


class ByHand(Manual):
    """No optimizer at all: p -= lr * p.grad."""

    def learn(self, batch: dict[str, Any]) -> None:
        self.zero_grad()
        self.loss(batch).backward()
        with torch.no_grad():
            for p in self.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)
