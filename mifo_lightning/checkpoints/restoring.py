"""Restoring what is Lightning's own from a checkpoint: one line names the part that does not fit this run."""

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from mifo_lightning.common.restoring import check_moment, restoring


class CheckedRestore(_CheckpointConnector):
    """In place of Lightning's, whose errors for a state of another shape are tracebacks, or missing."""

    resume_start = restoring("the version")(_CheckpointConnector.resume_start)
    restore_datamodule = restoring("the state of the data")(_CheckpointConnector.restore_datamodule)
    restore_model = restoring("the model")(_CheckpointConnector.restore_model)
    restore_callbacks = restoring("the state of the callbacks")(_CheckpointConnector.restore_callbacks)
    restore_lr_schedulers = restoring("the state of the schedulers")(_CheckpointConnector.restore_lr_schedulers)

    @restoring("the progress of the loops")
    def restore_loops(self) -> None:
        """Load progress; Lightning begins at 0 where some of it is missing."""
        if self._loaded_checkpoint and self.trainer.state.fn == TrainerFn.FITTING:
            expected, there = self.trainer.fit_loop.state_dict(), self._loaded_checkpoint["loops"]["fit_loop"]
            if missing := expected.keys() - there.keys():
                raise ValueError(f"no {min(missing)}")
        super().restore_loops()

    @restoring("the state of the optimizer")
    def restore_optimizers(self) -> None:
        """Load moments; Lightning leaves out what is too many or too few, and torch compares no shapes."""
        if not self._loaded_checkpoint:
            return
        states, optimizers = self._loaded_checkpoint["optimizer_states"], self.trainer.strategy.optimizers
        if len(states) != len(optimizers):
            raise ValueError(f"{len(states)} optimizers there and {len(optimizers)} here")
        super().restore_optimizers()
        for optimizer in optimizers:
            for parameter, slots in optimizer.state.items():
                for name, value in slots.items():
                    check_moment(parameter, name, value)
