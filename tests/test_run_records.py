"""What a run leaves behind: costs, history, summary; the same when it was killed and resumed; no trace in training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_data, make_module, method_callbacks, weights
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from monitoring import Records, answer, monitors, plain, summaries

from mifo_callbacks import BufferPhaseSwitch, EntropyTokenSelection
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.activity import ActivityProfiler
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.monitors.costs import Costs, multiplying
from mifo_lightning.monitors.forgetting import Forgetting
from mifo_lightning.monitors.history import History
from mifo_lightning.monitors.run_dir import run_dir
from mifo_lightning.monitors.summary import RunSummary
from mifo_lightning.monitors.update_norm import UpdateNorm
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.rollout.engine import Completion
from mifo_lightning.steps.settings import PolicyLoss

MakeTrainer = Callable[..., Trainer]
VAL = Skills(["addition", "mirrored"], 12, split="val")


# --- killed and resumed, or not there at all --------------------------------------------------------------------------


class SaveAll(ModelCheckpoint):
    """A checkpoint after every optimizer step."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed.*")
def test_a_run_that_was_killed_ends_with_the_records_of_an_undisturbed_one(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def fit(name: str, ckpt: Path | None = None, **changes: Any) -> tuple[dict[str, Any], str]:
        callbacks = [*method_callbacks(size=8), *monitors()]
        directory = tmp_path / name
        saver = SaveAll(tmp_path) if name == "whole" else LastCheckpoint(dirpath=str(directory))
        trainer = make_trainer(
            [*callbacks, saver],
            enable_checkpointing=True,
            max_epochs=-1,
            default_root_dir=directory,
            **changes,
        )
        schedule = Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4, epochs_per_rollout=2)
        trainer.fit(
            make_module(micro_batches=2), datamodule=make_data(val=VAL, holdout=4, schedule=schedule), ckpt_path=ckpt
        )
        return summaries(callbacks), (directory / "history.jsonl").read_text()

    records, history = fit("whole")
    kinds = [r["phase"] for r in records["forgetting"]["phases"]]
    assert kinds[:3] == ["rl", "sft", "rl"]
    assert all(records[key]["phases"] for key in ("heldout", "phase_kl", "layer_updates", "overlap"))
    edge = records["layer_updates"]["phases"][0]["steps"]
    assert (tmp_path / f"step={edge + 4}.ckpt").exists(), "something is left to do after all of them"
    last = None
    for step in (1, edge, edge + 1, edge + 3):  # inside a rollout, between phases, inside SFT, inside the next RL phase
        # killed: nothing but the checkpoint of its last step is left
        again, lines = fit(f"killed{step}", tmp_path / f"step={step}.ckpt")
        assert again == records, step
        assert lines == history, step
        # stopped before its time, as `max_steps` does: it measures and writes its end, which is then not the end
        fit(f"cut{step}", last, max_steps=step)
        last = tmp_path / f"cut{step}" / "last.ckpt"
    again, lines = fit("on", last)
    assert again == records
    assert lines == history


def test_monitors_leave_no_trace_in_training_and_the_summary_holds_what_each_found(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    found, summary, runs = monitors(), RunSummary(), []
    for extra in ([], [*found, summary]):
        module = make_module()
        trainer = make_trainer([*method_callbacks(size=8), *extra])
        trainer.fit(module, datamodule=make_data(val=VAL))
        runs.append(weights(module))
    for name, value in runs[0].items():
        assert (value == runs[1][name]).all(), name
    summary.report(trainer)
    record = json.loads((tmp_path / "summary.json").read_text())
    own = {"before", "after_rl", "after", "ends_on", "optimizer_steps", "sft_phases", "sft_phases_dropped", "seconds"}
    own |= {"fitted"}
    measured = {"heldout", "forgetting", "phase_kl", "layer_updates", "overlap", "retention"}
    assert record.keys() == own | measured | {"costs"}
    assert {k: plain(v) for k, v in record.items() if k not in own} == summaries(found)
    assert record["heldout"]["changes"]["sft"]
    assert all(record[key]["seconds"] > 0 for key in measured)


# --- costs ------------------------------------------------------------------------------------------------------------


class Halves:
    """Prompts of 8 tokens get responses of 6; half of each group is right, so that every response gives a gradient."""

    def generate(
        self, policy: Any, tokenizer: Any, prompts: Any, keys: Any, samples: int, sampling: Any
    ) -> list[list[Completion]]:
        return [[answer(tokenizer, p, i % 2 == 0) for i in range(samples)] for p in prompts]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_costs_are_those_counted_by_hand(make_trainer: MakeTrainer, micro_batches: int) -> None:
    costs, records, profiler = Costs(), Records(), ActivityProfiler()
    data = make_data(train=Skills(["addition"], 64), schedule=Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4))
    trainer = make_trainer([BufferPhaseSwitch(size=4, max_accuracy=0.5), costs], logger=records, profiler=profiler)
    module = make_module(engine=Halves(), micro_batches=micro_batches)
    trainer.fit(module, datamodule=data)
    lengths = {len(q.prompt) + len(q.demonstration or []) for q in data.train_dataloader().questions}
    assert lengths == {8 + 12}
    n = multiplying(load_policy("embedded").model)
    rl = {"optimizer_steps": 1, "questions": 4, "demonstrations": 0, "scored_tokens": 0}
    rl |= {"generated_tokens": 4 * 8 + 16 * 6, "trained_tokens": 16 * (8 + 6)}
    sft = {"optimizer_steps": 1, "questions": 0, "demonstrations": 4, "scored_tokens": 0}
    sft |= {"generated_tokens": 0, "trained_tokens": 4 * 20}
    found = costs.summary()
    assert plain(found) == {
        "rl": rl | {"flops": 2 * n * 128 + 6 * n * 224},
        "sft": sft | {"flops": 6 * n * 80},
        "distinct_questions": 4,
        "distinct_demonstrations": 4,
    }
    assert found["rl"]["seconds"] > 0 < found["sft"]["seconds"]
    assert found["callbacks"].keys() >= {"BufferPhaseSwitch", "Costs"}
    assert records.series("costs/trained_tokens") == [224, 304]
    assert records.series("costs/flops")[-1] == found["rl"]["flops"] + found["sft"]["flops"]


def test_repetitions_and_extra_forwards_count(make_trainer: MakeTrainer) -> None:
    costs = Costs()
    schedule = Schedule(rl_steps=2, prompts_per_step=4, sft_batch=4, sft_epochs=3, epochs_per_rollout=2)
    callbacks = [EntropyTokenSelection(), BufferPhaseSwitch(size=8, max_accuracy=0.5), costs]
    data = make_data(train=Skills(["addition"], 64), schedule=schedule)
    make_trainer(callbacks).fit(make_module(engine=Halves(), micro_batches=2), datamodule=data)
    rl, sft = costs.summary()["rl"], costs.summary()["sft"]
    assert (rl["optimizer_steps"], rl["questions"], rl["generated_tokens"]) == (4, 8, 2 * 128)
    assert (rl["scored_tokens"], rl["trained_tokens"]) == (2 * 224, 4 * 224)  # two passes: old scores, two gradients
    assert (sft["optimizer_steps"], sft["demonstrations"], sft["trained_tokens"]) == (6, 24, 24 * 20)
    assert sft["scored_tokens"] == 24 * 20  # entropies of all micro-batches before the first backward
    assert (costs.summary()["distinct_questions"], costs.summary()["distinct_demonstrations"]) == (8, 8)


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        (PolicyLoss(entropy_fraction=0.5), 1),
        (PolicyLoss(kl_coefficient=0.1), 1),
        (PolicyLoss(entropy_fraction=0.5, kl_coefficient=0.1), 2),
    ],
)
def test_an_entropy_mask_and_a_reference_cost_a_forward_each(
    make_trainer: MakeTrainer, settings: PolicyLoss, forwards: int
) -> None:
    costs = Costs()
    data = make_data(train=Skills(["addition"], 64), schedule=Schedule(rl_steps=1, prompts_per_step=4))
    make_trainer([costs]).fit(make_module(engine=Halves(), loss=settings), datamodule=data)
    assert costs.summary()["rl"]["scored_tokens"] == forwards * 224


def test_an_untied_embedding_is_looked_up_and_not_multiplied() -> None:
    model = load_policy("embedded").model
    weights = sum(p.numel() for p in model.parameters())
    assert multiplying(model) == weights - model.get_input_embeddings().weight.numel() == 298_368
    model.lm_head.weight = model.get_input_embeddings().weight
    assert multiplying(model) == sum(p.numel() for p in model.parameters()) == 298_368


def test_a_module_that_does_not_tell_its_work_is_named(make_trainer: MakeTrainer) -> None:
    with pytest.raises(InputError, match=r"MifoModule\.training_step returns no 'work' in phase 'sft'"):
        Costs().on_train_batch_end(make_trainer(), make_module(), {"loss": 0.0}, {"phase": "sft"}, 0)


# --- history ----------------------------------------------------------------------------------------------------------


def test_history_holds_what_other_loggers_see(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    records = Records()
    keys = ["rollout/reward", "forgetting/*", "?l/update_norm"]
    callbacks = [*method_callbacks(size=8), UpdateNorm(), Forgetting(4), History(keys)]
    trainer = make_trainer(callbacks, logger=records)
    trainer.fit(make_module(micro_batches=2), datamodule=make_data(val=VAL))
    assert trainer.loggers == [records]
    lines = [json.loads(line) for line in (run_dir(trainer) / "history.jsonl").read_text().splitlines()]
    assert [x for line in lines for x in line.values() if isinstance(x, float)] == [
        x
        for event in records.metrics
        for name, x in event.items()
        if name in ("rollout/reward", "rl/update_norm") or name.startswith("forgetting/")
    ]
    assert [line["rl_step"] for line in lines if "rollout/reward" in line] == [1, 2, 3, 4, 5, 6]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert steps[0] == 0  # before the first optimizer step
    assert steps[-1] == trainer.global_step


def test_history_alone_names_no_directory(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    seen: list[Path] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            seen.append(run_dir(trainer))

    trainer = make_trainer([History(), LastCheckpoint(), Look()], enable_checkpointing=True)
    trainer.fit(make_module(engine=Halves()), datamodule=make_data(train=Skills(["addition"], 64)))
    assert set(seen) == {run_dir(trainer)} == {tmp_path}
    assert {p.name for p in tmp_path.iterdir()} == {"history.jsonl", "checkpoints"}
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    with pytest.raises(InputError, match=r"history\.keys"):
        History([])


def test_history_stops_listening_when_training_fails(make_trainer: MakeTrainer) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            raise RuntimeError("as planned")

    trainer = make_trainer([History(), Fail()])
    with pytest.raises(RuntimeError, match="as planned"):
        trainer.fit(make_module(engine=Halves()), datamodule=make_data(train=Skills(["addition"], 64)))
    assert trainer.loggers == []
