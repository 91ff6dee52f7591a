"""Small data: what it cannot fill is made smaller, said and recorded, or refused; what it can fill stays."""

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALONE, make_data, make_module, method_callbacks, weights
from test_datamodule import Numbered, attached, trainer_of

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.module import MifoModule


def fitted(
    count: int, size: int | None = None, holdout: int = 0, ranks: int = 1, **schedule: Any
) -> dict[str, tuple[int, int]]:
    """What is fitted to so many questions, two of three of them with a demonstration; the loader takes it."""
    switch = [BufferPhaseSwitch(size=size)] if size else []
    plan = Schedule(**{"rl_steps": 2, "prompts_per_step": 4, "sft_batch": 4, **schedule})
    data = make_data(**ALONE, train=Numbered(count), holdout=holdout, schedule=plan)
    data.trainer = trainer_of(0, ranks, switch)
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
        ({"size": 24}, {"buffer.size": 18, "data.schedule.sft_batch": 3}),  # six steps a phase, as asked for
        ({"size": 24, "sft_batch": 24}, {"buffer.size": 20, "data.schedule.sft_batch": 20}),
        (
            {"size": 128, "sft_batch": 64, "prompts_per_step": 32, "sft_epochs": 2},
            {"buffer.size": 20, "data.schedule.sft_batch": 10, "data.schedule.prompts_per_step": 30},
        ),
        ({"size": 7, "sft_batch": 8}, {"data.schedule.sft_batch": 7}),
        ({"size": 7, "sft_batch": 64, "sft_epochs": 2}, {"data.schedule.sft_batch": 7}),  # a step an epoch
        ({"size": 25, "sft_batch": 14, "sft_epochs": 3}, {"data.schedule.sft_batch": 12, "buffer.size": 20}),
        ({"sft_batch": 64, "sft_before": 2}, {"data.schedule.sft_batch": 20}),
        ({"sft_batch": 64, "sft_after": 2, "prompts_per_step": 8, "ranks": 8}, {"data.schedule.sft_batch": 16}),
        ({"prompts_per_step": 32}, {"data.schedule.prompts_per_step": 30}),
        ({"prompts_per_step": 32, "minibatches": 4}, {"data.schedule.prompts_per_step": 28}),
        (
            {"prompts_per_step": 32, "rl_steps": 1, "holdout": 30},
            {"data.holdout": 6, "data.schedule.prompts_per_step": 24},
        ),
        ({"holdout": 29, "prompts_per_step": 2}, {"data.schedule.prompts_per_step": 1}),
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
            plan.check_sft(shown, size, unit)
            plan.check_rl(shown, unit)
        except InputError:
            return False
        return True

    seen = {"as it is": 0, "fitted": 0, "refused": 0}
    choices = (range(1, 10), range(1, 10), (1, 2, 3), (None, *range(1, 10)), (1, 2, 3), (0, 1))
    for shown, batch, epochs, size, unit, before in itertools.product(*choices):
        plan = Schedule(rl_steps=1, prompts_per_step=2 * unit, sft_batch=batch, sft_epochs=epochs, sft_before=before)
        other, taken = plan.fit_rl(shown, unit).fit_sft(shown, size, unit)
        if runs(plan, shown, size, unit):
            assert (other, taken) == (plan, size)
            seen["as it is"] += 1
        elif runs(other, shown, taken, unit):
            assert other.sft_batch <= batch
            assert other.prompts_per_step <= plan.prompts_per_step
            assert (taken or 0) <= (size or 0)
            seen["fitted"] += 1
        else:
            smaller = itertools.product(range(unit, batch + 1, unit), range(1, (size or 1) + 1))
            could = [x for x in smaller if runs(replace(other, sft_batch=x[0]), shown, size and x[1], unit)]
            fills = size is not None and size <= shown  # S is the method's: where the data can fill it, it stays
            assert batch % unit or fills or not could
            seen["refused"] += 1
    assert min(seen.values()) > 1000, seen


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"size": 128, "sft_batch": 64, "ranks": 32, "prompts_per_step": 32},
            r"prompts_per_step: 32 is more than the 30",
        ),
        (
            {"sft_batch": 64, "sft_before": 1, "ranks": 32, "prompts_per_step": 32},
            r"prompts_per_step: 32 is more than the 30",
        ),
        ({"size": 6, "sft_batch": 3, "ranks": 2}, r"sft_batch: 3 does not divide by 2"),
        ({"size": 6}, r"sft_batch: 4 does not divide an SFT phase of 6 demonstrations"),
        ({"size": 7, "sft_batch": 8, "ranks": 2}, r"sft_batch: 8 does not divide an SFT phase of 7 demonstrations"),
        ({"prompts_per_step": 5, "ranks": 2}, r"prompts_per_step: 5 does not divide by 2"),
        ({"prompts_per_step": 64, "minibatches": 32}, r"prompts_per_step: 64 .*30"),
    ],
    ids=str,
)
def test_what_no_size_fits_and_what_ranks_and_minibatches_ask_for_is_refused(
    arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        fitted(30, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 24}, r"buffer\.size: 24 .*20"),
        ({"size": 20, "holdout": 15}, r"buffer\.size: 20"),
        ({"size": 6}, r"sft_batch: 4 .* 6 .*buffer\.size"),
    ],
    ids=str,
)
def test_a_buffer_that_can_never_fill_or_does_not_divide_is_refused_where_nothing_is_fitted(
    arguments: dict[str, Any], text: str
) -> None:
    callbacks = [BufferPhaseSwitch(size=arguments["size"])]
    schedule = Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4, fit_sizes=False)
    data = attached(callbacks=callbacks, schedule=schedule, holdout=arguments.get("holdout", 0))
    with pytest.raises(InputError, match=text):
        data.train_dataloader()


def test_a_resumed_run_fits_the_same_and_ends_with_the_same_bits(make_trainer: Any, tmp_path: Path) -> None:
    def fit(path: Path | None, **changes: Any) -> tuple[MifoModule, QuestionData, Any]:
        schedule = Schedule(rl_steps=3, prompts_per_step=512, sft_batch=32, sft_epochs=2)
        data = make_data(**ALONE, train=Skills(["addition", "mirrored"], 12), holdout=64, schedule=schedule)
        module, trainer = (
            make_module(),
            make_trainer(
                [*method_callbacks()[:-1], BufferPhaseSwitch(size=64, max_accuracy=1.0)], max_epochs=-1, **changes
            ),
        )
        with pytest.warns(UserWarning, match=r"buffer\.size: 64 → 10"):
            trainer.fit(module, datamodule=data, ckpt_path=path)
        return module, data, trainer

    whole, data, _ = fit(None)
    _, _, cut = fit(None, max_steps=3)
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    resumed, same, trainer = fit(tmp_path / "cut.ckpt")
    assert trainer.global_step > 3
    assert data.fitted == same.fitted
    assert data.fitted["data.schedule.prompts_per_step"] == (512, 10)
    assert data.fitted["data.schedule.sft_batch"] == (32, 5)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_data_that_is_used_twice_is_fitted_and_seeded_by_each_module(make_trainer: Any) -> None:
    data = make_data(seed=None, schedule=Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4))
    found = []
    for seed, size in ((1, 2), (2, 8)):
        switch = BufferPhaseSwitch(size=size, max_accuracy=1.0)
        make_trainer([switch], max_epochs=-1).fit(make_module(seed=seed), datamodule=data)
        found.append((data.seed.value, data._loader.schedule.sft_batch, data.fitted))
    assert data.schedule.sft_batch == 4  # what was asked for stays
    assert found == [(1, 2, {"data.schedule.sft_batch": (4, 2)}), (2, 4, {})]


def test_what_is_said_of_data_after_a_fit_holds_for_the_next(make_trainer: Any) -> None:
    data, module = make_data(val=None, schedule=Schedule(rl_steps=1, prompts_per_step=512, sft_batch=4)), make_module()

    def fit() -> tuple[int, int, int]:
        trainer = make_trainer([], max_epochs=-1)
        trainer.fit(module, datamodule=data)
        loader = data._loader
        return len(loader.questions), len(data._questions["holdout"]), loader.schedule.prompts_per_step

    assert fit() == (64, 0, 64)
    assert data.fitted == {"data.schedule.prompts_per_step": (512, 64)}
    data.holdout, data.schedule.prompts_per_step = 8, 16
    assert fit() == (56, 8, 16)
    assert data.fitted == {}
    data.sources["train"], data.holdout = Skills(["addition"], 10), 0
    data.demonstrations.max_tokens = 1
    assert fit() == (10, 0, 10)
    assert not any(q.demonstration for q in data._loader.questions)


def test_a_buffer_that_was_fitted_to_few_questions_asks_for_its_own_size_again(make_trainer: Any) -> None:
    switch, module = BufferPhaseSwitch(size=16, max_accuracy=1.0), make_module()
    sizes = []
    schedule = Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4)
    for count in (8, 64, 8, 64):
        data = make_data(train=Skills(["addition"], count), schedule=schedule)
        make_trainer([switch], max_epochs=-1).fit(module, datamodule=data)
        sizes.append(switch.size)
        if len(sizes) == 3:
            switch.size = 4  # said anew
    assert sizes == [8, 16, 8, 4]


def test_damage_spares_the_fitted_holdout() -> None:
    data = attached(holdout=128, damaged_share=1.0, train=Skills(["addition"], 30))
    held, train = data._questions["holdout"], data._questions["train"]
    assert (len(held), len(train)) == (6, 24)
    whole = {q.text: q.demonstration for q in attached(train=Skills(["addition"], 30))._questions["train"]}
    assert all(q.demonstration == whole[q.text] for q in held)
    assert sum(q.demonstration != whole[q.text] for q in train) > 12
