"""The PhaseLoader decides what the next optimizer step works on, and remembers where it is."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypedDict

import torch

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.common.restoring import restoring
from mifo_lightning.common.seeds import stable_key
from mifo_lightning.data.schedule import Schedule


class WorkItem(TypedDict):
    """One optimizer step, as the loader hands it out.

    Attributes:
        phase: `rl` or `sft`; the callbacks read this key and the next.
        phase_number: SFT phases begun before this phase; RL rollouts without SFT between them are one phase.
        questions: This rank's questions: of the whole rollout in RL, of the whole optimizer step in SFT.
        rollout: Number of the RL rollout, or of the SFT phase, from 0.
        update: Which optimizer step of that rollout or SFT phase this is, from 0.
        updates: How many optimizer steps it has.
        minibatches: Parts that one RL pass over the rollout is divided into; update u works on part u % minibatches.
        step: Number of the optimizer step among all steps of its phase kind, from 0; learning rates follow it.
    """

    phase: Literal["rl", "sft"]
    phase_number: int
    questions: list[Question]
    rollout: int
    update: int
    updates: int
    minibatches: int
    step: int


class Pushed(NamedTuple):
    """An SFT phase that waits: ids of its questions, and the demonstrations that are not the data's, by id."""

    ids: list[int]
    own: dict[int, list[int]]


@dataclass
class _Position:
    """Where the loader is: plain integers and lists, so that a checkpoint holds all of it."""

    rl: int = 0  # rollouts begun
    more: int = 0  # further batches of questions that rollouts asked for
    sft: int = 0  # SFT phases begun
    before: int = 0  # optimizer steps done of `sft_before`
    after: int = 0  # optimizer steps done of `sft_after`
    rl_updates: int = 0  # RL optimizer steps done
    sft_updates: int = 0  # SFT optimizer steps done
    dropped: int = 0  # pushed SFT phases left out, since no RL step was to follow


class PhaseLoader:
    """Sized, stateful, rank-aware iterable of work items, one for each optimizer step.

    After each rollout's updates a pushed SFT phase comes first, then
    the next rollout. Order and contents depend on `seed` and what was pushed, never on the number of ranks.

    Args:
        questions: All training questions; position equals `Question.id`.
        schedule: How much of which phase.
        phase_size: Demonstrations that a buffer pushes for one SFT phase; only to check that batches divide.
        own_demonstrations: Whether demonstrations are not the data's; only to check that there are enough.
        seed: Seed of the order of questions and demonstrations.
        rank: This process.
        world_size: Number of data-parallel processes.

    Attributes:
        under_way: Whether the optimizer step that was handed out last is still to be done: whoever does it says so.
            The state is then that of its beginning, so that it is done anew as a whole.

    Raises:
        InputError: If a batch cannot be divided over ranks and minibatches, or a phase has no data.
    """

    def __init__(
        self,
        questions: list[Question],
        schedule: Schedule,
        *,
        phase_size: int | None = None,
        own_demonstrations: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.questions, self.schedule, self.seed = questions, schedule, seed
        self.rank, self.world_size = rank, world_size
        self.demonstrated = [q.id for q in questions if q.demonstration]
        schedule.check("data.schedule")
        if schedule.rl_steps != 0:
            schedule.check_rl(len(questions), world_size)
        if phase_size is not None or schedule.sft_before or schedule.sft_after:
            lending = len(questions) if own_demonstrations else len(self.demonstrated)
            schedule.check_sft(lending, phase_size, world_size)
        self.sft_phase_steps = schedule.sft_phase_steps(phase_size)
        self.under_way = False
        self._at = _Position()
        self._queue: list[Pushed] = []  # pushed SFT phases that have not begun
        self._kind: str | None = None  # what is under way: rl, sft, before, after
        self._ids: list[int] = []  # questions of what is under way
        self._own: dict[int, list[int]] = {}  # demonstrations of what is under way that are not the data's
        self._update = 0
        self._before = self._state()

    def push(self, entries: list[dict[str, Any]]) -> None:
        """Queue an SFT phase on these buffer entries.

        Args:
            entries: Each with the `id` of a question and, if it is not the data's, its `demonstration` (token ids).

        Raises:
            InputError: If the phase cannot be cut into whole SFT batches.
        """
        self.schedule.check_phase(len(entries))
        own = {entry["id"]: list(entry["demonstration"]) for entry in entries if "demonstration" in entry}
        self._queue.append(Pushed([entry["id"] for entry in entries], own))

    def lend(self, ids: Iterable[int]) -> None:
        """Let these questions alone be learned from in SFT, whatever has a demonstration in the data.

        Raises:
            InputError: SFT steps on all demonstrations have too few.
        """
        self.demonstrated = sorted(ids)
        if self.schedule.sft_before or self.schedule.sft_after:
            self.schedule.check_sft(len(self.demonstrated), None, self.world_size)

    def phase(self) -> list[Question]:
        """This rank's share of the questions of what is under way, each once."""
        return [self.questions[i] for i in list(dict.fromkeys(self._ids))[self.rank :: self.world_size]]

    def more(self) -> list[Question]:
        """This rank's share of the next batch of questions, for a rollout under way that wants further ones."""
        self._at.more += 1
        ids = self._rl_batch(self._at.rl - 1)
        return [self.questions[i] for i in ids[self.rank :: self.world_size]]

    def __len__(self) -> int:
        """A bound no run reaches: Lightning does not fetch ahead from a loader that has a length."""
        return 10**9

    def __iter__(self) -> Iterator[WorkItem]:
        return self

    def __next__(self) -> WorkItem:
        self._before = self._state()
        if self._update == self._updates():
            self._begin()
        item = self._item()
        self._end_step()
        return item

    @property
    def rl_is_over(self) -> bool:
        """Whether the last RL step of the schedule has begun; what follows its updates is SFT, if anything."""
        return self.schedule.rl_steps is not None and self._at.rl >= self.schedule.rl_steps

    @property
    def share_done(self) -> float | None:
        """Share of the schedule that is done, buffer-triggered phases left out; None if RL has no end."""
        s, at = self.schedule, self._at
        if s.rl_steps is None:
            return None
        rl = at.rl - (1 - self._update / s.updates if self._kind == "rl" else 0)
        return (at.before + rl + at.after) / (s.sft_before + s.rl_steps + s.sft_after)

    def _begin(self) -> None:
        """Decide what comes next; only ever between optimizer steps."""
        s, at = self.schedule, self._at
        own: dict[int, list[int]] = {}
        if self.rl_is_over and s.final_sft == "drop":
            at.dropped += len(self._queue)
            self._queue.clear()
        if at.before < s.sft_before:
            self._kind, self._ids = "before", self._demonstrations(at.before)
        elif self._queue:
            pushed = self._queue.pop(0)
            self._kind, self._ids, own = "sft", self._shuffled_epochs(pushed.ids), pushed.own
        elif not self.rl_is_over:
            self._kind, self._ids = "rl", self._rl_batch(at.rl)
        elif at.after < s.sft_after:
            self._kind, self._ids = "after", self._demonstrations(s.sft_before + at.after)
        else:
            raise StopIteration
        self._own, self._update = own, 0
        if self._kind == "rl":
            at.rl += 1
        elif self._kind == "sft" or getattr(at, self._kind) == 0:
            at.sft += 1

    def _updates(self) -> int:
        """Optimizer steps of what is under way."""
        if self._kind is None:
            return 0
        return self.schedule.updates if self._kind == "rl" else len(self._ids) // self.schedule.sft_batch

    def _item(self) -> WorkItem:
        rl, at = self._kind == "rl", self._at
        batch = len(self._ids) if rl else self.schedule.sft_batch
        start = 0 if rl else self._update * batch
        mine = self._ids[start : start + batch][self.rank :: self.world_size]
        return WorkItem(
            phase="rl" if rl else "sft",
            phase_number=at.sft - (not rl),
            questions=[self._question(i) for i in mine],
            rollout=(at.rl if rl else at.sft) - 1,
            update=self._update,
            updates=self._updates(),
            minibatches=self.schedule.minibatches if rl else 1,
            step=at.rl_updates if rl else at.sft_updates,
        )

    def _question(self, i: int) -> Question:
        """Question number i, with the demonstration that was pushed, if one was."""
        q = self.questions[i]
        return replace(q, demonstration=self._own[i], answer_start=None) if i in self._own else q

    def _end_step(self) -> None:
        self._update += 1
        if self._kind == "rl":
            self._at.rl_updates += 1
            return
        self._at.sft_updates += 1
        if self._kind in ("before", "after"):
            setattr(self._at, self._kind, getattr(self._at, self._kind) + 1)

    def _demonstrations(self, step: int) -> list[int]:
        """The SFT batch number `step` of an endless shuffled pass over all demonstrations."""
        chosen = self._batch(len(self.demonstrated), self.schedule.sft_batch, step, "demonstrations")
        return [self.demonstrated[i] for i in chosen]

    def _rl_batch(self, rollout: int) -> list[int]:
        """Questions of rollout number `rollout`, after all further batches that rollouts asked for."""
        return self._batch(len(self.questions), self.schedule.prompts_per_step, rollout + self._at.more, "rl")

    def _batch(self, n: int, size: int, number: int, name: str) -> list[int]:
        """Batch `number` of range(n), shuffled anew in every epoch.

        The incomplete batch at the end of an epoch is left out, so that no batch holds anything twice.
        """
        epoch, place = divmod(number, n // size)
        return self._permutation(n, f"{name}/{epoch}")[place * size : (place + 1) * size]

    def _shuffled_epochs(self, ids: list[int]) -> list[int]:
        """The demonstrations of one SFT phase, `sft_epochs` times, each time in another order."""
        orders = [self._permutation(len(ids), f"sft/{self._at.sft}/{e}") for e in range(self.schedule.sft_epochs)]
        return [ids[i] for order in orders for i in order]

    def _permutation(self, n: int, name: str) -> list[int]:
        generator = torch.Generator().manual_seed(stable_key(self.seed, "order", name))
        return torch.randperm(n, generator=generator).tolist()

    @property
    def position(self) -> dict[str, int]:
        """Where the loader is: rollouts, phases and optimizer steps begun or done."""
        return vars(self._at).copy()

    def state_dict(self) -> dict[str, Any]:
        """Position, pushed phases, what is under way, and what the questions were: plain integers and lists."""
        state = self._before if self.under_way else self._state()
        return {**state, "questions": len(self.questions), "fingerprint": self.fingerprint}

    def _state(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "queue": [{"ids": list(p.ids), "own": dict(p.own)} for p in self._queue],
            "kind": self._kind,
            "ids": list(self._ids),
            "own": dict(self._own),
            "update": self._update,
            "updates": self._updates(),
        }

    @restoring("the state of the data")
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the schedule itself is the present configuration's.

        Raises:
            InputError: If the questions are others, or what is under way would now have another number of updates.
        """
        if state["fingerprint"] != self.fingerprint:
            raise InputError(
                f"ckpt_path: the training questions are not those of the checkpoint ({state['questions']} then, "
                f"{len(self.questions)} now); data.train, its filters, damaged_share, holdout and the seed must stay"
            )
        self._at = _Position(**state["position"])
        self._queue = [Pushed(**pushed) for pushed in state["queue"]]
        self._own = dict(state["own"])
        self._kind, self._ids, self._update = state["kind"], list(state["ids"]), state["update"]
        if self._update == state["updates"]:
            self._update = self._updates()  # it was complete, whatever a phase looks like now
        elif self._updates() != state["updates"]:
            raise InputError(
                f"data.schedule: the checkpoint is inside a {self._kind} phase of {state['updates']} updates, which "
                f"would now have {self._updates()}; epochs_per_rollout, minibatches and sft_batch can change only "
                "between phases"
            )

    @property
    def fingerprint(self) -> int:
        """Of texts, truths and demonstrations: the questions that ids stand for."""
        return zlib.crc32("\n".join(f"{q.text}\t{q.truth}\t{q.demonstration}" for q in self.questions).encode())
