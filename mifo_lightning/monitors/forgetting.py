"""Which questions a phase makes the model forget, and which it teaches."""

from itertools import chain
from typing import Any

import torch
from lightning import LightningModule, Trainer

from mifo_callbacks.collectives import gather_dealt
from mifo_callbacks.logging import log_metrics
from mifo_lightning.common.errors import InputError, require
from mifo_lightning.common.question import Question
from mifo_lightning.monitors.phase_monitor import PhaseMonitor, same_questions
from mifo_lightning.monitors.trained import as_trained

Solved = dict[str, list[bool]]  # of each source, whether each of its questions is solved
Counts = dict[str, dict[str, int]]


class Forgetting(PhaseMonitor):
    """Answers the same validation questions greedily at every change of phase and compares what was solved.

    Logs `forgetting/<source>/accuracy` and, when a phase ends, `forgetting/<phase>/<source>/retained` (share of the
    questions solved before it that still are) and `.../gained` (share of the others that are solved now). Costs one
    greedy response per question at the start of training and at every change of phase; ranks share the work.

    Args:
        questions: How many validation questions to use of each source, the first ones.
        every: RL steps between two further measurements inside an RL phase; 0 makes none.

    Raises:
        InputError: If a number is not allowed; when training starts, if there are no validation questions.
    """

    summary_key = "forgetting"

    def __init__(self, questions: int = 64, every: int = 0) -> None:
        super().__init__()
        require("forgetting.questions", questions, questions >= 1, "at least 1")
        require("forgetting.every", every, every >= 0, "at least 0")
        self.questions, self.every = questions, every
        self.responses = 0
        self._probe: dict[str, list[Question]] = {}  # this rank's
        self._asked: int | None = None  # a key of all of them
        self._first: Solved = {}
        self._edge: Solved = {}  # at the last change of phase
        self._measured = -1  # the rollout before which there was a measurement, or none was due

    def preflight(self, trainer: Trainer, sources: Any) -> None:
        """Raise an InputError if there are no validation questions, one loader of them a source."""
        if not sources:
            raise InputError("forgetting: needs validation questions; data.val is null and data.holdout is 0")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the questions."""
        super().on_train_start(trainer, pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        sources = {} if data is None else data.val_dataloader()
        self.preflight(trainer, sources)
        chosen = {source: loader.questions[: self.questions] for source, loader in sources.items()}
        counts, known = ({s: len(v) for s, v in found.items()} for found in (chosen, self._first))
        if not known or counts == known:  # else the first measurement says how many
            self._asked = same_questions("forgetting", self._asked, chain(*chosen.values()))
        self._probe = {source: self.deal(trainer, questions) for source, questions in chosen.items()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure at a change of phase and every few RL steps."""
        inside = batch["phase"] == self._current == "rl"
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        fresh = batch["update"] == 0
        anew = batch["rollout"] == self._measured  # the step was interrupted
        if self.every and inside and fresh and batch["rollout"] % self.every == 0 and not anew:
            with self.timed():
                self._measure(trainer, pl_module)
        if batch["phase"] == "rl":
            self._measured = batch["rollout"]

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of the phase before is the start of this one; only the first phase is measured anew."""
        if not self._first:
            self._first = self._edge = self._measure(trainer, pl_module)

    def end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> dict[str, Any]:
        """What the phase kept and gained."""
        now = self._measure(trainer, pl_module)
        cells, self._edge = compare(self._edge, now), now
        metrics = {}
        for source, cell in cells.items():
            unsolved = cell["questions"] - cell["solved"]
            if cell["solved"]:
                metrics[f"forgetting/{phase}/{source}/retained"] = cell["retained"] / cell["solved"]
            if unsolved:
                metrics[f"forgetting/{phase}/{source}/gained"] = cell["gained"] / unsolved
        log_metrics(trainer, metrics)
        return {"sources": cells}

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> Solved:
        module = as_trained(pl_module, "forgetting")
        solved: Solved = {}
        for source, questions in self._probe.items():
            mine = module.evaluator.greedy_correct(module.policy, questions)
            solved[source] = gather_dealt(mine.tolist())
        then, now = ({s: len(v) for s, v in found.items()} for found in (self._first, solved))
        if self._first and then != now:
            raise InputError(
                f"ckpt_path: forgetting has been measured on {then} validation questions and would now be on {now}; "
                "keep data.val, data.holdout and forgetting.questions the same for a whole run"
            )
        self.responses += sum(map(len, solved.values()))
        log_metrics(trainer, {f"forgetting/{source}/accuracy": sum(v) / len(v) for source, v in solved.items()})
        return solved

    def summary(self) -> dict[str, Any]:
        """Seconds, responses, the whole run from the first measurement to the last, and every phase."""
        return {**super().summary(), "responses": self.responses, "run": compare(self._first, self._edge)}

    def own_state(self) -> dict[str, Any]:
        """What is solved at the start and at the last change of phase."""
        found = {"first": self._first, "edge": self._edge, "measured": self._measured}
        return {"responses": self.responses, "asked": self._asked, **found}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.responses, self._first, self._edge = state["responses"], state["first"], state["edge"]
        self._measured, self._asked = state.get("measured", -1), state.get("asked")


def compare(before: Solved, after: Solved) -> Counts:
    """Of each source: `questions`, `solved` before, `retained` of these after, `gained` of the others after.

    Args:
        before: Whether each question of each source was solved.
        after: The same of the same questions later.
    """
    cells: Counts = {}
    for source, solved in before.items():
        old, new = torch.tensor(solved), torch.tensor(after[source])
        counts = {"solved": old, "retained": old & new, "gained": ~old & new}
        cells[source] = {"questions": len(solved), **{name: int(mask.sum()) for name, mask in counts.items()}}
    return cells
