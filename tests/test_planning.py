"""`mifo plan`: it counts what torch's allocator hands out, and says what to change where a run does not fit."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import MIFO, refused
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from mifo_lightning.cli import main
from mifo_lightning.cli.plan import planned
from mifo_lightning.monitors.costs import multiplying
from mifo_lightning.planning.memory import Moment, Plan, Sizes
from mifo_lightning.planning.speed import GPU, Shape, speed
from mifo_lightning.planning.table import verdict
from mifo_lightning.planning.trace import Tracer
from mifo_lightning.planning.workload import Workload
from mifo_lightning.policy import token_scores
from mifo_lightning.policy.adapter import Adapter, put_beside
from mifo_lightning.policy.ending import set_ends
from mifo_lightning.policy.loading import recompute_layers
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.in_process import InProcessEngine

LAYERS = 2
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "head_dim": 16,
    "pad_token_id": 0,
}
FAMILIES = [LlamaConfig(**SHAPE), Qwen2Config(**SHAPE, tie_word_embeddings=True), GemmaConfig(**SHAPE)]
ROWS, PROMPT, RESPONSE = 8, 24, 16


def meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = Auto.from_config(config, dtype=torch.float32)
    return model


def allocated(work: Callable[[], Any]) -> int:
    """The most bytes that `work` has of torch's CPU allocator at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


CASES = [
    (FAMILIES[0], "whole"),
    (FAMILIES[0], "shared running"),
    (FAMILIES[0], "adapter"),
    (FAMILIES[1], "bf16"),
    (FAMILIES[2], "checkpointing bf16"),
]


@pytest.mark.parametrize(("config", "case"), CASES, ids=lambda value: getattr(value, "model_type", value))
def test_an_update_needs_what_it_was_planned_to(
    config: PreTrainedConfig, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "running" in case:  # the head as of long chunks
        monkeypatch.setattr(token_scores, "RUNNING_FROM", 1)
    policy, planned, bf16 = Policy(Auto.from_config(config)), meta(config), "bf16" in case
    policy.share_prompts = "shared" in case
    if "checkpointing" in case:
        recompute_layers(policy.model)
    if case == "adapter":
        for model in (policy.model, planned):
            put_beside(model, Adapter(rank=4))
    prompts = [[1 + i // 4] * PROMPT for i in range(ROWS)]
    sequences = Sequences.pack(prompts, [[3] * RESPONSE] * ROWS, 0)

    if bf16:
        policy.numerics = MixedPrecision("bf16-mixed", "cpu").forward_context

    def update() -> None:
        policy(sequences, grouped=True)[0].sum().backward()

    update()
    policy.zero_grad()
    tracer = Tracer(planned, bf16, "checkpointing" in case)
    traced = tracer.update(ROWS, 2 if policy.share_prompts else None, PROMPT, RESPONSE, 1, False)
    assert sum(traced.values()) == pytest.approx(allocated(update), rel=0.1)
    later = tracer.update(ROWS, 2 if policy.share_prompts else None, PROMPT, RESPONSE, 2, False)
    there = sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    assert sum(later.values()) == pytest.approx(allocated(update) + there, rel=0.1)


@pytest.mark.parametrize("case", ["slots", "slots bf16", "growing"])
def test_decoding_needs_what_it_was_planned_to(case: str, tokenizer: PreTrainedTokenizerBase) -> None:
    config, bf16, slots = FAMILIES[0], "bf16" in case, "slots" in case
    policy, sampling = Policy(Auto.from_config(config)), Sampling(max_new_tokens=RESPONSE)
    assert policy.decoding.slots
    policy.decoding = replace(policy.decoding, slots=slots)
    if bf16:
        policy.numerics = MixedPrecision("bf16-mixed", "cpu").forward_context
    prompts = [[1] * PROMPT, [1] * (PROMPT - 1)]
    plan = Plan(Workload(cpu=True, bf16=bf16, prompt=PROMPT, response=RESPONSE, prompts=2, group=4), meta(config))
    plan.shape = plan.shape._replace(slots=slots)
    endless = copy.copy(tokenizer)
    set_ends(endless, {-1})  # no token

    def decode() -> None:
        found = InProcessEngine().generate(policy, endless, prompts, [1, 2], 4, sampling)
        assert all(len(one.tokens) == RESPONSE for row in found for one in row)

    parts = plan.decoding("generation").parts
    traced = sum(parts[name] for name in ("casts", "activations", "cache", "logits"))
    assert traced == pytest.approx(allocated(decode), rel=0.1)
    entry = 2 * LAYERS * 2 * 16 * (2 if bf16 else 4)
    assert plan.shape.cache_per_token == entry
    assert parts["cache"] == pytest.approx(ROWS * (PROMPT + RESPONSE) * entry, rel=0.3)


def test_what_is_always_there_follows_the_strategy_and_the_method() -> None:
    def held(kind: str = "RL", **changes: Any) -> dict[str, int]:
        work = replace(Workload(prompt=8, response=8, prompts=2, group=2, demonstrations=2, demonstration=8), **changes)
        return Plan(work, meta(FAMILIES[0])).step("", sft=kind == "SFT").parts

    n = Sizes.of(meta(FAMILIES[0])).total
    assert [held()[k] for k in ("weights", "gradients", "optimizer", "activations")] == [4 * n, 4 * n, 8 * n, 0]
    assert held("SFT")["optimizer"] == 16 * n, "those of RL are parked"
    assert held("SFT", moments="shared")["optimizer"] == 8 * n
    assert held(importance=4)["importance"] == 8 * n
    assert held(importance=2)["importance"] == 6 * n, "a map in bfloat16"
    assert held("SFT", importance=4, freezing=True)["importance"] == 8 * n + n // 8, "a mask of a bit a weight"
    assert held("SFT", protection=(0, 3))["importance"] == 12 * n, "an anchor's start and bases"
    assert held(protection=(1.25, 1.25))["importance"] == 5 * n, "RL's start, and a byte a weight"
    assert held(reference=True)["reference"] == 4 * n
    assert held(ranks=2)["gradients"] == 8 * n, "DDP keeps buckets beside the gradients"
    assert held(ranks=2, sharded=True)["optimizer"] == 4 * n
    assert 0 < held(ranks=2, sharded=True)["gathered"] < 12 * n
    adapter = held(adapter=Adapter(rank=4), reference=True, importance=4)
    t = adapter["gradients"] // 4
    assert 0 < t < n / 10
    assert adapter["weights"] == 4 * (n + t)
    assert [adapter[k] for k in ("optimizer", "importance", "reference")] == [8 * t, 8 * t, 0], "the base stands still"


def test_less_is_planned_for_smaller_settings() -> None:
    work = Workload(prompt=32, response=32, prompts=4, group=4, bf16=True)
    update = Plan(work, meta(FAMILIES[0])).update()

    def smaller(**changes: Any) -> Moment:
        return Plan(replace(work, **changes), meta(FAMILIES[0])).update()

    assert smaller(micro_batches=4).parts["activations"] < update.parts["activations"] / 2
    assert smaller(micro_batch_tokens=4 * 64).parts == smaller(micro_batches=4).parts
    assert smaller(checkpointing=True).total < update.total
    assert smaller(share_prompts=True).total < update.total
    sharded = Plan(replace(work, ranks=2, sharded=True, engine_rows=4), meta(FAMILIES[0])).decoding("generation").parts
    assert sharded["gathered"] == 2 * sharded["weights"], "sampling gathers all"


def test_a_workload_is_cut_as_the_run_cuts_it() -> None:
    work = Workload(prompt=10, response=20, prompts=4, group=4)
    assert replace(work, micro_batches=3).chunk(True) == (6, 2, 3)
    assert replace(work, micro_batches=16).chunk(True) == (1, 1, 16)
    assert replace(work, micro_batch_tokens=180).chunk(True) == (8, 2, 2), "two whole groups of 90 tokens"
    assert replace(work, micro_batch_tokens=75).chunk(True) == (3, 1, 6)
    assert replace(work, micro_batch_tokens=75).chunk(False) == (2, 1, 8)
    assert replace(work, micro_batch_tokens=1).chunk(False) == (1, 1, 16)
    assert replace(work, micro_batch_tokens=80, demonstrations=5, demonstration=10).sft_chunk() == (4, 4, 2)
    assert work.batch(4, 4, 20) == (16, 4, 4)
    assert replace(work, engine_rows=7).batch(4, 4, 20) == (7, 1, 4)
    assert replace(work, cache_tokens=100).batch(4, 4, 20) == (3, 1, 3), "30 tokens a row"


@pytest.mark.parametrize(
    ("changes", "key", "setting"),
    [
        (
            {"checkpointing": True, "response": 256, "prompts": 1, "group": 64, "micro_batch_tokens": 1},
            "engine.init_args.rows to ",
            "engine_rows",
        ),
        ({"response": 32, "prompts": 4, "engine_rows": 1}, "model.optimizer.micro_batches to ", "micro_batches"),
        (
            {"response": 32, "prompts": 4, "engine_rows": 1, "micro_batch_tokens": 2048},
            "model.optimizer.micro_batch_tokens to ",
            "micro_batch_tokens",
        ),
    ],
)
def test_what_does_not_fit_says_what_to_change_and_then_fits(changes: dict[str, Any], key: str, setting: str) -> None:
    work, gb = replace(Workload(prompt=32, group=8), **changes), 1e9
    plan = Plan(work, meta(FAMILIES[0]))
    memory = plan.peak.total * 0.7 / gb
    (line, *_) = verdict(plan, memory)
    assert line.startswith(f"does not fit: {plan.peak.name} needs ")
    number = int(line.partition(key)[2])
    better = Plan(replace(work, **{setting: number}), meta(FAMILIES[0]))
    assert verdict(better, memory)[0].startswith("fits: ")


def test_where_no_setting_helps_it_says_so() -> None:
    work = Workload(prompt=8, response=8, prompts=1, group=2)
    assert "ModelParallelStrategy" in verdict(Plan(work, meta(FAMILIES[0])), 1e-6)[0]
    assert "a smaller model" in verdict(Plan(replace(work, ranks=64, sharded=True), meta(FAMILIES[0])), 1e-6)[0]


def test_speed_is_bound_by_arithmetic_or_by_bandwidth() -> None:
    n = 10**9
    work, shape = Workload(prompts=8, prompt=100, response=100, bf16=True), Shape(n, n)
    found = speed(work, GPU(), shape)
    assert found.decoding == pytest.approx(64 * GPU().bandwidth * 1e9 * 0.6 / (2 * n))  # casts are read
    assert found.update == pytest.approx(0.4 * 989e12 / (6 * n) / 2)  # half of the tokens are prompts
    assert speed(work, GPU(), shape._replace(shared=True)).update == pytest.approx(found.update * 2 * 64 / (8 + 64))
    assert speed(work, GPU(), shape._replace(trained=0)).update == pytest.approx(found.update * 6 / 4)
    assert speed(replace(work, ranks=2), GPU(), shape).decoding == 2 * found.decoding
    assert speed(replace(work, checkpointing=True), GPU(), shape).update == pytest.approx(found.update * 6 / 8)
    assert found.step == pytest.approx(6400 / found.decoding + 6400 / found.update)
    slots, growing = (speed(work, GPU(), shape._replace(cache_per_token=10**9, slots=s)) for s in (True, False))
    assert slots.decoding == pytest.approx(3 * growing.decoding, rel=0.01)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *MIFO, "--gpus", "2", "--gpu_memory", "16", "--response_tokens", "10"])
    out = capsys.readouterr().out
    assert out.startswith(
        "embedded: 0.000301 billion weights, 32-true, 2 x 16 GB, DDP; GB on each\nnote: prompts of 16"
    )
    assert "| moment | weights | gradients | optimizer | importance | activations | cache | logits | total |" in out
    assert all(f"\n| {moment} |" in out for moment in ("generation", "RL update", "SFT update", "evaluation"))
    assert "\nfits: " in out
    assert "tokens/s" in out


def test_a_protection_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    def importance(method: str) -> list[str]:
        main(["plan", "--config", "tiny", "--config", method, "--gpus", "1"])
        rows = {row.split("|")[1].strip(): row.split("|") for row in capsys.readouterr().out.splitlines() if "|" in row}
        place = rows["moment"].index(" importance ")
        return [rows[moment][place].strip() for moment in ("RL update", "SFT update")]

    assert importance("methods/interleave") == ["-", "-"]
    assert importance("methods/rpsft") == ["-", "0.00"]
    assert importance("{conflict: {fraction: 0.5}, buffer: {size: 8, max_accuracy: 0.5}}") == ["0.00", "0.00"]


@pytest.mark.parametrize(
    ("method", "tokens"), [("interleave", 3), ("own_rollouts", 9), ("self_sft", 9), ("sdft", 9)], ids=str
)
def test_sft_is_planned_on_the_responses_that_it_learns_from(method: str, tokens: int) -> None:
    lengths = ["--data.demonstrations.max_tokens", "3", "--model.rollout.sampling.max_new_tokens", "9"]
    found, _, said = planned(["--config", "tiny", "--config", f"methods/{method}", "--gpus", "1", *lengths])
    assert found.work.demonstration == tokens
    assert any("teacher" in line for line in said) == (method == "sdft")
    assert (found.sft_update().parts["reference"] > 0) == (method == "sdft")
    assert any(moment.name == "SFT teacher" for moment in found.moments) == (method == "sdft")


def test_an_engine_of_ones_own_that_decodes_in_process_may_take_other_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = "from mifo_lightning.rollout.in_process import InProcessEngine\n"
    own = (
        "class SlowInProcessEngine(InProcessEngine):\n    def __init__(self, nap: float = 0.0, rows: int = 512): ...\n"
    )
    Path(tmp_path, "own_engine.py").write_text(base + own)
    monkeypatch.syspath_prepend(tmp_path)
    main(
        ["plan", *MIFO, "--model.rollout.engine", "own_engine.SlowInProcessEngine", "--model.rollout.engine.rows", "4"]
    )
    assert "\nfits: " in capsys.readouterr().out


def test_what_cannot_be_planned_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "gpus: 0 is not allowed; it must be above 0" in refused(capsys, "plan", *MIFO, "--gpus", "0")
    assert "does not divide by 5 ranks" in refused(capsys, "plan", *MIFO, "--gpus", "5")
    assert "trainer.strategy: fsdp is not allowed" in refused(capsys, "plan", *MIFO, "--trainer.strategy", "fsdp")
    assert "has no config.json" in refused(capsys, "plan", *MIFO, "--model.model", str(tmp_path))


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B", "meta-llama/Llama-3.1-70B"])
def test_published_shapes_travel_with_the_package(name: str) -> None:
    from mifo_lightning.cli.plan import PACKAGED, SHAPES
    from mifo_lightning.policy.pretrained import read_blueprint

    model = read_blueprint(name, str(SHAPES / PACKAGED[name]), False)
    sizes = {"1.5B": 1_543_714_304, "7B": 7_615_616_512, "70B": 70_553_706_496}  # as their model cards say
    assert sum(p.numel() for p in model.parameters()) == sizes[name.rpartition("-")[2]]
    assert multiplying(model) <= Sizes.of(model).total
