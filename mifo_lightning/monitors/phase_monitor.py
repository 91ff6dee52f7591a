"""What the monitors that measure at the edges of phases share."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar, TypeVar

from lightning import LightningModule, Trainer

from mifo_callbacks.ownership import claim, renew
from mifo_callbacks.phase import PhaseCallback
from mifo_lightning.common.errors import InputError, Interrupted
from mifo_lightning.common.question import Question
from mifo_lightning.common.seeds import stable_key

T = TypeVar("T")


def same_questions(monitor: str, then: int | None, questions: Iterable[Question], shown: bool = False) -> int:
    """A key of what is asked, of demonstrations if they are `shown`; InputError if an earlier one, `then`, differs."""
    asked = ((q.source, q.text, q.truth, str(q.demonstration) if shown else "") for q in questions)
    now = stable_key(*chain.from_iterable(asked))
    if then not in (None, now):
        raise InputError(
            f"{monitor}: what was measured before this run goes on was measured on other questions; keep data.val, "
            f"data.holdout and {monitor}.* the same for a whole run"
        )
    return now


class PhaseMonitor(PhaseCallback):
    """Measures every phase at its two edges and keeps one record of each phase, in the checkpoint too.

    What is measured when training ends is no part of the state: a resumed run goes on inside that phase, so that it
    ends with the records of an undisturbed one. Subclasses fill in `end` and, where they need them, `begin`,
    `own_state` and `load_own_state`.

    Attributes:
        summary_key: Where `summary.json` has the summary.
        phases: One record per finished phase: `phase`, `number` (among those of its kind, from 1), `rl_step` (RL steps
            done when it ended) and what `end` found.
        seconds: Wall seconds spent on measuring.
    """

    summary_key: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._numbers = {"rl": 0, "sft": 0}
        self._rl_step = 0
        self._begins = False  # at an edge: whether `end` is done and `begin` is not
        self._at_end: dict[str, Any] | None = None  # the state from before the measurement at the end of training

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what the end of the phase is compared with; no optimizer step of the phase has been made."""

    @abstractmethod
    def end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> dict[str, Any] | None:
        """Measure the phase and log; what belongs into its record, or None where there is nothing to record."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on, of the same module: what was measured when an earlier one ended was in the midst of it."""
        claim(self, pl_module)
        state, spent, self._at_end = self._at_end, self.seconds, None
        if state is not None and trainer.world_size == 1:  # of several ranks the first alone has all of a state
            self.load_state_dict(state)
            self.seconds = spent
            claim(self, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure if the phase changes here, then count RL steps."""
        before = self._current, self._number
        try:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        except Interrupted:
            self._current, self._number = before  # a run that goes on from here measures at this edge what is left
            raise
        if batch["phase"] == "rl":
            self._rl_step = batch["rollout"] + 1

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Measure between the phases."""
        with self.timed():
            if not self._begins:
                if previous is not None:
                    self._end(trainer, pl_module, previous)
                self._numbers[current] += 1
                self._begins = True
            self.begin(trainer, pl_module)
            self._begins = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure after the last phase."""
        self._at_end = self.state_dict()
        if self._current is not None:
            with self.timed():
                self._end(trainer, pl_module, self._current)
        super().on_train_end(trainer, pl_module)

    def _end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        found = self.end(trainer, pl_module, phase)
        if found is not None:
            where = {"phase": phase, "number": self._numbers[phase], "rl_step": self._rl_step}
            self.phases.append(where | found)

    def deal(self, trainer: Trainer, items: list[T]) -> list[T]:
        """This rank's items, every R-th of R ranks; `gather_dealt` takes them back."""
        return items[trainer.global_rank :: trainer.world_size]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the wall seconds of the block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def summary(self) -> dict[str, Any]:
        """Plain JSON: seconds and records."""
        return {"seconds": self.seconds, "phases": self.phases}

    def own_state(self) -> dict[str, Any]:
        """What a subclass adds to the state; a copy, plain types and tensors."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave; places on devices and shards are known in `on_train_start`."""

    def state_dict(self) -> dict[str, Any]:
        """Records, counts and what the running phase will be compared with; collective if weights are sharded."""
        if self._at_end is not None:
            return self._at_end
        common = {
            "phases": list(self.phases),
            "seconds": self.seconds,
            "numbers": dict(self._numbers),
            "rl_step": self._rl_step,
            "begins": self._begins,
        }
        return super().state_dict() | common | {"own": self.own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        renew(self)
        self._at_end = None
        self.phases, self.seconds = list(state_dict["phases"]), state_dict["seconds"]
        self._numbers, self._rl_step = dict(state_dict["numbers"]), state_dict["rl_step"]
        self._begins = state_dict.get("begins", False)
        self.load_own_state(state_dict["own"])
