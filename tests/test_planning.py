"""`mifo plan`: it counts what torch's allocator hands out, and says what to change where a run does not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import MIFO, refused
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM as Auto
from transformers import GemmaConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from mifo_lightning.cli import main
from mifo_lightning.monitors.costs import multiplying
from mifo_lightning.planning.memory import Plan, Sizes, cache_bytes
from mifo_lightning.planning.speed import GPU, speed
from mifo_lightning.planning.table import verdict
from mifo_lightning.planning.trace import Tracer
from mifo_lightning.planning.workload import Workload
from mifo_lightning.policy.loading import recompute_layers
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.rollout.engine import Sampling

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
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


@pytest.mark.parametrize(
    ("config", "case"),
    [
        *((FAMILIES[0], case) for case in ("whole", "shared", "checkpointing", "bf16")),
        *((f, "bf16") for f in FAMILIES[1:]),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_an_update_needs_what_it_was_planned_to(config: PreTrainedConfig, case: str) -> None:
    policy, checkpointing, bf16 = Policy(Auto.from_config(config)), case == "checkpointing", case == "bf16"
    policy.share_prompts = case == "shared"
    if checkpointing:
        recompute_layers(policy.model)
    prompts = [[1 + i // 4] * PROMPT for i in range(ROWS)]
    sequences = Sequences.pack(prompts, [[3] * RESPONSE] * ROWS, 0)

    def update(last: bool = True) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logp, _ = policy(sequences, grouped=True)
            if not last:
                with torch.autocast("cpu", enabled=False):
                    logp.sum().backward()
        if last:
            logp.sum().backward()

    update()
    policy.zero_grad()
    tracer = Tracer(meta(config), bf16, checkpointing)
    traced = tracer.update(ROWS, 2 if policy.share_prompts else None, PROMPT, RESPONSE, 1, False)
    assert sum(traced.values()) == pytest.approx(allocated(update), rel=0.1)
    later = tracer.update(ROWS, 2 if policy.share_prompts else None, PROMPT, RESPONSE, 2, False)
    there = sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    assert sum(later.values()) == pytest.approx(allocated(lambda: update(last=False)) + there, rel=0.1)


def test_decoding_needs_what_it_was_planned_to() -> None:
    config = FAMILIES[0]
    policy, sampling = Policy(Auto.from_config(config)), Sampling(max_new_tokens=RESPONSE)
    plan = Plan(Workload(prompt=PROMPT, response=RESPONSE, prompts=2, group=4), meta(config))
    last = torch.full((ROWS, PROMPT + RESPONSE), 3)

    def cache_alone() -> int:
        with torch.no_grad():
            _, cache = policy.decode(last, None, None, None)
        return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))

    per_token = plan.cache_per_token
    assert per_token == 2 * 3 * 2 * 16 * 4
    assert ROWS * (PROMPT + RESPONSE) * per_token == cache_alone()
    assert cache_bytes(ROWS, PROMPT + RESPONSE, per_token, 3) == cache_alone() * 7 // 6
    assert plan.generation("generation", ROWS, 4, sampling).parts["cache"] == cache_alone() * 7 // 6


def test_what_is_always_there_follows_the_strategy_and_the_method() -> None:
    def steps(**changes: Any) -> dict[str, dict[str, int]]:
        work = replace(Workload(prompt=8, response=8, prompts=2, group=2, demonstrations=2, demonstration=8), **changes)
        return {moment.name: moment.parts for moment in Plan(work, meta(FAMILIES[0])).moments}

    n = Sizes.of(meta(FAMILIES[0])).total
    one = steps()
    assert one["RL step"] | {"activations": 0} == one["RL step"]
    assert [one["RL step"][k] for k in ("weights", "gradients", "optimizer")] == [4 * n, 4 * n, 8 * n]
    assert one["SFT step"]["optimizer"] == 16 * n, "those of RL are parked"
    assert steps(moments="shared")["SFT step"]["optimizer"] == 8 * n
    mifo = steps(importance=True, freezing=True)
    assert (mifo["RL step"]["importance"], mifo["SFT step"]["importance"]) == (8 * n, 9 * n)
    assert steps(reference=True)["scoring"]["reference"] == 4 * n
    assert steps(ranks=2)["RL step"]["gradients"] == 8 * n, "DDP keeps buckets beside the gradients"
    sharded = steps(ranks=2, sharded=True)
    assert sharded["RL step"]["optimizer"] == 4 * n
    assert sharded["generation"]["gathered"] == 4 * n, "sampling gathers all"
    assert 0 < sharded["RL update"]["gathered"] < 12 * n


def test_less_is_planned_for_smaller_settings() -> None:
    work = Workload(prompt=32, response=32, prompts=4, group=4, bf16=True)
    model = FAMILIES[0]
    most = Plan(work, meta(model))
    update = most.update().total
    assert Plan(replace(work, micro_batches=4), meta(model)).update().parts["activations"] < update / 2
    assert Plan(replace(work, checkpointing=True), meta(model)).update().total < update
    assert Plan(replace(work, share_prompts=True), meta(model)).update().total < update
    rows = Plan(replace(work, engine_rows=4), meta(model))
    assert rows.moments[0].parts["cache"] * 4 == most.moments[0].parts["cache"]
    assert Workload(prompts=4, group=4, micro_batches=3).chunk() == (6, 2)
    assert Workload(prompts=4, group=4, micro_batches=16).chunk() == (1, 1)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"response": 256, "prompts": 1, "group": 64, "micro_batches": 64}, "model.rollout.engine.init_args.rows to "),
        ({"response": 32, "prompts": 16, "engine_rows": 1}, "model.optimizer.micro_batches to "),
    ],
)
def test_what_does_not_fit_says_what_to_change_and_then_fits(changes: dict[str, Any], key: str) -> None:
    work, gb = replace(Workload(prompt=32, group=8), **changes), 1e9
    plan = Plan(work, meta(FAMILIES[0]))
    memory = plan.peak.total * 0.7 / gb
    (line, *_) = verdict(plan, memory)
    assert line.startswith(f"does not fit: {plan.peak.name} needs ")
    number = int(line.partition(key)[2])
    setting = "engine_rows" if "rows" in key else "micro_batches"
    better = Plan(replace(work, **{setting: number}), meta(FAMILIES[0]))
    assert verdict(better, memory)[0].startswith("fits: ")
    assert "ModelParallelStrategy" in verdict(plan, 1e-6)[0]
    assert "a smaller model" in verdict(Plan(replace(work, ranks=64, sharded=True), meta(FAMILIES[0])), 1e-6)[0]


def test_speed_is_bound_by_arithmetic_or_by_bandwidth() -> None:
    work, n = Workload(prompts=8, prompt=100, response=100, bf16=True), 10**9
    found = speed(work, GPU(), n, 0, 0, shared=False)
    assert found.decoding == pytest.approx(64 * GPU().bandwidth * 1e9 * 0.6 / (2 * n))  # 64 rows: the weights are read
    assert found.update == pytest.approx(0.4 * 989e12 / (6 * n) / 2)  # half of the tokens are prompts
    assert speed(work, GPU(), n, 0, 0, shared=True).update == pytest.approx(found.update * 2 * 64 / (8 + 64))
    assert speed(replace(work, ranks=2), GPU(), n, 0, 0, False).decoding == 2 * found.decoding
    assert speed(replace(work, checkpointing=True), GPU(), n, 0, 0, False).update == pytest.approx(found.update * 6 / 8)
    assert found.step == pytest.approx(6400 / found.decoding + 6400 / found.update)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *MIFO, "--gpus", "2", "--gpu_memory", "16", "--response_tokens", "10"])
    out = capsys.readouterr().out
    assert out.startswith(
        "embedded: 0.000308 billion weights, 32-true, 2 x 16 GB, DDP; GB on each\nnote: prompts of 16"
    )
    assert "| moment | weights | gradients | optimizer | importance | activations | cache | logits | total |" in out
    assert all(f"\n| {moment} |" in out for moment in ("generation", "RL update", "SFT update", "evaluation"))
    assert "\nfits: " in out
    assert "tokens/s" in out


def test_what_cannot_be_planned_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "gpus: 0 is not allowed; it must be above 0" in refused(capsys, "plan", *MIFO, "--gpus", "0")
    assert "does not divide by 5 ranks" in refused(capsys, "plan", *MIFO, "--gpus", "5")
    assert "trainer.strategy: fsdp is not allowed" in refused(capsys, "plan", *MIFO, "--trainer.strategy", "fsdp")
    assert "has no config.json" in refused(capsys, "plan", *MIFO, "--model.model", str(tmp_path))
    assert "needs a configuration" in refused(capsys, "plan")
    assert "unrecognized arguments: --gpuss" in refused(capsys, "plan", *MIFO, "--gpuss", "2")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B", "meta-llama/Llama-3.1-70B"])
def test_published_shapes_travel_with_the_package(name: str) -> None:
    from mifo_lightning.cli.plan import PACKAGED, SHAPES
    from mifo_lightning.policy.pretrained import read_blueprint

    model = read_blueprint(name, str(SHAPES / PACKAGED[name]), False)
    sizes = {"1.5B": 1_543_714_304, "7B": 7_615_616_512, "70B": 70_553_706_496}  # as their model cards say
    assert sum(p.numel() for p in model.parameters()) == sizes[name.rpartition("-")[2]]
    assert multiplying(model) <= Sizes.of(model).total
