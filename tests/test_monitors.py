"""The callbacks that watch: samples, update norms, what an optimizer step logs, the exported model."""

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
from monitoring import Records, Sums, additions
from transformers import AutoModelForCausalLM, AutoTokenizer

from mifo_callbacks import BufferPhaseSwitch, EntropyTokenSelection
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.monitors.samples import SampleTable
from mifo_lightning.monitors.update_norm import UpdateNorm
from mifo_lightning.steps.optimizer import AdamWSettings

MakeTrainer = Callable[..., Trainer]


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

    def row(step: int, stage: str, source: str, prompt: str) -> dict[str, Any]:
        answer = f"{sum(map(int, prompt.rstrip('=').split('+'))):04d}"
        found = {"step": step, "stage": stage, "source": source, "prompt": prompt}
        return {**found, "response": f">{answer}", "truth": answer, "reward": 1.0, "length": 6, "truncated": False}

    for _ in range(2):  # a second run in the same directory adds to the file
        engine = Sums(True)
        module = make_module(engine=engine)
        splits = {name: Skills(["addition"], 5, split=name) for name in ("val", "test")}  # type: ignore[arg-type]
        schedule = Schedule(rl_steps=5, prompts_per_step=4, epochs_per_rollout=2)
        data = additions(**splits, schedule=schedule, eval_batch=2)
        trainer = make_trainer([SampleTable(every=2, per_evaluation=3)], limit_val_batches=1.0, val_check_interval=5)
        asked = {name: [r["prompt"][0]["content"] for r in rows.rows()][:3] for name, rows in splits.items()}

        trainer.validate(module, data, verbose=False)
        assert fresh() == [row(0, "val", "addition", prompt) for prompt in asked["val"]]
        before = len(engine.asked)
        trainer.fit(module, datamodule=data)  # its sanity check leaves nothing
        rollouts = [prompts for prompts in engine.asked[before:] if len(prompts) == 4]
        assert len(rollouts) == 5
        drawn = [[row(2 * i + 1, "rl", "addition", rollouts[i][0])] * 4 for i in (0, 2, 4)]
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
        self.phases.append(batch["phase"])
        self.weights.append(weights(pl_module))


@pytest.mark.parametrize("moments", ["reset", "shared"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_update_norm_is_that_of_the_change_of_the_weights(
    make_trainer: MakeTrainer, moments: Any, micro_batches: int
) -> None:
    records, watch = Records(), Weights()
    # decay and old moments push frozen weights, which freezing then puts back: that is no update
    rates = {"rl": AdamWSettings(lr=1e-3), "sft": AdamWSettings(lr=1e-3, weight_decay=5.0)}
    module = make_module(**rates, moments=moments, micro_batches=micro_batches)
    trainer = make_trainer([UpdateNorm(), *method_callbacks(size=8), watch], logger=records)
    trainer.fit(module, datamodule=make_data())
    watch.weights.append(weights(module))
    expected = [
        math.sqrt(sum(float((b[n] - a[n]).double().square().sum()) for n in a)) for a, b in pairwise(watch.weights)
    ]
    assert watch.phases.count("sft") >= 2
    assert records.series("rl/update_norm", "sft/update_norm") == pytest.approx(expected, rel=1e-4)
    for phase in ("rl", "sft"):
        assert len(records.series(f"{phase}/update_norm")) == watch.phases.count(phase)


# --- what an optimizer step logs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_every_optimizer_step_is_logged_once_and_whole(make_trainer: MakeTrainer, micro_batches: int) -> None:
    records, watch = Records(), Weights()
    callbacks = [EntropyTokenSelection(fraction=0.25), BufferPhaseSwitch(size=8), watch]
    schedule = Schedule(rl_steps=4, prompts_per_step=4, sft_batch=8)
    module = make_module(engine=Sums(False), rl=AdamWSettings(lr=1e-4), micro_batches=micro_batches)
    make_trainer(callbacks, logger=records).fit(module, datamodule=additions(schedule=schedule))
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
