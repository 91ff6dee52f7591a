"""Modules as others write them: they toggle, hide or lack optimizers, or keep running statistics."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from toy import Toy

ADAM = {"lr": 1e-2, "weight_decay": 0.1}


class Manual(Toy):
    """`learn` steps the optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.learn(lambda: super(Manual, self).training_step(batch, batch_idx))

    def learn(self, loss: Callable[[], Tensor]) -> None:
        raise NotImplementedError


class Toggles(Manual):
    """Lightning's recipe for two optimizers; `idle` of them are not stepped."""

    idle: tuple[int, ...] = ()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net[i].parameters(), **ADAM) for i in (0, 2)]

    def learn(self, loss: Callable[[], Tensor]) -> None:
        for i, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
            if i not in self.idle:
                self.toggle_optimizer(optimizer)
                self.manual_backward(loss())
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)


class Raw(Manual):
    """Two steps a batch of torch's own optimizer, or, with `own`, of one that the Trainer does not know."""

    own = False

    def configure_optimizers(self) -> Any:
        self.mine = torch.optim.AdamW(self.parameters(), **ADAM)
        return None if self.own else self.mine

    def learn(self, loss: Callable[[], Tensor]) -> None:
        optimizer: Any = self.mine if self.own else self.optimizers(use_pl_optimizer=False)
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()


class Own(Raw):
    own = True


class RawLBFGS(Manual):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    def learn(self, loss: Callable[[], Tensor]) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            self.manual_backward(value)
            return value

        optimizer.step(closure)


class LBFGS(Toy):
    configure_optimizers = RawLBFGS.configure_optimizers


class ByHand(Manual):
    def configure_optimizers(self) -> None:
        return None

    def learn(self, loss: Callable[[], Tensor]) -> None:
        self.zero_grad()
        loss().backward()
        for p in self.parameters():
            p.data -= 0.1 * p.grad


class Normed(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
