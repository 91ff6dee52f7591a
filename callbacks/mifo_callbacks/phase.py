"""How a callback learns which phase a batch belongs to, and when the phase changes."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from mifo_callbacks.contracts import NUMBER, PhaseOf, phase_number, phase_of
from mifo_callbacks.logging import profiled
from mifo_callbacks.ownership import TrainerCallback
from mifo_callbacks.sharding import trainable
from mifo_callbacks.steps import StepListener


class PhaseCallback(TrainerCallback):
    """Base of the callbacks that act on phases: finds the phase of each batch and reports every change.

    A phase is its label and, where batches have one, the integer `batch["phase_number"]`: two phases of one
    label in a row differ in it; without it the label alone counts. A change is seen at the first batch of the
    new phase, before its `training_step`; the state names the phase, so a run resumed inside a phase sees no
    change. Subclasses that name the phase they act on also get two hooks around every step of a torch optimizer in it,
    `on_gradients_ready` and `on_after_optimizer_step`; a name that never occurs, and such a phase without a step, is
    said in a warning.
    """

    def __init__(self, phase: str | PhaseOf = "phase", acts_on: str | None = None) -> None:
        super().__init__()
        self.phase = phase
        self._acts_on = acts_on
        self._current: str | None = None
        self._number: int | None = None
        self._seen: set[str] = set()
        self._names: set[str] = set()  # what was trainable when some batch or step began: a module may toggle in one
        self._stepped = True  # in this phase; True where that is not known
        self._silent = False  # whether a phase without a step has been warned of
        self._listener: StepListener | None = None
        self._uncounted = 0  # optimizer steps that Lightning did not make, so `trainer.global_step` lacks them

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Called at the first batch of phase `current`; `previous` is None at the first batch of a run.

        Both are labels, and equal where two phases of one label follow each other.
        """

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called in the phase before every step of `optimizer`, ahead of Lightning's clipping.

        More than once a step where the optimizer evaluates its closure more than once.
        """

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called in the phase after `optimizer` changed the weights; not where a step was skipped."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop._skip_backward:  # StochasticWeightAveraging's last pass over the data trains nothing
            self.release()
            return
        self._listen(trainer, pl_module)
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
        self._warn_of_no_step()
        previous, self._current, self._number = self._current, current, number
        self._seen.add(current)
        self._stepped = False
        self.on_phase_change(trainer, pl_module, previous, current)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._listener is not None:
            self._listener.from_lightning(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._close()

    def _listen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear the optimizer steps of one batch."""
        self._names.update(trainable(pl_module))
        if self._acts_on is None:
            return

        def before(optimizer: Optimizer) -> None:
            self._names.update(trainable(pl_module))  # a module's own hooks of the batch came after ours
            if self._current == self._acts_on:
                self.on_gradients_ready(trainer, pl_module, optimizer)

        def after(optimizer: Optimizer, counted: bool) -> None:
            self._stepped = True
            self._uncounted += not counted
            if self._current == self._acts_on:
                with profiled(trainer, self, "on_after_optimizer_step"):
                    self.on_after_optimizer_step(trainer, pl_module, optimizer)

        self._close()
        self._listener = StepListener(pl_module, before, after)

    def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._listener = None

    def trained(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        """Parameters that were trainable when a batch, step or training began, by name, in the order of the module."""
        return {name: p for name, p in pl_module.named_parameters() if name in self._names}

    def _warn_of_no_step(self) -> None:
        """Say once that a phase this callback acts on ended and no step was heard."""
        if self._acts_on is None or self._current != self._acts_on or self._stepped or self._silent:
            return
        self._silent = True
        rank_zero_warn(
            f"{type(self).__name__}: phase {self._current!r} ended and no torch optimizer has stepped this module's "
            "weights in it, so it did nothing there; weights that a module moves otherwise are not seen"
        )

    def _warn_of_no_phase(self, trainer: Trainer) -> None:
        """Say that the phase this callback acts on never came."""
        if self._acts_on is None or not self._seen or self._acts_on in self._seen or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rank_zero_warn(
            f"{type(self).__name__}: no batch was of phase {self._acts_on!r}, so it did nothing; phases seen: "
            f"{', '.join(map(repr, sorted(self._seen)))}"
        )

    def release(self) -> None:
        """Let go of what belongs to the running fit; called when it ends, in whatever way."""
        self._close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._names.update(trainable(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_of_no_step()
        self._warn_of_no_phase(trainer)
        self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.release()

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": self._current,
            NUMBER: self._number,
            "phases_seen": sorted(self._seen),
            "uncounted_steps": self._uncounted,
            "trained": sorted(self._names),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._current, self._number = state_dict["phase"], state_dict.get(NUMBER)
        # a state of an earlier version does not know: nothing is said
        self._seen = set(state_dict.get("phases_seen", filter(None, [self._acts_on])))
        self._uncounted = state_dict.get("uncounted_steps", 0)
        self._names = set(state_dict.get("trained", ()))
        self._stepped = True


def other_number(before: int | None, now: int | None) -> bool:
    """Whether two numbers of phases tell these apart; one that is not known tells nothing."""
    return before is not None and now is not None and before != now


def _named(label: str, number: int | None) -> str:
    return repr(label) if number is None else f"{label!r} number {number}"
