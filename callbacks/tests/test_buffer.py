"""The buffer rules and the callback that switches phases."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import Log, Toy, fit

from mifo_callbacks import BufferPhaseSwitch, DemonstrationBuffer


def group(question: int | str, n_correct: int = 0, size: int = 8, has_demonstration: bool = True) -> dict[str, Any]:
    return {"id": question, "n_correct": n_correct, "size": size, "has_demonstration": has_demonstration}


def ids(buffer: DemonstrationBuffer) -> list[int | str]:
    return [entry["id"] for entry in buffer.entries]


@pytest.mark.parametrize(
    ("p", "size", "gate"),
    [
        (0.125, 8, 1),
        (0.0, 8, 0),
        (0.25, 8, 2),
        (0.375, 8, 3),
        (1.0, 8, 8),
        (0.125, 7, 0),
        (0.1, 30, 3),
        (0.29, 100, 29),
    ],
)
def test_the_gate_is_an_integer(p: float, size: int, gate: int) -> None:
    buffer = DemonstrationBuffer(p)
    buffer.add([group(n, n_correct=n, size=size) for n in range(size + 1)], step=1)
    assert ids(buffer) == list(range(gate + 1))


def test_an_entry_is_plain_data() -> None:
    buffer = DemonstrationBuffer()
    buffer.add([group("q", n_correct=1)], step=4)
    assert buffer.entries == [{"id": "q", "n_correct": 1, "size": 8, "step": 4, "entries": 1}]


def test_without_a_demonstration_a_question_is_counted_not_buffered() -> None:
    buffer = DemonstrationBuffer()
    buffer.add([group(1, has_demonstration=False), group(2, 8, has_demonstration=False), group(3)], step=1)
    assert ids(buffer) == [3]
    assert buffer.no_demonstration == 1


def test_re_entry_refreshes_and_does_not_duplicate() -> None:
    buffer = DemonstrationBuffer()
    buffer.add([group(1), group(2)], step=1)
    assert buffer.add([group(1, n_correct=1)], step=2) == {"entered": 1, "re_entries": 1}
    assert ids(buffer) == [2, 1]
    assert buffer.entries[-1] == {"id": 1, "n_correct": 1, "size": 8, "step": 2, "entries": 2}


def test_an_entry_keeps_what_else_its_group_says_and_the_last_word_counts() -> None:
    buffer = DemonstrationBuffer()
    buffer.add([group(1) | {"demonstration": [4, 5]}, group(2)], step=1)
    buffer.add([group(1) | {"demonstration": [6], "step": 99, "entries": 99}], step=2)
    copy = DemonstrationBuffer()
    copy.load_state_dict(buffer.state_dict())
    assert copy.take(2) == [
        {"id": 2, "n_correct": 0, "size": 8, "step": 1, "entries": 1},
        {"id": 1, "n_correct": 0, "size": 8, "step": 2, "entries": 2, "demonstration": [6]},
    ]


def test_a_question_solved_since_stays_and_is_counted() -> None:
    buffer = DemonstrationBuffer()
    buffer.add([group(1), group(2)], step=1)
    buffer.add([group(1, n_correct=5), group(9, n_correct=5)], step=2)
    assert ids(buffer) == [1, 2]
    assert buffer.solved == {1}
    buffer.add([group(1)], step=3)
    assert buffer.solved == set()


def test_a_question_solved_since_can_leave_at_once() -> None:
    buffer = DemonstrationBuffer(drop_solved=True)
    buffer.add([group(1), group(2), group(3)], step=1)
    buffer.add([group(2, n_correct=5), group(9, n_correct=5), group(3, n_correct=1)], step=2)
    assert ids(buffer) == [1, 3]
    assert (buffer.dropped, buffer.solved) == (1, set())
    buffer.add([group(2)], step=3)
    assert buffer.entries[-1] == {"id": 2, "n_correct": 0, "size": 8, "step": 3, "entries": 1}


def test_an_entry_waits_no_longer_than_its_age_allows() -> None:
    buffer = DemonstrationBuffer(max_age=2)
    buffer.add([group(1), group(2), group(3)], step=1)
    buffer.add([group(2)], step=2)  # enters again: its age begins anew
    buffer.add([group(3, n_correct=8)], step=3)
    assert (ids(buffer), buffer.dropped, buffer.solved) == ([1, 3, 2], 0, {3})
    buffer.add([], step=4)
    assert (ids(buffer), buffer.dropped, buffer.solved) == ([2], 2, set())
    copy = DemonstrationBuffer(max_age=2)
    copy.load_state_dict(buffer.state_dict())
    copy.add([], step=5)
    assert (len(copy), copy.dropped) == (0, 3)


@pytest.mark.parametrize(("max_age", "oldest", "waiting"), [(None, 30, 2400), (2, 2, 3 * 80 - 64)])
def test_a_backlog_is_taught_late_unless_its_age_is_limited(max_age: int | None, oldest: int, waiting: int) -> None:
    """80 hard questions a rollout, 64 taught: after 150 rollouts what is taught failed 30 rollouts ago."""
    loader = Loader([[group(80 * step + n) for n in range(80)] for step in range(150)])
    switch = BufferPhaseSwitch(size=64, max_age=max_age)
    fit([switch], loader, Rollouts())
    assert len(loader.pushed) == 150
    ages = [step + 1 - entry["step"] for step, entries in enumerate(loader.pushed) for entry in entries]
    assert (max(ages), len(switch.buffer)) == (oldest, waiting)
    assert switch.buffer.dropped == 150 * (80 - 64) - waiting


@pytest.mark.parametrize(("order", "taken", "left"), [("fifo", [1, 2], [3, 4]), ("newest_first", [4, 3], [1, 2])])
def test_order_of_taking(order: Any, taken: list[int], left: list[int]) -> None:
    buffer = DemonstrationBuffer(order=order)
    buffer.add([group(n) for n in (1, 2, 3, 4)], step=1)
    buffer.add([group(taken[0], n_correct=8)], step=2)
    assert [entry["id"] for entry in buffer.take(2)] == taken
    assert ids(buffer) == left
    assert buffer.solved == set()


def test_state_round_trip() -> None:
    buffer = DemonstrationBuffer()
    buffer.add([group(1), group("b"), group(3, has_demonstration=False)], step=1)
    buffer.add([group(1, n_correct=7)], step=2)
    state = buffer.state_dict()
    copy = DemonstrationBuffer()
    copy.load_state_dict(state)
    buffer.take(1)
    assert copy.state_dict() == state
    assert (len(copy), copy.solved, copy.no_demonstration) == (2, {1}, 1)


@pytest.mark.parametrize(
    "bad", [{"n_correct": 9}, {"n_correct": -1}, {"n_correct": 0.5}, {"n_correct": torch.tensor(1)}]
)
def test_bad_groups(bad: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"question 1 .*allowed: ints, 0 <= n_correct <= size"):
        DemonstrationBuffer().add([group(1) | bad], step=1)
    with pytest.raises(MisconfigurationException, match="lacks 'size'"):
        DemonstrationBuffer().add([{"id": 1, "n_correct": 0, "has_demonstration": True}], step=1)


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 0},
        {"size": 4, "max_accuracy": 1.1},
        {"size": 4, "max_accuracy": -0.1},
        {"size": 4, "order": "x"},
        {"size": 4, "leftovers": "x"},
        {"size": 4, "max_age": -1},
    ],
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="allowed"):
        BufferPhaseSwitch(**bad)


class Loader:
    """Hands out the given rollouts; None stands for a batch without fresh rollouts."""

    fingerprint: int | str | None

    def __init__(self, rollouts: list[Any]) -> None:
        self.rollouts = rollouts
        self.pushed: list[list[dict[str, Any]]] = []

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rollout in self.rollouts:
            yield {"x": torch.ones(1, 6), "y": torch.zeros(1, dtype=torch.long), "groups": rollout}

    def push(self, entries: list[dict[str, Any]]) -> None:
        self.pushed.append(entries)


class Rollouts(Toy):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if batch["groups"] is None else {"loss": loss, "groups": batch["groups"]}


def test_a_full_buffer_pushes_once_per_rollout() -> None:
    loader, log = (
        Loader([[group(1), group(2, n_correct=8)], None, [group(n) for n in range(2, 8)], [], [group(9)]]),
        Log(),
    )
    switch = BufferPhaseSwitch(size=3)
    fit([switch], loader, Rollouts(), logger=log)
    assert [[entry["id"] for entry in entries] for entries in loader.pushed] == [[1, 2, 3], [4, 5, 6]]
    assert ids(switch.buffer) == [7, 9]
    assert log.rows["buffer/size"] == [(0, 1), (2, 7), (3, 4), (4, 2)]
    assert log.values("buffer/switches") == [0, 1, 2, 2]
    assert log.values("buffer/age_max") == [0, 1, 1, 2]
    assert log.values("buffer/age_mean")[1] == pytest.approx(1 / 7)
    assert log.values("buffer/entered") == [1, 6, 0, 1]


def test_leftovers_can_be_cleared() -> None:
    loader = Loader([[group(n) for n in range(5)]])
    switch = BufferPhaseSwitch(size=3, leftovers="clear")
    fit([switch], loader, Rollouts())
    assert len(loader.pushed) == 1
    assert len(switch.buffer) == 0


@pytest.mark.parametrize(
    ("first", "second", "goes_on"), [(1, 1, True), (1, 2, False), ("a", "b", False), (None, 2, True)]
)
def test_a_second_fit_goes_on_with_what_waits_unless_ids_stand_for_other_questions(
    first: int | str | None, second: int | str, goes_on: bool
) -> None:
    switch, module = BufferPhaseSwitch(size=3), Rollouts()
    loaders = [Loader([[group(1), group(2)]]), Loader([[group(3)], [group(4)]])]
    for loader, data in zip(loaders, (first, second), strict=True):
        if data is not None:
            loader.fingerprint = data
    fit([switch], loaders[0], module)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit([switch], loaders[1], module)
    assert [[entry["id"] for entry in entries] for entries in loaders[1].pushed] == ([[1, 2, 3]] if goes_on else [])
    assert ids(switch.buffer) == ([4] if goes_on else [3, 4])
    dropped = [str(w.message) for w in said if "BufferPhaseSwitch" in str(w.message)]
    assert ["2 questions that waited" in line for line in dropped] == ([] if goes_on else [True])


def test_what_waits_is_dropped_where_a_checkpoint_is_of_other_questions() -> None:
    switch, loader = BufferPhaseSwitch(size=3), Loader([[group(1), group(2)]])
    loader.fingerprint = 1
    fit([switch], loader, Rollouts())
    for data, left in ((1, [1, 2, 3]), (2, [3])):
        resumed, rest = BufferPhaseSwitch(size=4), Loader([[group(3)]])
        resumed.load_state_dict(switch.state_dict())
        rest.fingerprint = data
        fit([resumed], rest, Rollouts())
        assert ids(resumed.buffer) == left


def test_a_loader_without_push_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"is a DataLoader without push; needed: PhaseLoader with push"):
        fit([BufferPhaseSwitch(size=1)], torch.utils.data.DataLoader([1, 2]))
