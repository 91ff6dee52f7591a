"""The progress bar, and its lines where there is no terminal."""

from collections.abc import Callable

import pytest
from conftest import make_module
from lightning import Trainer
from monitoring import Sums, additions

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.monitors.progress import PhaseProgress
from mifo_lightning.schedule import Schedule

MakeTrainer = Callable[..., Trainer]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines() if "%" in line]


def test_progress_without_a_terminal_is_a_few_plain_lines(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [BufferPhaseSwitch(size=8, p=0.5), PhaseProgress(lines=3)]
    trainer = make_trainer(callbacks, enable_progress_bar=True)
    trainer.fit(make_module(engine=Sums(False)), datamodule=additions())
    # four wrong answers fill half of the buffer; buffer-triggered phases take no share of the run
    assert lines_of(capsys) == [
        " 33%  RL step 2  reward 0.00  buffer 0/8  SFT phases 1",
        " 67%  RL step 4  reward 0.00  buffer 0/8  SFT phases 2",
        "100%  RL step 6  reward 0.00  buffer 0/8  SFT phases 3",
    ]


def test_progress_counts_planned_sft_and_names_its_phase(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [BufferPhaseSwitch(size=8), PhaseProgress(lines=100)]
    schedule = Schedule(rl_steps=2, rl_questions=4, sft_batch=4, sft_before=1, sft_after=1)
    trainer = make_trainer(callbacks, enable_progress_bar=True)
    trainer.fit(make_module(engine=Sums(True)), datamodule=additions(schedule=schedule))
    lines = [line.split("  ") for line in lines_of(capsys)]
    assert [line[:2] for line in lines] == [
        [" 25%", "SFT phase 1"],
        [" 50%", "RL step 1"],
        [" 75%", "RL step 2"],
        ["100%", "SFT phase 2"],
    ]
    assert {tuple(line[-2:]) for line in lines} == {("buffer 0/8", "SFT phases 0")}


def test_progress_shows_the_reward_of_the_step_it_names(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = Schedule(rl_steps=4, rl_questions=4)
    trainer = make_trainer([PhaseProgress(lines=4)], enable_progress_bar=True)
    trainer.fit(make_module(engine=Sums(True, False, False, True)), datamodule=additions(schedule=schedule))
    assert lines_of(capsys) == [
        " 25%  RL step 1  reward 1.00",
        " 50%  RL step 2  reward 0.00",
        " 75%  RL step 3  reward 0.00",
        "100%  RL step 4  reward 1.00",
    ]


def test_progress_without_a_number_of_rl_steps_follows_the_trainer(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = Schedule(rl_steps=None, rl_questions=4)
    trainer = make_trainer([PhaseProgress(lines=2)], enable_progress_bar=True, max_steps=4, max_epochs=-1)
    trainer.fit(make_module(engine=Sums(True)), datamodule=additions(schedule=schedule))
    assert lines_of(capsys) == [" 50%  RL step 2  reward 1.00", "100%  RL step 4  reward 1.00"]


def test_progress_that_is_disabled_prints_nothing(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = PhaseProgress(lines=100)
    progress.disable()
    trainer = make_trainer([progress], enable_progress_bar=True)
    trainer.fit(make_module(engine=Sums(True)), datamodule=additions())
    assert lines_of(capsys) == []
