"""Seconds by activity, and the tables and lines at the end of a run."""

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import make_data, make_module, method_callbacks
from lightning import Trainer
from monitoring import Records, Sums, additions
from rich.console import Console

from mifo_callbacks import BufferPhaseSwitch, EntropyTokenSelection, GradientDropping, GradientFreezing, ImportanceEMA
from mifo_callbacks.phase import PhaseCallback
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.methods import Anchor
from mifo_lightning.monitors.activity import METHOD, ActivityProfiler, SecondsByActivity
from mifo_lightning.monitors.costs import Costs
from mifo_lightning.monitors.summary import RunSummary, before_and_after, heldout_line, seconds_line

MakeTrainer = Callable[..., Trainer]


# --- seconds ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that `time.perf_counter` tells."""
    now = [0.0]
    monkeypatch.setattr("mifo_lightning.monitors.activity.time.perf_counter", lambda: now[0])

    def at(seconds: float) -> None:
        now[0] = seconds

    return at


def test_the_profiler_adds_up_actions_that_are_nested_or_open_twice(clock: Callable[[float], None]) -> None:
    profiler = ActivityProfiler()
    program = [
        (1, "start", "mifo.forward"),
        (2, "start", "mifo.rollout"),
        (4, "start", "mifo.forward"),  # open twice
        (5, "stop", "mifo.forward"),  # 1 s
        (10, "stop", "mifo.rollout"),  # 8 s
        (12, "stop", "mifo.forward"),  # 11 s
        (20, "start", "mifo.forward"),
        (23, "stop", "mifo.forward"),  # 3 s
        (24, "stop", "mifo.forward"),  # never begun
        (30, "start", "mifo.reward"),  # never ended
        (40, "start", "mifo.reward"),
        (42, "stop", "mifo.reward"),  # 2 s: what was begun last ends first
    ]
    for seconds, what, action in program:
        clock(seconds)
        getattr(profiler, what)(action)
    assert {k: v for k, v in profiler.seconds.items() if v} == {
        "mifo.forward": 1 + 11 + 3,
        "mifo.rollout": 8,
        "mifo.reward": 2,
    }


def test_actions_add_up_to_activities(clock: Callable[[float], None]) -> None:
    profiler = ActivityProfiler()
    actions = {
        "[Callback]GradientFreezing{'during': 'sft'}.on_before_optimizer_step": 1,
        "[Callback]GradientFreezing.on_after_optimizer_step": 2,
        "[Callback]EntropyTokenSelection.select": 4,
        "mifo.entropies": 8,
        "[Callback]ImportanceEMA{'measure': 'rl'}.on_train_batch_start": 16,
        "[Callback]BufferPhaseSwitch.on_train_batch_end": 32,
        "[Strategy]SingleDeviceStrategy.backward": 64,
        "[Strategy]DDPStrategy.validation_step": 128,
        "[Strategy]DDPStrategy.test_step": 256,
        "run_training_batch": 512,
        "[LightningModule]MifoModule.on_train_start": 1024,  # no activity of ours
    }
    for action, seconds in actions.items():
        clock(0)
        profiler.start(action)
        clock(seconds)
        profiler.stop(action)
    assert profiler.by_activity(method_callbacks()) == {
        "freezing": 3,
        "selection": 12,
        "importance": 16,
        "buffer": 32,
        "backward": 64,
        "evaluation": 384,
        "training": 512,
    }


def test_seconds_of_several_callbacks_of_one_activity_add_up() -> None:
    profiler = ActivityProfiler()
    profiler.seconds |= {"[Callback]Anchor.on_gradients_ready": 1.0, "[Callback]GradientFreezing.on_phase_change": 2.0}
    assert profiler.by_activity([Anchor(1.0), GradientFreezing()])["freezing"] == 3.0


def test_a_run_is_accounted_for_by_activity(make_trainer: MakeTrainer) -> None:
    profiler, records = ActivityProfiler(), Records()
    trainer = make_trainer([*method_callbacks(size=8), SecondsByActivity(every=2)], profiler=profiler, logger=records)
    trainer.fit(make_module(), datamodule=make_data(schedule=Schedule(rl_steps=4, prompts_per_step=4, sft_batch=4)))
    seconds = profiler.by_activity(trainer.callbacks)
    assert seconds.keys() >= {*METHOD, "training", "rollout", "reward", "scoring", "forward", "backward"}
    inside = ("rollout", "reward", "scoring", "forward", "backward")
    assert 0 < sum(seconds[name] for name in inside) < seconds["training"]
    assert not any(profiler.seconds[name] > seconds["training"] for name in profiler.seconds if "mifo." in name)
    logged = [values for values in records.metrics if "seconds/training" in values]
    assert len(logged) == trainer.global_step // 2
    for earlier, later in pairwise(logged):
        assert all(later[name] >= value for name, value in earlier.items())
    assert logged[-1].keys() >= {f"seconds/{name}" for name in inside}


def test_a_subclass_is_accounted_for_in_its_configuration_group(make_trainer: MakeTrainer) -> None:
    class Louder(ImportanceEMA):
        pass

    class Chatty(BufferPhaseSwitch):
        pass

    class Stranger(PhaseCallback):
        pass

    method = [EntropyTokenSelection(), Louder(), GradientFreezing(), GradientDropping(0.5, "rl")]
    profiler, costs = ActivityProfiler(), Costs()
    callbacks = [*method, Chatty(size=8, max_accuracy=0.75), Stranger(), costs]
    trainer = make_trainer(callbacks, profiler=profiler)
    trainer.fit(make_module(), datamodule=make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4)))
    assert profiler.by_activity(trainer.callbacks).keys() >= {*METHOD, "dropping"}
    assert costs.summary()["callbacks"].keys() >= {"ImportanceEMA", "BufferPhaseSwitch", "GradientDropping", "Stranger"}
    assert not costs.summary()["callbacks"].keys() & {"Louder", "Chatty", "PhaseCallback"}


def test_the_line_of_seconds() -> None:
    line = seconds_line({"rollout": 4.0, "training": 10.0, "freezing": 0.5, "buffer": 0.25, "evaluation": 2.04})
    assert line == (
        "seconds: training 10.0, rollout 4.0, evaluation 2.0, freezing 0.5, buffer 0.2; "
        "buffer, selection, importance and freezing together 0.75 (7.5% of training)"
    )


def test_the_line_of_the_probe() -> None:
    line = heldout_line({"rl": [0.25, -0.05], "sft": [-0.5, -1.0, 0.25]})
    assert line == (
        "loss on held-out demonstrations, nats per token: 1 of 2 RL phases lowered it (mean +0.100), "
        "2 of 3 SFT phases lowered it (mean -0.417)"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def cells(table: Any) -> list[list[str]]:
    """Header and rows of a table as printed."""
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.replace("┃", "│").split("│") for line in text.splitlines() if "│" in line or "┃" in line]
    return [[cell.strip() for cell in row[1:-1]] for row in rows]


def test_the_table_shows_every_source_before_and_after() -> None:
    before = {"a/greedy": 0.1, "a/length": 7.04, "greedy": 0.25}
    after = {"a/greedy": 0.55, "a/length": 12.0, "b/greedy": 1.0, "greedy": 0.775, "length": 3.0}
    assert cells(before_and_after(before, after)) == [
        ["source", "greedy", "length"],
        ["a", "0.100 → 0.550", "7.0 → 12.0"],
        ["b", "1.000", ""],
        ["all", "0.250 → 0.775", "3.0"],
    ]


def test_the_summary_compares_the_first_validation_with_the_last(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    summary, engine = RunSummary(), Sums(False)
    module, data = (
        make_module(engine=engine),
        additions(holdout=4, schedule=Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4)),
    )
    trainer = make_trainer([summary, BufferPhaseSwitch(size=4)], limit_val_batches=1.0, num_sanity_val_steps=0)
    trainer.validate(module, data, verbose=False)
    engine.right = (True,)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, data, verbose=False)
    summary.report(trainer)
    record = json.loads((tmp_path / "summary.json").read_text())
    assert (record["before"]["addition-holdout/greedy"], record["after"]["addition-holdout/greedy"]) == (0.0, 1.0)
    assert (record["before"]["greedy"], record["after"]["avg@1"]) == (0.0, 1.0)
    assert (record["optimizer_steps"], record["sft_phases"], record["seconds"]) == (1, 0, {})
    resumed = RunSummary()
    resumed.load_state_dict(summary.state_dict())
    resumed.on_validation_end(trainer, module)
    assert resumed.before == summary.before != resumed.after
