"""BufferPhaseSwitch: hand what reinforcement learning cannot solve to supervised learning."""

from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from mifo_callbacks.buffer import BufferOrder, DemonstrationBuffer
from mifo_callbacks.checks import require_choice
from mifo_callbacks.collectives import gather_dealt
from mifo_callbacks.contracts import groups_of, phase_loader_of
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.ownership import TrainerCallback, claim, distinct, renew
from mifo_callbacks.sharding import require_data_parallel

Leftovers = Literal["keep", "clear"]


class BufferPhaseSwitch(TrainerCallback):
    """Buffer the questions that rollouts hardly solve; push them into the loader when enough wait (MIFO).

    A `training_step` that made fresh rollouts returns, beside the loss, `groups`: for each question of this
    rank a dict of `id`, `n_correct`, `size` and `has_demonstration`; on every rank in the same batch. The
    loader's `push(entries)` receives the questions, the same on every rank, and hands them out as a
    supervised phase when the current rollout is used up. Ids stand for questions of this loader: in a later fit on
    others, which the loader's `fingerprint` tells, what still waits is dropped, and that is said.

    Args:
        size: How many questions make a supervised phase; the paper leaves it open (64 fits its data counts).
        max_accuracy: p; a question enters when n_correct <= floor(p * group size), in [0, 1]; no number above the gate
            enters.
        order: Take the oldest questions first ("fifo") or the "newest_first".
        leftovers: After a push, "keep" the remaining questions or "clear" them.
        max_age: A question leaves untaught once its last entry is more than so many rollouts ago; None lets it
            wait. Where more questions enter a rollout than a phase takes, "fifo" teaches ever older ones.
        drop_solved: Whether a waiting question leaves when a rollout answers it better than the gate.

    Raises:
        MisconfigurationException: If an argument is outside what is allowed; when training starts, if the
            train dataloader has no `push` or ranks are not data-parallel.

    Example::

        trainer = Trainer(callbacks=[BufferPhaseSwitch(size=64, max_accuracy=0.125)])
        # in training_step: return {"loss": loss, "groups": [{"id": 7, "n_correct": 0, "size": 8,
        #                                                     "has_demonstration": True}]}
    """

    def __init__(
        self,
        size: int,
        max_accuracy: float = 0.125,
        order: BufferOrder = "fifo",
        leftovers: Leftovers = "keep",
        max_age: int | None = None,
        drop_solved: bool = False,
    ) -> None:
        super().__init__()
        if size < 1:
            raise MisconfigurationException(f"BufferPhaseSwitch.size is {size}; allowed: 1 or more")
        require_choice("BufferPhaseSwitch.leftovers", leftovers, Leftovers)
        self.size = size
        self.leftovers = leftovers
        self.buffer = DemonstrationBuffer(max_accuracy, order, max_age, drop_solved)
        self.rollouts = 0
        self.switches = 0
        self._data: int | str | None = None  # fingerprint of the questions that the ids stand for

    @property
    def state_key(self) -> str:
        return distinct(self, super().state_key)

    @property
    def max_accuracy(self) -> float:
        """p, of `buffer`, where it may be changed; so may the other rules."""
        return self.buffer.max_accuracy

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_data_parallel(trainer, "BufferPhaseSwitch")
        data = getattr(phase_loader_of(trainer, "BufferPhaseSwitch"), "fingerprint", None)
        claim(self, pl_module)
        if self.buffer and self._data is not None and data not in (self._data, None):
            rank_zero_warn(
                f"BufferPhaseSwitch: {len(self.buffer)} questions that waited for a phase are dropped: the train "
                "dataloader has other questions now"
            )
            self.buffer.clear()
        self._data = data

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        groups = groups_of(outputs)
        if groups is None or trainer.fit_loop._skip_backward:
            return  # no rollout, or StochasticWeightAveraging's last pass over the data, which trains nothing
        self.rollouts += 1
        entered = self.buffer.add(gather_dealt(groups), self.rollouts)
        ages = [self.rollouts - entry["step"] for entry in self.buffer.entries]
        metrics: dict[str, float] = {
            **entered,
            "size": len(self.buffer),
            "solved_since_entry": len(self.buffer.solved),
            "no_demonstration": self.buffer.no_demonstration,
            "dropped": self.buffer.dropped,
            "age_mean": sum(ages) / max(len(ages), 1),
            "age_max": max(ages, default=0),
        }
        if len(self.buffer) >= self.size:
            phase_loader_of(trainer, "BufferPhaseSwitch").push(self.buffer.take(self.size))
            self.switches += 1
            if self.leftovers == "clear":
                self.buffer.clear()
        metrics["switches"] = self.switches
        log_metrics(trainer, {f"buffer/{name}": value for name, value in metrics.items()})

    def state_dict(self) -> dict[str, Any]:
        counts = {"rollouts": self.rollouts, "switches": self.switches}
        return {"buffer": self.buffer.state_dict(), "data": self._data, **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        renew(self)
        self.buffer.load_state_dict(state_dict["buffer"])
        self._data = state_dict.get("data")
        self.rollouts = state_dict["rollouts"]
        self.switches = state_dict["switches"]
