"""What each phase does to held-out demonstrations."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mifo_callbacks.logging import log_metrics
from mifo_callbacks.phase import PhaseCallback
from mifo_lightning.data.question import Question
from mifo_lightning.distributed import sum_ranks


class HeldOutLoss(PhaseCallback):
    """Measures the loss on held-out demonstrations whenever the phase changes, so that each phase's effect is seen.

    Logs `heldout/loss` and `heldout/<source>/loss` (nats per token) at every edge, and `heldout/sft_change` and
    `heldout/rl_change`: the loss after the phase minus before; below 0 means that the phase made the demonstrations
    more likely. `changes` keeps them by phase kind. Costs one forward of the chosen demonstrations at every edge.

    Args:
        questions: How many validation questions with a demonstration to use of each source, the first ones.
    """

    def __init__(self, questions: int = 64) -> None:
        super().__init__()
        self.questions = questions
        self.changes: dict[str, list[float]] = {"rl": [], "sft": []}
        self._last: float | None = None
        self._probe: dict[str, list[Question]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the questions."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise MisconfigurationException("HeldOutLoss takes its questions from a datamodule; the Trainer has none")
        mine = -(-self.questions // trainer.world_size)
        self._probe = {
            source: [q for batch in loader for q in batch if q.demonstration][:mine]
            for source, loader in data.val_dataloader().items()
        }

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Measure between the phases."""
        self._measure(trainer, pl_module, previous)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure after the last phase."""
        self._measure(trainer, pl_module, self._current)
        super().on_train_end(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: Any, phase: str | None) -> None:
        metrics, total, count = {}, 0.0, 0.0
        for source, questions in self._probe.items():
            local = pl_module.evaluator.demonstration_nll(pl_module.policy, questions)
            nll, tokens = (float(x) for x in sum_ranks(list(local)))
            total, count = total + nll, count + tokens
            if tokens:
                metrics[f"heldout/{source}/loss"] = nll / tokens
        if not count:
            return
        loss = metrics["heldout/loss"] = total / count
        if phase is not None and self._last is not None:
            self.changes[phase].append(loss - self._last)
            metrics[f"heldout/{phase}_change"] = loss - self._last
        self._last = loss
        log_metrics(trainer, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Changes so far and the loss at the last edge."""
        return super().state_dict() | {"changes": self.changes, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self.changes, self._last = state_dict["changes"], state_dict["last"]
