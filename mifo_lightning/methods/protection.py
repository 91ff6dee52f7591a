"""What the protections of whole weights share: their checks, and the weights before and after an optimizer step."""

from collections.abc import Iterator
from typing import ClassVar

from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mifo_callbacks.gradient_freezing import GradientFreezing
from mifo_callbacks.phase import PhaseCallback
from mifo_callbacks.sharding import require_visible_weights
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.adapter import adapters_of


def refuse_freezing(trainer: Trainer, group: str) -> None:
    """Raise an InputError beside `freeze`: after a step each would move what the other one holds."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(one, GradientFreezing) and one.rule is not None and one.during == "sft" for one in callbacks):
        raise InputError(f"{group}: is not allowed with freeze, which holds weights that it moves; take one of them")


class Protection(PhaseCallback):
    """Base of the parts that act on all trained weights in SFT phases.

    Raises:
        InputError: When training starts, if the module trains adapters, or its weights are sharded and `needs_whole`.
    """

    group: ClassVar[str]  # of the configuration
    needs_whole: bool = False  # whether it decomposes matrices, of which each rank then needs all

    def __init__(self) -> None:
        super().__init__(acts_on="sft")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse weights that it cannot see as they are."""
        super().on_train_start(trainer, pl_module)
        require_visible_weights(trainer, pl_module, self.group)
        if adapters_of(pl_module) is not None:
            raise InputError(f"{self.group}: is not allowed with model.adapter; take freeze or directions")
        if self.needs_whole and any(isinstance(p, DTensor) for p in pl_module.parameters()):
            raise InputError(f"{self.group}: is not allowed with sharded weights; take DDP, or freeze")

    def stepped(self, pl_module: LightningModule, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained weights that `optimizer` steps, by name."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return ((name, p) for name, p in self.trained(pl_module).items() if id(p) in own)


class AroundSteps(Protection):
    """Base of those that change what an optimizer step did; costs one copy of the weights during the step."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Tensor] = {}

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Forget a step that was skipped."""
        self._before = {}

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Copy the weights, once a step: a closure that is evaluated again finds them where the step has got to."""
        for name, p in self.stepped(pl_module, optimizer):
            if name not in self._before:
                self._before[name] = p.detach().clone()

    def moves(self, pl_module: LightningModule, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Name, weight and its value before the step, of each weight that the step moved; once a step."""
        for name, p in self.stepped(pl_module, optimizer):
            if name in self._before:
                yield name, p, self._before.pop(name)

    def release(self) -> None:
        """Let go of the copies."""
        super().release()
        self._before = {}
