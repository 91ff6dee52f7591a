"""QuestionData: what is held out, what every rank evaluates, and what is refused before training begins."""

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks, weights

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.data.columns import Columns
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.data.question import Question
from mifo_lightning.data.rows import read_rows
from mifo_lightning.data.skills import Skills
from mifo_lightning.data.source import Row, RowSource
from mifo_lightning.errors import InputError
from mifo_lightning.module import MifoModule
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.schedule import Schedule


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
    data = make_data(**{"train": Numbered(30), **changes})
    data.trainer = trainer_of(rank, ranks, callbacks)
    data.setup(stage)
    return data


def trainer_of(rank: int, ranks: int, callbacks: Any = (), micro: int = 1) -> Any:
    """What a QuestionData asks a Trainer."""
    return SimpleNamespace(
        callbacks=list(callbacks),
        accumulate_grad_batches=micro,
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
    data = attached(holdout=11, schedule=Schedule(rl_steps=10, rl_questions=4, sft_batch=4, sft_before=3))
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


# --- sizes that the data cannot fill ----------------------------------------------------------------------------------


def fitted(
    count: int, size: int | None = None, holdout: int = 0, micro: int = 1, ranks: int = 1, **schedule: Any
) -> dict[str, tuple[int, int]]:
    """What is fitted to so many questions, two of three of them with a demonstration; the loader takes it."""
    switch = [BufferPhaseSwitch(size=size)] if size else []
    plan = Schedule(**{"rl_steps": 2, "rl_questions": 4, "sft_batch": 4, **schedule})
    data = make_data(train=Numbered(count), holdout=holdout, schedule=plan)
    data.trainer = trainer_of(0, ranks, switch, micro)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data.setup("validate")
        data.setup("fit")
        loader = data.train_dataloader()
        data.setup("fit")
    lines = [str(warning.message) for warning in said]
    assert sorted(line.split(", fitted to")[0] for line in lines) == sorted(
        f"{key}: {asked} → {taken}" for key, (asked, taken) in data.fitted.items()
    )
    assert all("\n" not in line for line in lines)
    for item in loader:
        if item["phase"] == "rl" and switch:
            loader.push([{"id": i} for i in loader.demonstrated[: switch[0].size]])
    return data.fitted


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        ({"size": 20}, {}),
        ({"size": 6, "sft_epochs": 2}, {}),
        ({"size": 24}, {"switch.size": 18, "data.schedule.sft_batch": 3}),  # six steps a phase, as asked for
        ({"size": 24, "sft_batch": 24}, {"switch.size": 20, "data.schedule.sft_batch": 20}),
        (
            {"size": 128, "sft_batch": 64, "rl_questions": 32, "sft_epochs": 2},
            {"switch.size": 20, "data.schedule.sft_batch": 10, "data.schedule.rl_questions": 30},
        ),
        ({"size": 6}, {"switch.size": 4}),
        ({"size": 7, "sft_batch": 8}, {"data.schedule.sft_batch": 7}),
        ({"size": 7, "sft_batch": 8, "ranks": 2}, {"data.schedule.sft_batch": 6, "switch.size": 6}),
        ({"size": 7, "sft_batch": 64, "sft_epochs": 2}, {"data.schedule.sft_batch": 7}),  # a step an epoch
        ({"size": 5, "sft_batch": 14, "sft_epochs": 3}, {"data.schedule.sft_batch": 12, "switch.size": 4}),
        ({"sft_batch": 64, "sft_before": 2}, {"data.schedule.sft_batch": 20}),
        ({"sft_batch": 64, "sft_after": 2, "micro": 4, "ranks": 2}, {"data.schedule.sft_batch": 16}),
        ({"rl_questions": 32}, {"data.schedule.rl_questions": 30}),
        ({"rl_questions": 32, "minibatches": 4}, {"data.schedule.rl_questions": 28}),
        ({"rl_questions": 32, "micro": 16}, {"data.schedule.rl_questions": 28}),
        ({"rl_questions": 32, "rl_steps": 1, "holdout": 30}, {"data.holdout": 6, "data.schedule.rl_questions": 24}),
        ({"holdout": 29, "rl_questions": 2}, {"data.schedule.rl_questions": 1}),
        ({"sft_batch": 64}, {}),
    ],
    ids=str,
)
def test_sizes_that_the_data_cannot_fill_are_fitted_and_each_is_said(
    arguments: dict[str, Any], taken: dict[str, int]
) -> None:
    assert {key: small for key, (_, small) in fitted(30, **arguments).items()} == taken


def test_what_can_be_run_is_never_changed_and_what_is_fitted_can_be_run_and_has_not_grown() -> None:
    def runs(plan: Schedule, shown: int, size: int | None, unit: int) -> bool:
        try:
            plan.check_sft(shown, size, unit, 1)
            plan.check_rl(shown, 2, 1, unit)
        except InputError:
            return False
        return True

    seen = {"as it is": 0, "fitted": 0, "refused": 0}
    choices = (range(1, 10), range(1, 10), (1, 2, 3), (None, *range(1, 10)), (1, 2, 3), (0, 1))
    for shown, batch, epochs, size, unit, before in itertools.product(*choices):
        plan = Schedule(rl_steps=1, rl_questions=2 * unit, sft_batch=batch, sft_epochs=epochs, sft_before=before)
        other, taken = plan.fit_rl(shown, 2, 1, unit).fit_sft(shown, size, unit, 1)
        if runs(plan, shown, size, unit):
            assert (other, taken) == (plan, size)
            seen["as it is"] += 1
        elif runs(other, shown, taken, unit):
            assert other.sft_batch <= batch
            assert other.rl_questions <= plan.rl_questions
            assert (taken or 0) <= (size or 0)
            seen["fitted"] += 1
        else:
            smaller = itertools.product(range(unit, batch + 1, unit), range(1, (size or 1) + 1))
            could = [x for x in smaller if runs(replace(other, sft_batch=x[0]), shown, size and x[1], unit)]
            assert batch % unit or not could
            seen["refused"] += 1
    assert min(seen.values()) > 1000, seen


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"size": 128, "sft_batch": 64, "micro": 32, "rl_questions": 8},
            r"switch\.size: 128 .*20.*lower trainer.accum",
        ),
        (
            {"sft_batch": 64, "sft_before": 1, "micro": 32, "rl_questions": 8},
            r"sft_batch: 64 .*20.*lower trainer.accum",
        ),
        ({"size": 6, "sft_batch": 3, "ranks": 2}, r"sft_batch: 3 does not divide by 2"),
        ({"rl_questions": 5, "ranks": 2}, r"rl_questions: 5 does not divide by 2"),
        ({"rl_questions": 64, "micro": 256}, r"rl_questions: 64 .*30"),
    ],
    ids=str,
)
def test_what_no_size_fits_and_what_ranks_and_micro_batches_ask_for_is_refused(
    arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        fitted(30, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 24}, r"switch\.size: 24 .*20"),
        ({"size": 20, "holdout": 15}, r"switch\.size: 20"),
        ({"size": 6}, r"sft_batch: 4 .* 6 .*switch\.size"),
    ],
    ids=str,
)
def test_a_buffer_that_can_never_fill_or_does_not_divide_is_refused_where_nothing_is_fitted(
    arguments: dict[str, Any], text: str
) -> None:
    callbacks = [BufferPhaseSwitch(size=arguments["size"])]
    schedule = Schedule(rl_steps=1, rl_questions=4, sft_batch=4)
    data = attached(callbacks=callbacks, schedule=schedule, fit_sizes=False, holdout=arguments.get("holdout", 0))
    with pytest.raises(InputError, match=text):
        data.train_dataloader()


def test_a_held_out_question_that_is_trained_on_too_is_said() -> None:
    with pytest.warns(UserWarning, match=r"data\.holdout: 1 of 1 are trained on too: data\.train holds them twice"):
        attached(train=[Numbered(6), Numbered(6)], holdout=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(train=[Numbered(6), Numbered(6)])


def test_a_resumed_run_fits_the_same_and_ends_with_the_same_bits(make_trainer: Any, tmp_path: Path) -> None:
    def fit(path: Path | None, **changes: Any) -> tuple[MifoModule, QuestionData, Any]:
        schedule = Schedule(rl_steps=3, rl_questions=512, sft_batch=32, sft_epochs=2)
        data = make_data(train=Skills(["addition", "mirrored"], 12), holdout=64, schedule=schedule)
        module, trainer = (
            make_module(),
            make_trainer([*method_callbacks()[:-1], BufferPhaseSwitch(size=64, p=1.0)], max_epochs=-1, **changes),
        )
        with pytest.warns(UserWarning, match=r"switch\.size: 64 → 10"):
            trainer.fit(module, datamodule=data, ckpt_path=path)
        return module, data, trainer

    whole, data, _ = fit(None)
    _, _, cut = fit(None, max_steps=3)
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    resumed, same, trainer = fit(tmp_path / "cut.ckpt")
    assert trainer.global_step > 3
    assert data.fitted == same.fitted
    assert data.fitted["data.schedule.rl_questions"] == (512, 10)
    assert data.fitted["data.schedule.sft_batch"] == (32, 5)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_damage_spares_the_fitted_holdout() -> None:
    data = attached(holdout=128, damaged_share=1.0, train=Skills(["addition"], 30))
    held, train = data._questions["holdout"], data._questions["train"]
    assert (len(held), len(train)) == (6, 24)
    whole = {q.text: q.demonstration for q in attached(train=Skills(["addition"], 30))._questions["train"]}
    assert all(q.demonstration == whole[q.text] for q in held)
    assert sum(q.demonstration != whole[q.text] for q in train) > 12


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
        ({"max_prompt_tokens": 0}, r"data\.max_prompt_tokens: 0"),
        ({"max_response_tokens": 0}, r"data\.max_response_tokens: 0"),
        ({"schedule": Schedule(rl_questions=0)}, r"data\.schedule\.rl_questions: 0"),
        ({"fit_sizes": False, "holdout": 30}, r"data\.holdout: 30 .*30"),
        ({"fit_sizes": False, "schedule": Schedule(rl_questions=32)}, r"rl_questions: 32 .*30"),
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
