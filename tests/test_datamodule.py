"""QuestionData: what is held out, what every rank evaluates, and what is refused before training begins."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ALONE, make_data

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.columns import Columns
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.data.rows import read_rows
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.data.source import Row, RowSource
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rewards.points import PointsReward


class Numbered(RowSource):
    """Row i asks for i: of source `a` for the first two thirds, then of source `b`; every third has no demonstration.

    Args:
        count: Number of rows.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def rows(self) -> list[Row]:
        return [
            {
                "data_source": "a" if 3 * i < 2 * self.count else "b",
                "prompt": [{"role": "user", "content": f"{i}="}],
                "target": None if i % 3 == 2 else [{"role": "assistant", "content": f">{i}"}],
                "reward_model": {"style": "rule", "ground_truth": str(i)},
            }
            for i in range(self.count)
        ]


def attached(stage: str = "fit", rank: int = 0, ranks: int = 1, callbacks: Any = (), **changes: Any) -> QuestionData:
    """A QuestionData on `Numbered` rows, set up as a Trainer on this rank does it."""
    data = make_data(**{**ALONE, "train": Numbered(30), **changes})
    data.trainer = trainer_of(rank, ranks, callbacks)
    data.setup(stage)
    return data


def trainer_of(rank: int, ranks: int, callbacks: Any = ()) -> Any:
    """What a QuestionData asks a Trainer."""
    return SimpleNamespace(
        callbacks=list(callbacks),
        global_rank=rank,
        world_size=ranks,
        lightning_module=None,
    )


def evaluated(data: QuestionData, split: str = "val") -> dict[str, list[list[Question]]]:
    """The batches of every evaluation source."""
    loaders = data.val_dataloader() if split == "val" else data.test_dataloader()
    return {source: list(loader) for source, loader in loaders.items()}


def texts(batches: list[list[Question]]) -> list[str]:
    return [q.text for batch in batches for q in batch]


def test_held_out_questions_leave_training_and_nothing_is_lost() -> None:
    data = attached(holdout=11)
    train = data.train_dataloader().questions
    held = evaluated(data)
    out = [q for batches in held.values() for batch in batches for q in batch]
    assert len(train) == 19
    assert len(out) == 11
    assert sorted([q.text for q in train + out]) == sorted(f"{i}=" for i in range(30))
    assert [q.id for q in train] == list(range(19))
    assert [int(q.truth) for q in train] == sorted(int(q.truth) for q in train)
    assert {q.source for q in train} == {"a", "b"}
    assert held.keys() == {"a-holdout", "b-holdout"}
    for source, batches in held.items():
        assert {q.source for batch in batches for q in batch} == {source}
        assert all((int(q.truth) < 20) == (source == "a-holdout") for batch in batches for q in batch)


def test_work_items_hold_training_questions_only_and_demonstrations_of_the_same_question() -> None:
    data = attached(holdout=11, schedule=Schedule(rl_steps=10, prompts_per_step=4, sft_batch=4, sft_before=3))
    held = {text for batches in evaluated(data).values() for text in texts(batches)}
    loader = data.train_dataloader()
    items = [(item["phase"], q) for item in loader for q in item["questions"]]
    assert {phase for phase, _ in items} == {"rl", "sft"}
    assert not {q.text for _, q in items} & held
    for _, q in items:
        assert loader.questions[q.id] is q
        assert q.text == f"{q.truth}="
        assert bool(q.demonstration) == (int(q.truth) % 3 != 2)
        assert not q.demonstration or data.tokenizer.decode(q.demonstration) == f">{q.truth}<eos>"


def test_the_seed_chooses_what_is_held_out() -> None:
    def held(seed: int) -> list[int]:
        loaders = evaluated(attached(holdout=10, seed=seed)).values()
        return sorted(int(text[:-1]) for batches in loaders for text in texts(batches))

    assert held(0) == held(0)
    assert len({tuple(held(seed)) for seed in range(5)}) == 5
    for seed in range(5):
        assert held(seed) not in (list(range(10)), list(range(20, 30)))


def test_validation_alone_sees_the_same_held_out_questions_as_a_fit() -> None:
    val = Skills(["addition"], 6, split="val")
    fit, validate = (evaluated(attached(stage, holdout=10, val=val)) for stage in ("fit", "validate"))
    assert {s: texts(b) for s, b in fit.items()} == {s: texts(b) for s, b in validate.items()}
    assert fit.keys() == {"a-holdout", "b-holdout", "addition"}
    assert len(texts(fit["addition"])) == 6


def test_nothing_is_held_out_unless_asked_for() -> None:
    data = attached()
    assert len(data.train_dataloader().questions) == 30
    assert evaluated(data) == {}


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_ranks_share_the_evaluation_and_take_as_many_batches(split: str, ranks: int, size: int) -> None:
    stage = "validate" if split == "val" else "test"
    rows = {split: Numbered(21)}  # 14 questions of a, 7 of b
    shares = [evaluated(attached(stage, rank, ranks, eval_batch=size, **rows), split) for rank in range(ranks)]
    for source, numbers in (("a", range(14)), ("b", range(14, 21))):
        assert len({len(share[source]) for share in shares}) == 1
        assert max(len(batch) for share in shares for batch in share[source]) <= size
        seen = [text for share in shares for text in texts(share[source])]
        assert sorted(seen) == sorted(f"{i}=" for i in numbers)
        counts = [len(texts(share[source])) for share in shares]
        assert max(counts) - min(counts) <= 1
    assert all(share.keys() == {"a", "b"} for share in shares)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_an_evaluation_loader_knows_its_length(size: int) -> None:
    loaders = attached("test", test=Numbered(21), eval_batch=size).test_dataloader()
    for loader in loaders.values():
        assert len(loader) == len(list(loader)) == len(list(loader))
    assert [len(loader) for loader in loaders.values()] == [-(-14 // size), -(-7 // size)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_loader_is_that_of_this_rank(ranks: int) -> None:
    whole = [q.id for item in attached().train_dataloader() for q in item["questions"]]
    shares = [
        [q.id for item in attached(rank=rank, ranks=ranks).train_dataloader() for q in item["questions"]]
        for rank in range(ranks)
    ]
    assert [i for row in zip(*shares, strict=True) for i in row] == whole


def test_a_held_out_question_that_is_trained_on_too_is_said() -> None:
    with pytest.warns(UserWarning, match=r"data\.holdout: 1 of 1 are trained on too: data\.train holds them twice"):
        attached(train=[Numbered(6), Numbered(6)], holdout=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(train=[Numbered(6), Numbered(6)])


def test_a_test_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.test: null"):
        attached("test")
    empty = tmp_path / "none.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match=r"none\.jsonl|data\.test"):
        attached("test", test=str(empty))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"holdout": -1}, r"data\.holdout: -1"),
        ({"columns": Columns(truth_after="")}, r"data\.columns\.truth_after: '' "),
        ({"eval_batch": 0}, r"data\.eval_batch: 0"),
        ({"max_prompt_tokens": 0}, r"data\.prompts\.max_tokens: 0"),
        ({"max_tokens": 0}, r"data\.demonstrations\.max_tokens: 0"),
        ({"schedule": Schedule(prompts_per_step=0)}, r"data\.schedule\.prompts_per_step: 0"),
        ({"schedule": Schedule(fit_sizes=False), "holdout": 30}, r"data\.holdout: 30 .*30"),
        ({"schedule": Schedule(fit_sizes=False, prompts_per_step=32)}, r"prompts_per_step: 32 .*30"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        attached(**changes).train_dataloader()


def test_rows_are_read_once_and_the_reward_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closing(LastAnswerReward):
        isolate = False
        closed = 0

        def close(self) -> None:
            self.closed += 1

    read = []
    monkeypatch.setattr("mifo_lightning.data.datamodule.read_rows", lambda *a: read.append(a) or read_rows(*a))
    reward = Closing()
    data = attached(reward=reward, val=Numbered(3))
    data.setup("validate")
    data.setup("fit")
    assert len(read) == 2
    data.teardown("fit")
    assert reward.closed == 1


def test_a_truth_that_no_response_can_meet_is_refused_before_training() -> None:
    """Where rows are read, on every rank alike: one rank that met it while it graded would leave the others waiting."""
    with pytest.raises(
        InputError, match=r"^data\.train: '.*': PointsReward: ground truth is '0', allowed is"
    ) as refused:
        attached(reward=PointsReward(), verify=False)
    assert "\n" not in str(refused.value)
