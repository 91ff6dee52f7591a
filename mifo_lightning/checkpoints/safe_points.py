"""Where a run may be interrupted: all ranks together, between whole pieces of work."""

from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.distributed.distributed_c10d import _get_default_store

from mifo_callbacks.collectives import ranks
from mifo_lightning.checkpoints import interruption
from mifo_lightning.common.errors import Interrupted

KEY = "mifo_lightning/interrupted"  # in the store of the process group: the signal that one of its ranks has got


class NoHandlers(_SignalConnector):
    """In place of Lightning's: its handlers broadcast inside the handler and end with status 0."""

    def register_signal_handlers(self) -> None:
        """Leave those of `interruption` where they are."""


class WholeFit(_FitLoop):
    """In place of Lightning's, which leaves out all hooks where `max_steps` or `max_epochs` is reached at the start.

    A run that was stopped after its last step still has to measure, to write its records and to export its model.
    """

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on."""
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0


def take_over(trainer: Trainer) -> None:
    """Let a Trainer that has not run be stopped by `interruption`, at any point, and go on from there."""
    trainer._signal_connector = NoHandlers(trainer)
    loop = WholeFit(trainer, trainer.min_epochs, trainer.max_epochs)
    loop.epoch_loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop = loop


def poll() -> None:
    """Leave a piece of work that is collective at its end alone, as decoding is; not collective itself, and cheap.

    Raises:
        Interrupted: If this rank is asked to stop, or another one has said so here.
    """
    if ranks() > 1:
        store = _get_default_store()
        if interruption.pending() is not None:
            store.set(KEY, str(interruption.pending()))
        elif store.check([KEY]):
            interruption.request(int(store.get(KEY)))
    if (signum := interruption.pending()) is not None:
        raise Interrupted(signum)


def agree(device: torch.device) -> None:
    """Stop here if any rank is asked to; collective.

    Args:
        device: Where collectives work.

    Raises:
        Interrupted: On all ranks, or on none.
    """
    signum = interruption.pending() or 0
    if ranks() > 1:
        told = torch.tensor(signum, device=device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        signum = int(told)
    if signum:
        raise Interrupted(signum, together=interruption.speaks_for_all(ranks()))


def whole_steps(loops: dict[str, Any]) -> None:
    """Take an optimizer step that is not done out of the progress of Lightning's fit loop, in place.

    Args:
        loops: `checkpoint["loops"]`.
    """
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    if progress["current"]["ready"] > progress["current"]["processed"]:
        for counts in (progress["current"], progress["total"]):
            done = counts["processed"]
            counts.update(ready=done, started=done, processed=done, completed=done)


def whole_evaluation(loops: dict[str, Any]) -> None:
    """Let an evaluation that is under way inside a fit begin anew: the metrics of its first part are in no checkpoint.

    Args:
        loops: `checkpoint["loops"]`, changed in place.
    """
    progress = loops["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"]
    progress["total"].update(ready=done + 1, started=done + 1, processed=done)  # so Lightning knows that it is not over
    progress["current"].update(ready=0, started=0, processed=0, completed=0)
