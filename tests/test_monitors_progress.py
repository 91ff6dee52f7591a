"""The progress bar, and its lines where there is no terminal."""

import re
from collections.abc import Callable

import pytest
from conftest import make_data, make_module
from lightning import Trainer
from monitoring import Sums, additions

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.monitors.progress import DecodingView, PhaseProgress
from mifo_lightning.rollout.engine import Decoded

MakeTrainer = Callable[..., Trainer]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines() if "%" in line]


def test_progress_without_a_terminal_is_a_few_plain_lines(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [BufferPhaseSwitch(size=8, max_accuracy=0.5), PhaseProgress(lines=3)]
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
    schedule = Schedule(rl_steps=2, prompts_per_step=4, sft_batch=4, sft_before=1, sft_after=1)
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
    schedule = Schedule(rl_steps=4, prompts_per_step=4)
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
    schedule = Schedule(rl_steps=None, prompts_per_step=4)
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


def decoding_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    return [line for line in lines if "at most 8," not in line]  # the self-check's


def test_rollouts_and_evaluations_that_last_are_lines_with_their_speed(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer([PhaseProgress(seconds=1e-9)], enable_progress_bar=True, limit_val_batches=1.0)
    module = make_module()
    data = make_data(holdout=16, eval_batch=8, schedule=Schedule(rl_steps=1, prompts_per_step=4))
    trainer.validate(module, data, verbose=False)
    lines = decoding_lines(capsys)
    assert re.fullmatch(r"evaluation: batch 1 of 2, 0 of 8 responses, token 1 of at most 14, \d+ tokens/s", lines[1]), (
        lines
    )
    assert any(re.match(r"evaluation: batch 2 of 2, \d of 8 responses, token 9 of", line) for line in lines)
    trainer.fit(module, datamodule=data)
    lines = decoding_lines(capsys)
    assert any(line.startswith("rollout: 0 of 16 responses, token 3 of at most 14, ") for line in lines)
    assert module.responder.engine.listener is None


def test_short_rollouts_print_nothing_of_their_decoding(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(schedule=Schedule(rl_steps=2, prompts_per_step=4))
    make_trainer([PhaseProgress()], enable_progress_bar=True).fit(make_module(), datamodule=data)
    assert decoding_lines(capsys) == []


def test_what_an_evaluation_says_adds_up_over_its_calls() -> None:
    view = DecodingView("evaluation", 4)
    began = view._began
    for calls in range(3):
        for tokens in (0, 50, 100):
            assert not view.hear(Decoded(0, 8, tokens // 10, 14, tokens), began)
        view.batches += 1
        assert view.text(began + 10.0).endswith(f" {10 * (calls + 1)} tokens/s")
    rollout = DecodingView("rollout")
    for _ in range(2):
        assert rollout.hear(Decoded(0, 8, 0, 14, 0), began + 10)
        assert not rollout.hear(Decoded(0, 8, 5, 14, 40), began + 12)
        assert rollout.text(began + 12) == "rollout: 0 of 8 responses, token 5 of at most 14, 20 tokens/s"
