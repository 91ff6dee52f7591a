"""Every optimizer step on a module's weights, whoever asks for it."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class StepListener:
    """Calls `before` and `after` around every step of a torch optimizer on a module's weights, until `close`.

    torch's hooks common to all optimizers are used, for the others miss steps: Lightning's `on_before_optimizer_step`
    those of `optimizers(use_pl_optimizer=False)`, hooks on `trainer.optimizers` those of optimizers that a module makes
    or swaps in later. It lives for one training batch, so that the steps with which torch fills an optimizer's
    state for a checkpoint are not heard.

    Args:
        module: Whose weights.
        before: Called with complete gradients before each step; several times where a closure is evaluated several
            times (LBFGS). Where Lightning makes the step it is called by `from_lightning`, ahead of clipping.
        after: Called after each step that was made, and whether Lightning made it and counts it.
    """

    def __init__(
        self, module: nn.Module, before: Callable[[Optimizer], None], after: Callable[[Optimizer, bool], None]
    ) -> None:
        self._before, self._after = before, after
        self._weights = {id(p) for p in module.parameters()}
        self._running: Optimizer | None = None  # the outermost: an optimizer may be made of others
        self._prepared: Optimizer | None = None
        self._handles = [register_optimizer_step_pre_hook(self._pre), register_optimizer_step_post_hook(self._post)]

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()

    def from_lightning(self, optimizer: Optimizer) -> None:
        """Lightning's `on_before_optimizer_step`: unscaled gradients, not clipped yet."""
        self._prepared = optimizer
        self._before(optimizer)

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._running is not None or not self._steps_weights(optimizer):
            return None
        self._running = optimizer
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:  # gradients are there
            if self._prepared is not optimizer:
                self._before(optimizer)
            return None

        def evaluate() -> Any:
            self._prepared = None
            loss = closure()
            if self._prepared is not optimizer:
                self._before(optimizer)
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": evaluate}
        return (args[0], evaluate, *args[2:]), kwargs

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running is not optimizer:
            return
        by_lightning = self._prepared is optimizer
        self._running = self._prepared = None
        self._after(optimizer, by_lightning)

    def _steps_weights(self, optimizer: Optimizer) -> bool:
        return any(id(p) in self._weights for group in optimizer.param_groups for p in group["params"])
