"""What `benchmarks.gpu` measures, each in a process of its own: decoding, steps of this framework, steps of TRL."""

import importlib
import statistics
from functools import partial
from itertools import groupby
from typing import Any

import torch

from benchmarks.gpu_counts import matmul_flops, multiplying, peaks, update_flops, wait
from benchmarks.shapes import SHAPES, random_model, words
from benchmarks.sizes import Clock, Size, prompts

SQUARES = {"cuda": 8192, "cpu": 256}  # side of the matrices whose product is measured
BEFORE, AFTER = 5, 3  # RL steps before and after the SFT phase, which has two


def loaded(shape: str, device: str) -> tuple[Any, Any]:
    """A random model of a shape with a tokenizer of words."""
    tokenizer = words(SHAPES[shape]["vocab_size"])
    return random_model(tokenizer, SHAPES[shape], device), tokenizer


def decode(shape: str, device: str, size: Size, rows: int) -> dict[str, Any]:
    """Tokens a second of the in-process engine with so many rows at once."""
    from benchmarks.endless import NEVER
    from mifo_lightning.policy.ending import set_ends
    from mifo_lightning.policy.loading import Loaded, load_policy
    from mifo_lightning.rollout.engine import Sampling
    from mifo_lightning.rollout.in_process import InProcessEngine

    model, tokenizer = loaded(shape, device)
    policy = load_policy(Loaded(model, tokenizer))
    policy.numerics = lambda: torch.autocast(device, torch.bfloat16)
    set_ends(tokenizer, NEVER)  # every response is of full length
    asked = [[i % len(tokenizer)] * size.tokens for i in range(rows // size.group)]
    engine = InProcessEngine(rows, cache_tokens=rows * (size.tokens + size.length))

    def drawn(length: int) -> tuple[int, float]:
        start, sampling = wait(device), Sampling(max_new_tokens=length)
        groups = engine.generate(policy, tokenizer, asked, list(range(len(asked))), size.group, sampling)
        return sum(len(c.tokens) for group in groups for c in group), wait(device) - start

    drawn(4)  # libraries are loaded, kernels chosen
    tokens, seconds = drawn(size.length)
    return {"seconds": seconds, "rate": tokens / seconds} | peaks(device)


def watching(device: str) -> tuple[Any, Any, list[tuple[str, float, float]]]:
    """A profiler, a callback, and where they put each step: its kind, its seconds, and those of its update alone."""
    import lightning
    from lightning.pytorch.profilers import Profiler

    found: list[tuple[str, float, float]] = []
    begun: dict[str, float] = {}
    other = {"mifo.rollout": 0.0, "mifo.reward": 0.0, "mifo.score": 0.0, "mifo.entropies": 0.0}

    class Activities(Profiler):
        def start(self, action_name: str) -> None:
            if action_name in other:
                begun[action_name] = wait(device)

        def stop(self, action_name: str) -> None:
            if action_name in other:
                other[action_name] += wait(device) - begun[action_name]

    class Steps(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            other.update(dict.fromkeys(other, 0.0))
            begun["step"] = wait(device)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seconds = wait(device) - begun["step"]
            found.append((batch["phase"], seconds, seconds - sum(other.values())))

    return Activities(), Steps(), found


def train(shape: str, device: str, size: Size, method: bool) -> dict[str, Any]:
    """GRPO steps; or, with the `method`'s four callbacks, eight of them and an SFT phase of two after five."""
    import mifo_lightning as mifo
    from benchmarks import ours
    from benchmarks.endless import Endless
    from mifo_callbacks.recipe import mifo as recipe

    model, tokenizer = loaded(shape, device)
    peak = matmul_flops(device, torch.bfloat16, SQUARES[device])
    steps, buffer = BEFORE + AFTER if method else size.steps, BEFORE * size.prompts
    texts = zip(*(prompts(tokenizer, size.prompts * steps, n) for n in (size.tokens, size.length - 1)), strict=True)
    cut = mifo.OptimizerSettings(micro_batch_tokens=size.chunk)
    module = ours.module((model, tokenizer), size, optimizer=cut)
    questions = ours.data(list(texts), rl_steps=steps, prompts_per_step=size.prompts, sft_batch=buffer // 2)
    activities, watch, found = watching(device)
    callbacks = [Endless(), watch, *(recipe(size=buffer, max_accuracy=1.0) if method else [])]
    accelerator = "gpu" if device == "cuda" else "cpu"
    ours.trainer(*callbacks, bf16=True, accelerator=accelerator, profiler=activities).fit(module, questions)
    rl, updates, sft = (
        statistics.median([(whole, update)[part] for name, whole, update in found if name == kind][1:] or [0.0])
        for kind, part in (("rl", 0), ("rl", 1), ("sft", 0))
    )
    assert module.policy is not None
    flops = update_flops(model.config, multiplying(model), size, bool(module.policy.share_prompts))
    phases = [f"{len(list(same))} {kind.upper()}" for kind, same in groupby(kind for kind, _, _ in found)]
    return {
        "seconds": rl,
        "rate": size.rows * size.length / updates,
        "mfu": flops / updates / peak,
        "note": f"matmul {peak / 1e12:.4g} TFLOP/s"
        + (f"; {', '.join(phases)} steps; an SFT step {sft:.2f} s" if method else ""),
    } | peaks(device)


def trl(shape: str, device: str, size: Size) -> dict[str, Any]:
    """Steps of TRL's GRPOTrainer, in chunks of as many rows as fit into ours."""
    clock = Clock(partial(wait, device))
    importlib.import_module("benchmarks.theirs").grpo(loaded(shape, device), size, clock, bf16=True)
    return {"seconds": statistics.median(clock.took[1:])} | peaks(device)
