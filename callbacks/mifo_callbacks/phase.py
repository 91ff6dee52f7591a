"""How a callback learns which phase a batch belongs to, and when the phase changes."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mifo_callbacks.logging import profiled

PhaseOf = Callable[[Trainer, LightningModule, Any], str]
NUMBER = "phase_number"  # optional key of a batch: tells two phases of one label in a row apart


class PhaseCallback(Callback):
    """Base of the callbacks that act on phases: finds the phase of each batch and reports every change.

    A phase is its label and, where batches have one, the integer `batch["phase_number"]`: two phases of one
    label in a row differ in it; without it the label alone counts. A change is seen at the first batch of the
    new phase, before its `training_step`; the state names the phase, so a run resumed inside a phase sees no
    change. Subclasses also get the hook Lightning lacks, `on_after_optimizer_step`.
    """

    def __init__(self, phase: str | PhaseOf = "phase") -> None:
        super().__init__()
        self.phase = phase
        self._current: str | None = None
        self._number: int | None = None
        self._hooks: list[tuple[Optimizer, RemovableHandle]] = []

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Called at the first batch of phase `current`; `previous` is None at the first batch of a run.

        Both are labels, and equal where two phases of one label follow each other.
        """

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called after `optimizer` changed the weights, once it has been given to `call_after_step`."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        current, number = phase_of(self.phase, trainer, pl_module, batch), phase_number(batch)
        if current == self._current and not other_number(self._number, number):
            self._number = number
            return
        if self._current is not None and batch_idx % trainer.accumulate_grad_batches:
            raise MisconfigurationException(
                f"the phase changed from {_named(self._current, self._number)} to {_named(current, number)} at batch "
                f"{batch_idx}, inside one optimizer step of accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches}; allowed: between optimizer steps"
            )
        previous, self._current, self._number = self._current, current, number
        self.on_phase_change(trainer, pl_module, previous, current)

    def call_after_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Have `on_after_optimizer_step` called after every step of `optimizer` until the fit ends.

        Call it in `on_before_optimizer_step`: torch looks the hooks up after the step, so the running step
        counts, and an optimizer that a module swaps in between is caught like those of
        `configure_optimizers`.
        """
        if any(known is optimizer for known, _ in self._hooks):
            return

        def hook(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with profiled(trainer, self, "on_after_optimizer_step"):
                self.on_after_optimizer_step(trainer, pl_module, stepped)

        self._hooks.append((optimizer, optimizer.register_step_post_hook(hook)))

    def release(self) -> None:
        """Remove the optimizer hooks; runs when a fit ends, in whatever way."""
        for _, handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.release()

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self._current, NUMBER: self._number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._current, self._number = state_dict["phase"], state_dict.get(NUMBER)


def phase_of(phase: str | PhaseOf, trainer: Trainer, pl_module: LightningModule, batch: Any) -> str:
    """The label of the phase that `batch` belongs to: `batch[phase]`, or what the callable `phase` returns.

    Raises:
        MisconfigurationException: If the batch has no such key or the label is not a string.
    """
    if callable(phase):
        label = phase(trainer, pl_module, batch)
    elif isinstance(batch, Mapping) and phase in batch:
        label = batch[phase]
    else:
        has = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"type {type(batch).__name__}"
        raise MisconfigurationException(
            f"the batch ({has}) has no key {phase!r}; allowed: a batch with that key, another key, or "
            "phase=callable(trainer, pl_module, batch) -> str"
        )
    if not isinstance(label, str):
        raise MisconfigurationException(f"the phase {phase!r} of the batch is {label!r}; allowed: a string")
    return label


def phase_number(batch: Any) -> int | None:
    """The number of the phase that `batch` belongs to, `batch["phase_number"]`; None where it has no such key.

    Raises:
        MisconfigurationException: If the number is not an int.
    """
    number = batch.get(NUMBER) if isinstance(batch, Mapping) else None
    if number is not None and not isinstance(number, int):
        raise MisconfigurationException(f"batch[{NUMBER!r}] is {number!r}; allowed: an int, or no such key")
    return number


def other_number(before: int | None, now: int | None) -> bool:
    """Whether two numbers of phases tell these apart; one that is not known tells nothing."""
    return before is not None and now is not None and before != now


def _named(label: str, number: int | None) -> str:
    return repr(label) if number is None else f"{label!r} number {number}"
