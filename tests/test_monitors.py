"""The callbacks that watch: seconds, tables, samples, update norms, held-out loss, progress, the exported model."""

import io
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks, weights
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from mifo_callbacks import BufferPhaseSwitch, EntropyTokenSelection
from mifo_lightning.data.question import Question
from mifo_lightning.data.skills import Skills
from mifo_lightning.data.source import Row, RowSource
from mifo_lightning.loader import PhaseLoader
from mifo_lightning.monitors.activity import METHOD, ActivityProfiler, SecondsByActivity
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.monitors.probe import HeldOutLoss
from mifo_lightning.monitors.progress import PhaseProgress
from mifo_lightning.monitors.samples import SampleTable
from mifo_lightning.monitors.summary import RunSummary, before_and_after, probe_line, seconds_line
from mifo_lightning.monitors.update_norm import UpdateNorm
from mifo_lightning.optim import AdamWSettings
from mifo_lightning.rollout.engine import Completion
from mifo_lightning.schedule import Schedule

MakeTrainer = Callable[..., Trainer]


class Records(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "records"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(dict(metrics))

    def series(self, *names: str) -> list[float]:
        """All values of these metrics, in the order in which they came."""
        return [values[name] for values in self.metrics for name in names if name in values]


class Sums:
    """Answers additions; right where `right` says so of the number of the call, otherwise one too much."""

    def __init__(self, *right: bool) -> None:
        self.right = right
        self.asked: list[list[str]] = []

    def generate(
        self, policy: Any, tokenizer: Any, prompts: Any, keys: Any, samples: int, sampling: Any
    ) -> list[list[Completion]]:
        texts = [tokenizer.decode(p) for p in prompts]
        wrong = not self.right[len(self.asked) % len(self.right)]
        self.asked.append(texts)
        answers = [f">{sum(map(int, text.rstrip('=').split('+'))) + wrong:04d}<eos>" for text in texts]
        ids = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
        return [[Completion(t, [-1.0] * len(t), True) for _ in range(samples)] for t in ids]


class Uneven(RowSource):
    """Demonstrations of two sources and two lengths; the first row of each source has none."""

    def rows(self) -> list[Row]:
        solutions = {"short": ">{}", "long": "0123456789>{}"}
        return [
            {
                "data_source": source,
                "prompt": [{"role": "user", "content": f"{i}+{i}="}],
                "target": [{"role": "assistant", "content": solution.format(2 * i)}] if i else None,
                "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            }
            for source, solution in solutions.items()
            for i in range(6)
        ]


def additions(**changes: Any) -> Any:
    return make_data(**{"train": Skills(["addition"], 64), **changes})


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
    assert profiler.by_activity() == {
        "freezing": 3,
        "selection": 12,
        "importance": 16,
        "buffer": 32,
        "backward": 64,
        "evaluation": 384,
        "training": 512,
    }


def test_a_run_is_accounted_for_by_activity(make_trainer: MakeTrainer) -> None:
    profiler, records = ActivityProfiler(), Records()
    trainer = make_trainer([*method_callbacks(size=8), SecondsByActivity(every=2)], profiler=profiler, logger=records)
    trainer.fit(make_module(), datamodule=make_data(schedule=Schedule(rl_steps=4, rl_questions=4, sft_batch=4)))
    seconds = profiler.by_activity()
    assert seconds.keys() >= {*METHOD, "training", "rollout", "reward", "scoring", "forward", "backward"}
    inside = ("rollout", "reward", "scoring", "forward", "backward")
    assert 0 < sum(seconds[name] for name in inside) < seconds["training"]
    assert not any(profiler.seconds[name] > seconds["training"] for name in profiler.seconds if "mifo." in name)
    logged = [values for values in records.metrics if "seconds/training" in values]
    assert len(logged) == trainer.global_step // 2
    for earlier, later in pairwise(logged):
        assert all(later[name] >= value for name, value in earlier.items())
    assert logged[-1].keys() >= {f"seconds/{name}" for name in inside}


def test_the_line_of_seconds() -> None:
    line = seconds_line({"rollout": 4.0, "training": 10.0, "freezing": 0.5, "buffer": 0.25, "evaluation": 2.04})
    assert line == (
        "seconds: training 10.0, rollout 4.0, evaluation 2.0, freezing 0.5, buffer 0.2; "
        "buffer, selection, importance and freezing together 0.75 (7.5% of training)"
    )


def test_the_line_of_the_probe() -> None:
    line = probe_line({"rl": [0.25, -0.05], "sft": [-0.5, -1.0, 0.25]})
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
        additions(holdout=4, schedule=Schedule(rl_steps=1, rl_questions=4, sft_batch=4)),
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
    assert (record["optimizer_steps"], record["sft_phases"], record["heldout_changes"]) == (1, 0, {})
    resumed = RunSummary()
    resumed.load_state_dict(summary.state_dict())
    resumed.on_validation_end(trainer, module)
    assert resumed.before == summary.before != resumed.after


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_of_rollouts_and_evaluations_are_appended(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    written: list[str] = []

    def fresh() -> list[dict[str, Any]]:
        """What came since the last call; what was there before must still be there."""
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[: len(written)] == written
        new, written[:] = lines[len(written) :], lines
        return [json.loads(line) for line in new]

    def row(step: int, stage: str, source: str, prompt: str, end: str = "") -> dict[str, Any]:
        answer = f"{sum(map(int, prompt.rstrip('=').split('+'))):04d}"
        found = {"step": step, "stage": stage, "source": source, "prompt": prompt}
        return {**found, "response": f">{answer}{end}", "truth": answer, "reward": 1.0}

    for _ in range(2):  # a second run in the same directory adds to the file
        engine = Sums(True)
        module = make_module(engine=engine)
        splits = {name: Skills(["addition"], 5, split=name) for name in ("val", "test")}  # type: ignore[arg-type]
        schedule = Schedule(rl_steps=5, rl_questions=4, passes=2)
        data = additions(**splits, schedule=schedule, eval_batch=2)
        trainer = make_trainer([SampleTable(every=2, per_evaluation=3)], limit_val_batches=1.0, val_check_interval=5)
        asked = {name: [r["prompt"][0]["content"] for r in rows.rows()][:3] for name, rows in splits.items()}

        trainer.validate(module, data, verbose=False)
        assert fresh() == [row(0, "val", "addition", prompt) for prompt in asked["val"]]
        before = len(engine.asked)
        trainer.fit(module, datamodule=data)  # its sanity check leaves nothing
        rollouts = [prompts for prompts in engine.asked[before:] if len(prompts) == 4]
        assert len(rollouts) == 5
        drawn = [[row(2 * i + 1, "rl", "addition", rollouts[i][0], "<eos>")] * 4 for i in (0, 2, 4)]
        checks = [[row(step, "val", "addition", prompt) for prompt in asked["val"]] for step in (5, 10)]
        assert fresh() == drawn[0] + drawn[1] + checks[0] + drawn[2] + checks[1]
        trainer.test(module, data, verbose=False)
        assert fresh() == [row(10, "test", "addition", prompt) for prompt in asked["test"]]


def test_no_samples_of_rollouts_are_kept_if_none_are_wanted(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer([SampleTable(every=0)]).fit(make_module(engine=Sums(True)), datamodule=additions())
    assert not (tmp_path / "samples.jsonl").exists()


# --- update norms -----------------------------------------------------------------------------------------------------


class Weights(Callback):
    """Phase and weights at the start of every optimizer step."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch["micro"] == 0:
            self.phases.append(batch["phase"])
            self.weights.append(weights(pl_module))


@pytest.mark.parametrize("moments", ["reset", "shared"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_update_norm_is_that_of_the_change_of_the_weights(
    make_trainer: MakeTrainer, moments: Any, micro_batches: int
) -> None:
    records, watch = Records(), Weights()
    # decay and old moments push frozen weights, which freezing then puts back: that is no update
    module = make_module(rl=AdamWSettings(lr=1e-3), sft=AdamWSettings(lr=1e-3, weight_decay=5.0), moments=moments)
    trainer = make_trainer(
        [UpdateNorm(), *method_callbacks(size=8), watch], accumulate_grad_batches=micro_batches, logger=records
    )
    trainer.fit(module, datamodule=make_data())
    watch.weights.append(weights(module))
    expected = [
        math.sqrt(sum(float((b[n] - a[n]).double().square().sum()) for n in a)) for a, b in pairwise(watch.weights)
    ]
    assert watch.phases.count("sft") >= 2
    assert records.series("rl/update_norm", "sft/update_norm") == pytest.approx(expected, rel=1e-4)
    for phase in ("rl", "sft"):
        assert len(records.series(f"{phase}/update_norm")) == watch.phases.count(phase)


# --- held-out loss ----------------------------------------------------------------------------------------------------


def losses(module: Any, questions: list[Question]) -> tuple[float, int]:
    """Summed negative log-likelihood in nats of demonstrations, and their tokens, one by one from the bare model."""
    total, tokens = 0.0, 0
    for q in questions:
        assert q.demonstration is not None
        with torch.no_grad():
            logits = module.policy.model(torch.tensor([q.prompt + q.demonstration])).logits[0, len(q.prompt) - 1 : -1]
        logp = logits.log_softmax(-1)[torch.arange(len(q.demonstration)), q.demonstration]
        total, tokens = total - float(logp.sum()), tokens + len(q.demonstration)
    return total, tokens


class Edges(Callback):
    """The losses of the probe at every change of phase and at the end, computed by hand."""

    def __init__(self, probe: dict[str, list[Question]]) -> None:
        self.probe = probe
        self.phases: list[str] = []
        self.losses: list[dict[str, float]] = []

    def measure(self, pl_module: Any) -> None:
        found = {source: losses(pl_module, questions) for source, questions in self.probe.items()}
        values = {f"heldout/{source}/loss": total / tokens for source, (total, tokens) in found.items()}
        overall = sum(total for total, _ in found.values()) / sum(tokens for _, tokens in found.values())
        self.losses.append({**values, "heldout/loss": overall})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.phases or self.phases[-1] != batch["phase"]:
            self.phases.append(batch["phase"])
            self.measure(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.measure(pl_module)


def test_the_held_out_loss_is_measured_at_every_edge(make_trainer: MakeTrainer) -> None:
    data = make_data(val=Uneven(), eval_batch=2)
    data.setup("validate")
    records, monitor = Records(), HeldOutLoss(questions=3)
    edges = Edges({})
    trainer = make_trainer([*method_callbacks(size=8), monitor, edges], logger=records)
    data.trainer = trainer
    # of each source the first three that have a demonstration
    edges.probe = {
        source: [q for batch in loader for q in batch if q.demonstration][:3]
        for source, loader in data.val_dataloader().items()
    }
    assert [q.text for q in edges.probe["long"]] == ["1+1=", "2+2=", "3+3="]
    assert edges.probe.keys() == {"short", "long"}
    trainer.fit(make_module(), datamodule=data)
    assert edges.phases[:3] == ["rl", "sft", "rl"]
    for name in ("heldout/loss", "heldout/short/loss", "heldout/long/loss"):
        assert records.series(name) == pytest.approx([values[name] for values in edges.losses], rel=1e-4)
    overall = [values["heldout/loss"] for values in edges.losses]
    expected: dict[str, list[float]] = {"rl": [], "sft": []}
    for phase, (before, after) in zip(edges.phases, pairwise(overall), strict=True):
        expected[phase].append(after - before)
    assert monitor.changes.keys() == expected.keys()
    for phase, values in expected.items():
        assert values
        assert monitor.changes[phase] == pytest.approx(values, abs=1e-4)
        assert records.series(f"heldout/{phase}_change") == monitor.changes[phase]
    assert max(map(abs, expected["sft"])) > 0.01
    resumed = HeldOutLoss()
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.changes == monitor.changes
    assert resumed.state_dict() == monitor.state_dict()


def test_without_held_out_demonstrations_there_is_no_held_out_loss(make_trainer: MakeTrainer) -> None:
    records, monitor = Records(), HeldOutLoss()
    make_trainer([monitor], logger=records).fit(make_module(engine=Sums(True)), datamodule=additions())
    assert monitor.changes == {"rl": [], "sft": []}
    assert not records.series("heldout/loss")


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
def test_the_held_out_loss_needs_a_datamodule(make_trainer: MakeTrainer) -> None:
    loader = PhaseLoader([Question(0, "s", "1+1=", [3, 12, 3, 14], "2")], Schedule(rl_steps=1, rl_questions=1))
    with pytest.raises(MisconfigurationException, match="HeldOutLoss"):
        make_trainer([HeldOutLoss()]).fit(make_module(engine=Sums(True)), train_dataloaders=loader)


# --- what an optimizer step logs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_every_optimizer_step_is_logged_once_and_whole(make_trainer: MakeTrainer, micro_batches: int) -> None:
    records, watch = Records(), Weights()
    callbacks = [EntropyTokenSelection(fraction=0.25), BufferPhaseSwitch(size=8), watch]
    schedule = Schedule(rl_steps=4, rl_questions=4, sft_batch=8)
    trainer = make_trainer(callbacks, accumulate_grad_batches=micro_batches, logger=records)
    trainer.fit(make_module(engine=Sums(False), rl=AdamWSettings(lr=1e-4)), datamodule=additions(schedule=schedule))
    assert watch.phases == ["rl", "rl", "sft", "rl", "rl", "sft"]
    steps = [values for values in records.metrics if "phase/is_sft" in values]
    assert [values["phase/is_sft"] for values in steps] == [0, 0, 1, 0, 0, 1]
    assert records.series("phase/rl_step") == [1, 2, 3, 4]
    assert records.series("phase/sft_phase") == [1, 2]
    assert records.series("rollout/reward") == records.series("rl/grad_norm") == [0.0] * 4
    assert records.series("buffer/size") == [4, 8, 4, 8]  # before the phase is taken from it
    assert records.series("rl/lr") == [1e-4] * 4
    for values in (steps[2], steps[5]):
        assert values["sft/lr"] == 1e-3
        assert values["sft/loss"] > values["sft/nll"] > 0  # the chosen quarter is the hard one
    entropies = records.series("entropy/mean_all")
    assert records.series("sft/entropy") == pytest.approx(entropies, rel=1e-4)


# --- progress ---------------------------------------------------------------------------------------------------------


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


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_trained_model_is_exported_into_the_run_directory(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    export, module = ExportModel(), make_module()
    schedule = Schedule(rl_steps=0, sft_before=2, sft_batch=4)
    make_trainer([export]).fit(module, datamodule=additions(schedule=schedule))
    assert export.written == tmp_path / "model"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == module.tokenizer.get_vocab()
    trained = weights(module)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, trained[f"policy.model.{name}"])
    untrained = AutoModelForCausalLM.from_pretrained(module.tokenizer.name_or_path)
    moved = [not torch.equal(a, b) for a, b in zip(loaded.parameters(), untrained.parameters(), strict=True)]
    assert all(moved)
