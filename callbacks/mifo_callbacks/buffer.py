"""The buffer of questions that reinforcement learning cannot solve yet: plain data and the rules of MIFO."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from mifo_callbacks.checks import require_choice
from mifo_callbacks.contracts import Group

BufferOrder = Literal["fifo", "newest_first"]
GROUP_KEYS = tuple(Group.__annotations__)


class DemonstrationBuffer:
    """Questions whose rollouts were almost all wrong, waiting for supervised learning; one entry each.

    `entries` are dicts in order of entry: `id` of the question, `n_correct` of `size` rollouts at the last
    entry, `step` of that entry, and `entries`, how often the question has entered since it was last taken. A
    question that enters again moves to the end. `solved` holds the ids that have since been answered better
    than the gate and still wait; `dropped` counts the entries that left without being taken.

    Args:
        max_accuracy: p; a question enters when n_correct <= floor(p * size), in [0, 1].
        order: Take the oldest entries first ("fifo") or the "newest_first".
        max_age: An entry that is older than so many rollouts leaves; None lets it wait.
        drop_solved: Whether a question that has since been answered better than the gate leaves at once.

    Raises:
        MisconfigurationException: If an argument is outside what is allowed.
    """

    def __init__(
        self,
        max_accuracy: float = 0.125,
        order: BufferOrder = "fifo",
        max_age: int | None = None,
        drop_solved: bool = False,
    ) -> None:
        if not 0 <= max_accuracy <= 1:
            raise MisconfigurationException(f"the buffer's max_accuracy is {max_accuracy}; allowed: 0 to 1")
        require_choice("the buffer's order", order, BufferOrder)
        if max_age is not None and max_age < 0:
            raise MisconfigurationException(f"the buffer's max_age is {max_age}; allowed: 0 or more, or none")
        self.max_accuracy = max_accuracy
        self.order = order
        self.max_age = max_age
        self.drop_solved = drop_solved
        self.no_demonstration = 0
        self.dropped = 0
        self.solved: set[int | str] = set()
        self._entries: dict[int | str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The entries, oldest first."""
        return list(self._entries.values())

    def add(self, groups: Iterable[Mapping[str, Any]], step: int) -> dict[str, int]:
        """Enter the questions of one rollout that are at or below the gate, and drop what may wait no longer.

        Args:
            groups: For each question `id` (int or str), `n_correct` of `size` rollouts (invalid and truncated
                ones are wrong) and `has_demonstration`; questions without one are counted, not entered.
            step: Number of the rollout.

        Returns:
            How many questions `entered`, and how many of these were already in the buffer (`re_entries`).

        Raises:
            MisconfigurationException: If a group lacks a key, or n_correct is not an int from 0 to size.
        """
        entered = re_entries = 0
        for group in groups:
            question, n_correct, size, has_demonstration = _read(group)
            if n_correct > math.floor(self.max_accuracy * size + 1e-9):
                if question not in self._entries:
                    continue
                if self.drop_solved:
                    self._drop([question])
                else:
                    self.solved.add(question)
            elif not has_demonstration:
                self.no_demonstration += 1
            else:
                times = self._entries.pop(question, {"entries": 0})["entries"] + 1
                entered += 1
                re_entries += times > 1
                self.solved.discard(question)
                self._entries[question] = {
                    **{key: value for key, value in group.items() if key not in GROUP_KEYS},
                    "id": question,
                    "n_correct": n_correct,
                    "size": size,
                    "step": step,
                    "entries": times,
                }
        if self.max_age is not None:
            self._drop([q for q, entry in self._entries.items() if step - entry["step"] > self.max_age])
        return {"entered": entered, "re_entries": re_entries}

    def _drop(self, questions: list[int | str]) -> None:
        for question in questions:
            del self._entries[question]
        self.solved.difference_update(questions)
        self.dropped += len(questions)

    def take(self, n: int) -> list[dict[str, Any]]:
        """Remove and return the next `n` entries in this buffer's order; at most as many as there are."""
        ids = list(self._entries)
        taken = ids[:n] if self.order == "fifo" else ids[::-1][:n]
        self.solved.difference_update(taken)
        return [self._entries.pop(question) for question in taken]

    def clear(self) -> None:
        """Remove all entries."""
        self.take(len(self))

    def state_dict(self) -> dict[str, Any]:
        """Everything in the buffer as plain types."""
        return {
            "entries": [dict(entry) for entry in self.entries],
            "solved": [question for question in self._entries if question in self.solved],
            "no_demonstration": self.no_demonstration,
            "dropped": self.dropped,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._entries = {entry["id"]: dict(entry) for entry in state_dict["entries"]}
        self.solved = set(state_dict["solved"])
        self.no_demonstration = state_dict["no_demonstration"]
        self.dropped = state_dict.get("dropped", 0)


def _read(group: Mapping[str, Any]) -> tuple[int | str, int, int, bool]:
    if missing := [key for key in GROUP_KEYS if key not in group]:
        raise MisconfigurationException(
            f"a rollout group with keys {sorted(group)} lacks {missing[0]!r}; needed: {', '.join(GROUP_KEYS)}"
        )
    question, n_correct, size, has_demonstration = (group[key] for key in GROUP_KEYS)
    if not (isinstance(n_correct, int) and isinstance(size, int) and 0 <= n_correct <= size):
        raise MisconfigurationException(
            f"the rollout group of question {question!r} has n_correct {n_correct!r} of size {size!r}; "
            "allowed: ints, 0 <= n_correct <= size"
        )
    return question, n_correct, size, bool(has_demonstration)
