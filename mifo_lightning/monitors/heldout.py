"""What each phase does to held-out demonstrations."""

from itertools import chain
from typing import Any

from lightning import LightningModule, Trainer

from mifo_callbacks.collectives import sum_ranks
from mifo_callbacks.logging import log_metrics
from mifo_lightning.common.errors import InputError, require
from mifo_lightning.common.question import Question
from mifo_lightning.monitors.phase_monitor import PhaseMonitor, same_questions
from mifo_lightning.monitors.trained import as_trained


class HeldOutLoss(PhaseMonitor):
    """Measures the loss on held-out demonstrations whenever the phase changes, so that each phase's effect is seen.

    Logs `heldout/loss` and `heldout/<source>/loss` (nats per token) at every edge, and `heldout/sft_change` and
    `heldout/rl_change`: the loss after the phase minus before; below 0 means that the phase made the demonstrations
    more likely. Costs one forward of the chosen demonstrations at every edge.

    Args:
        questions: How many validation questions with a demonstration to use of each source, the first ones.

    Raises:
        InputError: If the number is not allowed; when training starts, if the Trainer has no datamodule.
    """

    summary_key = "heldout"

    def __init__(self, questions: int = 64) -> None:
        super().__init__()
        require("heldout.questions", questions, questions >= 1, "at least 1")
        self.questions = questions
        self._edge: float | None = None  # the loss at the last change of phase
        self._probe: dict[str, list[Question]] = {}
        self._asked: int | None = None  # a key of all of them

    @property
    def changes(self) -> dict[str, list[float]]:
        """What the finished phases of each kind did to the loss, in nats per token."""
        return {kind: [r["change"] for r in self.phases if r["phase"] == kind] for kind in ("rl", "sft")}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the questions."""
        super().on_train_start(trainer, pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise InputError("heldout: takes its questions from a datamodule; the Trainer has none")
        chosen = {
            source: [q for q in loader.questions if q.demonstration][: self.questions]
            for source, loader in data.val_dataloader().items()
        }
        self._asked = same_questions("heldout", self._asked, chain(*chosen.values()), shown=True)
        self._probe = {source: self.deal(trainer, questions) for source, questions in chosen.items()}

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of the phase before is the start of this one; only the first phase is measured anew."""
        if self._edge is None:
            losses = self._losses(pl_module)
            self._edge = losses.get("heldout/loss")
            log_metrics(trainer, losses)

    def end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> dict[str, Any] | None:
        """What the phase changed."""
        losses = self._losses(pl_module)
        before, self._edge = self._edge, losses.get("heldout/loss")
        if before is None or self._edge is None:
            return None
        change = self._edge - before
        log_metrics(trainer, losses | {f"heldout/{phase}_change": change})
        return {"change": change}

    def _losses(self, pl_module: LightningModule) -> dict[str, float]:
        """What is logged at an edge; empty without demonstrations."""
        module = as_trained(pl_module, "heldout")
        metrics, total, count = {}, 0.0, 0.0
        for source, questions in self._probe.items():
            local = module.evaluator.demonstration_nll(module.policy, questions)
            nll, tokens = (float(x) for x in sum_ranks(list(local)))
            total, count = total + nll, count + tokens
            if tokens:
                metrics[f"heldout/{source}/loss"] = nll / tokens
        return metrics | {"heldout/loss": total / count} if count else {}

    def summary(self) -> dict[str, Any]:
        """Seconds, every phase, and the changes by phase kind."""
        return {**super().summary(), "changes": self.changes}

    def own_state(self) -> dict[str, Any]:
        """The loss at the last change of phase."""
        return {"edge": self._edge, "asked": self._asked}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._edge, self._asked = state["edge"], state.get("asked")
