"""The PhaseLoader: order, cutting, ranks, resume, refusals."""

import io
import json
from typing import Any

import pytest
import torch

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import PhaseLoader, WorkItem
from mifo_lightning.data.schedule import Schedule


def questions(n: int = 20, demonstrated: int = 10) -> list[Question]:
    return [Question(i, "s", f"q{i}", [1, i], "t", [2, 3] if i < demonstrated else None) for i in range(n)]


def loader(n: int = 20, demonstrated: int = 10, **changes: Any) -> PhaseLoader:
    names = set(Schedule.__dataclass_fields__)
    settings = {"rl_steps": 4, "prompts_per_step": 4, "sft_batch": 2}
    schedule = Schedule(**{**settings, **{k: v for k, v in changes.items() if k in names}})
    rest = {k: v for k, v in changes.items() if k not in names}
    return PhaseLoader(questions(n, demonstrated), schedule, **rest)


def entries(*ids: int) -> list[dict[str, Any]]:
    return [{"id": i, "n_correct": 0, "size": 8, "step": 1, "entries": 1} for i in ids]


def brief(item: WorkItem) -> tuple[str, list[int], int, int]:
    return item["phase"], [q.id for q in item["questions"]], item["rollout"], item["update"]


def test_every_question_comes_once_per_epoch_in_another_order() -> None:
    seen = [q.id for item in loader(rl_steps=10) for q in item["questions"]]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]


def test_no_rollout_holds_a_question_twice() -> None:
    for item in loader(n=10, rl_steps=50):
        ids = [q.id for q in item["questions"]]
        assert len(set(ids)) == 4


def test_a_pushed_phase_waits_for_all_updates_of_the_rollout() -> None:
    it = loader(epochs_per_rollout=2, minibatches=2, sft_epochs=2)
    first = next(it)
    it.push(entries(3, 1))
    items = [first, *it]
    phases = [item["phase"] for item in items]
    assert phases[:4] == ["rl"] * 4
    assert phases[4:6] == ["sft"] * 2
    assert phases[6:] == ["rl"] * 12
    assert [item["update"] for item in items[:4]] == [0, 1, 2, 3]
    assert {len(item["questions"]) for item in items[:4]} == {4}
    for item in items[4:6]:
        assert {q.id for q in item["questions"]} == {1, 3}


def test_steps_count_optimizer_steps_of_each_kind() -> None:
    it = loader(sft_before=1, sft_after=1, rl_steps=2)
    items = []
    for item in it:
        items.append(item)
        if item["phase"] == "rl" and item["rollout"] == 0:
            it.push(entries(0, 1, 2, 3))
    got = [(i["phase"], i["step"], i["rollout"]) for i in items]
    assert got == [("sft", 0, 0), ("rl", 0, 0), ("sft", 1, 1), ("sft", 2, 1), ("rl", 1, 1), ("sft", 3, 2)]


def test_a_pushed_demonstration_replaces_the_datas_in_its_phase_alone() -> None:
    it = loader(rl_steps=3, sft_epochs=2, n=4, demonstrated=2)
    next(it)
    it.push([{**entries(0)[0], "demonstration": [7, 8, 9]}, entries(1)[0]])
    it.push([{**entries(3)[0], "demonstration": [5]}, *entries(0)])
    shown = []
    for item in it:
        shown += [(q.id, q.demonstration) for q in item["questions"] if item["phase"] == "sft" or q.id == 0]
    own, data = (0, [7, 8, 9]), (0, [2, 3])
    assert sorted(shown[:4]) == sorted([own, (1, [2, 3])] * 2)
    assert sorted(shown[4:8]) == sorted([(3, [5]), data] * 2)
    assert shown[8:] == [data] * 2  # the RL steps that follow


def test_a_pushed_demonstration_has_no_known_answer() -> None:
    it = loader(rl_steps=1)
    next(it)
    it.questions[0].answer_start = 1
    it.push([{**entries(0)[0], "demonstration": [7, 8, 9]}, *entries(1)])
    (item,) = it
    assert {q.id: q.answer_start for q in item["questions"]} == {0: None, 1: None}
    assert it.questions[0].answer_start == 1


def test_further_questions_are_the_next_batches_and_none_comes_twice_within_an_epoch() -> None:
    it = loader(rl_steps=3)
    seen = [q.id for q in next(it)["questions"]]
    seen += [q.id for _ in range(2) for q in it.more()]
    seen += [q.id for q in next(it)["questions"]]
    seen += [q.id for q in it.more()]
    assert sorted(seen) == list(range(20))
    plain = [q.id for item in loader(rl_steps=5) for q in item["questions"]]
    assert seen == plain


def test_ranks_share_further_questions() -> None:
    whole, *ranks = loader(), *(loader(rank=r, world_size=2) for r in range(2))
    for it in (whole, *ranks):
        next(it)
    dealt = [[q.id for q in it.more()] for it in ranks]
    assert [i for pair in zip(*dealt, strict=True) for i in pair] == [q.id for q in whole.more()]


def test_a_restored_loader_knows_what_was_asked_for_and_pushed() -> None:
    def state_of(it: PhaseLoader) -> dict[str, Any]:
        kept = io.BytesIO()
        torch.save(it.state_dict(), kept)
        kept.seek(0)
        return dict(torch.load(kept, weights_only=True))

    def watch(it: PhaseLoader) -> list[Any]:
        return [(item["phase"], [(q.id, q.demonstration) for q in item["questions"]]) for item in it]

    it = loader(rl_steps=2)
    next(it)
    it.more()
    it.push([{**entries(0)[0], "demonstration": [7, 8, 9]}, *entries(1, 2, 3)])
    states = [state_of(it)]
    next(it)
    states.append(state_of(it))
    rest = watch(it)
    for state, skipped in zip(states, (0, 1), strict=True):
        again = loader(rl_steps=2)
        again.load_state_dict(state)
        assert watch(again)[1 - skipped :] == rest


def test_stages_on_all_demonstrations_use_each_once_per_epoch() -> None:
    items = list(loader(rl_steps=0, sft_before=10))
    seen = [q.id for item in items for q in item["questions"]]
    assert {item["phase"] for item in items} == {"sft"}
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_every_sft_epoch_shows_every_demonstration_once() -> None:
    it = loader(rl_steps=1, sft_epochs=3)
    next(it)
    it.push(entries(*range(8)))
    seen = [q.id for item in it for q in item["questions"]]
    assert [sorted(seen[i : i + 8]) for i in (0, 8, 16)] == [list(range(8))] * 3
    assert len({tuple(seen[i : i + 8]) for i in (0, 8, 16)}) == 3


def test_ranks_share_the_work_of_one_process() -> None:
    whole = loader()
    ranks = [loader(rank=r, world_size=2) for r in range(2)]
    for i in range(5):
        items = [next(it) for it in (whole, *ranks)]
        ids = [[q.id for q in item["questions"]] for item in items]
        assert sorted(ids[0]) == sorted(ids[1] + ids[2])
        if i == 1:
            for it in (whole, *ranks):
                it.push(entries(5, 6))


@pytest.mark.parametrize("stop", range(1, 13))
def test_a_restored_loader_goes_on_exactly(stop: int) -> None:
    def run(it: PhaseLoader, begin: int, log: list[Any]) -> PhaseLoader:
        for i, item in enumerate(it, begin):
            log.append(brief(item))
            if i in (2, 9):
                it.push(entries(1, 4, 7, 9))
            if i + 1 == stop and begin == 0:
                break
        return it

    settings: dict[str, Any] = {"epochs_per_rollout": 2, "sft_before": 1, "prompts_per_step": 4}
    undisturbed: list[Any] = []
    for i, item in enumerate(it := loader(**settings)):
        undisturbed.append(brief(item))
        if i in (2, 9):
            it.push(entries(1, 4, 7, 9))
    resumed: list[Any] = []
    state = run(loader(**settings), 0, resumed).state_dict()
    fresh = loader(**settings)
    fresh.load_state_dict(json.loads(json.dumps(state)))
    run(fresh, stop, resumed)
    assert resumed == undisturbed


def test_it_has_a_length_so_that_nothing_is_fetched_ahead() -> None:
    assert len(loader()) > 10**8


def test_share_done_reaches_one() -> None:
    it = loader(sft_before=2, minibatches=2)
    shares = [it.share_done for _ in it]
    assert shares == sorted(shares)
    assert it.share_done == 1
    assert list(it) == []
    assert loader(rl_steps=None).share_done is None


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"prompts_per_step": 3, "world_size": 2}, "prompts_per_step: 3"),
        ({"prompts_per_step": 24}, "prompts_per_step: 24"),
        ({"sft_before": 1, "demonstrated": 0}, "sft_batch: 2"),
        ({"sft_before": 1, "sft_batch": 3, "world_size": 2}, "sft_batch: 3 does not divide by 2"),
        ({"phase_size": 12}, "buffer.size: 12"),
        ({"phase_size": 22, "own_demonstrations": True}, "buffer.size: 22"),
        ({"phase_size": 5}, "sft_batch: 2 does not divide an SFT phase of 5"),
        ({"rl_steps": 0}, "rl_steps: 0"),
        ({"rl_steps": None, "sft_after": 3}, "sft_after: 3"),
        ({"epochs_per_rollout": 0}, "epochs_per_rollout: 0"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=key):
        loader(**changes)


def test_a_phase_that_leaves_a_partial_batch_is_refused() -> None:
    with pytest.raises(InputError, match="sft_batch: 2 does not divide an SFT phase of 3"):
        loader().push(entries(1, 2, 3))


def test_other_questions_or_other_updates_are_refused_on_resume() -> None:
    it = loader(epochs_per_rollout=2)
    next(it)
    state = it.state_dict()
    with pytest.raises(InputError, match="20 then, 19 now"):
        loader(n=19, epochs_per_rollout=2).load_state_dict(state)
    with pytest.raises(InputError, match="phase of 2 updates, which would now have 3"):
        loader(epochs_per_rollout=3).load_state_dict(state)
    next(it)
    extended = loader(epochs_per_rollout=3, rl_steps=9)
    extended.load_state_dict(it.state_dict())
    assert [next(extended)["rollout"] for _ in range(4)] == [1, 1, 1, 2]


def test_own_demonstrations_need_none_in_the_data() -> None:
    assert next(loader(demonstrated=0, phase_size=12, own_demonstrations=True))["phase"] == "rl"


def test_rl_alone_does_not_care_about_sft_batches() -> None:
    assert next(loader(sft_batch=5, world_size=2))["phase"] == "rl"


# --- which phase an item belongs to, and how a run ends ---------------------------------------------------------------


def test_two_sft_phases_in_a_row_have_two_numbers_and_rollouts_in_a_row_have_one() -> None:
    it = loader(sft_before=2, sft_after=2, rl_steps=3)
    seen = []
    for item in it:
        seen.append((item["phase"][0], item["phase_number"]))
        if item["phase"] == "rl" and item["rollout"] in (1, 2):
            it.push(entries(0, 1, 2, 3))
    before, pushed = [("s", 0)] * 2, [("s", 1)] * 2
    rl, last = [("r", 1)] * 2, [("r", 2)]
    assert seen == [*before, *rl, *pushed, *last, *[("s", 2)] * 2, *[("s", 3)] * 2]


@pytest.mark.parametrize("stop", range(6))
def test_the_number_of_a_phase_survives(stop: int) -> None:
    def numbers(it: PhaseLoader) -> list[int]:
        return [item["phase_number"] for item in it]

    def begun() -> PhaseLoader:
        it = loader(rl_steps=1, sft_after=2)
        next(it)
        it.push(entries(0, 1))
        it.push(entries(2, 3, 4, 5))
        return it

    whole, first, second = begun(), begun(), loader(rl_steps=1, sft_after=2)
    kept = [next(first)["phase_number"] for _ in range(stop)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert kept + numbers(second) == numbers(whole) == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("final_sft", ["keep", "drop"])
def test_a_pushed_phase_that_no_rl_follows_is_kept_or_dropped(final_sft: str) -> None:
    it = loader(rl_steps=2, sft_after=1, final_sft=final_sft)
    seen = []
    for item in it:
        seen.append(item["phase"][0])
        if item["phase"] == "rl":
            it.push(entries(0, 1, 2, 3))
    assert "".join(seen) == ("rssrsss" if final_sft == "keep" else "rssrs")
    assert it.position["dropped"] == (0 if final_sft == "keep" else 1)


def test_dropping_needs_a_last_rl_step() -> None:
    with pytest.raises(InputError, match=r"data\.schedule\.final_sft: drop needs data\.schedule\.rl_steps"):
        loader(rl_steps=None, final_sft="drop")
