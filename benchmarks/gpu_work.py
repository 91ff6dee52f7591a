"""What `benchmarks.gpu` measures, each in a process of its own: decoding, steps of this framework, steps of TRL."""

import statistics
import tempfile
from itertools import groupby
from typing import Any

import torch

from benchmarks.gpu_shapes import Size, matmul_flops, multiplying, peaks, random_model, update_flops, wait

STEPS = 3
BEFORE, AFTER = 5, 3  # RL steps before and after the SFT phase, which has two


def decode(shape: str, device: str, size: Size, rows: int) -> dict[str, Any]:
    """Tokens a second of the in-process engine with so many rows at once."""
    from benchmarks.endless import NEVER
    from mifo_lightning.policy.ending import set_ends
    from mifo_lightning.policy.loading import Loaded, load_policy
    from mifo_lightning.rollout.engine import Sampling
    from mifo_lightning.rollout.in_process import InProcessEngine

    model, tokenizer = random_model(shape, device)
    policy = load_policy(Loaded(model, tokenizer))
    policy.numerics = lambda: torch.autocast(device, torch.bfloat16)
    set_ends(tokenizer, NEVER)  # every response is of full length
    asked = [[i % len(tokenizer)] * size.tokens for i in range(rows // size.group)]
    engine = InProcessEngine(rows, cache_tokens=rows * (size.tokens + size.length))

    def drawn(length: int) -> tuple[int, float]:
        start = wait(device)
        groups = engine.generate(
            policy, tokenizer, asked, list(range(len(asked))), size.group, Sampling(max_new_tokens=length)
        )
        return sum(len(c.tokens) for group in groups for c in group), wait(device) - start

    drawn(4)  # libraries are loaded, kernels chosen
    tokens, seconds = drawn(size.length)
    return {"seconds": seconds, "rate": tokens / seconds} | peaks(device)


def prompts(size: Size, steps: int) -> list[str]:
    """Different texts for so many steps; the embedded task's tokens are characters."""
    return [f"{i:0{size.tokens}d}" for i in range(size.prompts * steps)]


def coin(texts: list[str]) -> list[float]:
    """0 and -1 in turn: both in every group, and what was cut off gets at most 0."""
    return [-float(i % 2) for i, _ in enumerate(texts)]


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


def run_of(model: Any, tokenizer: Any, size: Size, steps: int) -> tuple[Any, Any]:
    """Module and data of so many RL steps; an SFT phase would have two steps."""
    import mifo_lightning as mifo

    def reward(responses: list[str], truths: list[str]) -> list[float]:
        return coin(responses)

    module = mifo.MifoModule.from_model(
        model,
        tokenizer,
        reward=mifo.FunctionReward(reward, isolate=False),
        rollout=mifo.Rollout(group_size=size.group, sampling=mifo.Sampling(max_new_tokens=size.length)),
        optimizer=mifo.OptimizerSettings(micro_batch_tokens=size.chunk),
    )
    target = "1" * (size.length - 1)
    rows: Any = [
        {"prompt": text, "data_source": "-", "reward_model": {"ground_truth": "-"}, "target": target}
        for text in prompts(size, steps)
    ]
    schedule: dict[str, Any] = {"prompts_per_step": size.prompts, "sft_batch": BEFORE * size.prompts // 2}
    data = mifo.QuestionData(
        rows,
        prompts=mifo.Prompts(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"),
        demonstrations=mifo.Demonstrations(verify=False),
        schedule=mifo.Schedule(rl_steps=steps, fit_sizes=False, **schedule),
    )
    return module, data


def train(shape: str, device: str, size: Size, method: bool) -> dict[str, Any]:
    """Three GRPO steps; or, with the `method`'s four callbacks, eight of them and an SFT phase of two after five."""
    import lightning

    from benchmarks.endless import Endless
    from mifo_callbacks.recipe import mifo as recipe

    model, tokenizer = random_model(shape, device)
    peak = matmul_flops(device, torch.bfloat16, size.square)
    lightning.seed_everything(0, verbose=False)
    module, data = run_of(model, tokenizer, size, BEFORE + AFTER if method else STEPS)
    activities, steps, found = watching(device)
    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=-1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Endless(), steps, *(recipe(size=BEFORE * size.prompts, max_accuracy=1.0) if method else [])],
        profiler=activities,
    )
    trainer.fit(module, data)
    rl, updates, sft = (
        statistics.median([(whole, update)[part] for name, whole, update in found if name == kind][1:] or [0.0])
        for kind, part in (("rl", 0), ("rl", 1), ("sft", 0))
    )
    flops = update_flops(model.config, multiplying(model), size, module.policy.share_prompts)
    phases = [f"{len(list(same))} {kind.upper()}" for kind, same in groupby(kind for kind, _, _ in found)]
    return {
        "seconds": rl,
        "rate": size.prompts * size.group * size.length / updates,
        "mfu": flops / updates / peak,
        "note": f"matmul {peak / 1e12:.4g} TFLOP/s"
        + (f"; {', '.join(phases)} steps; an SFT step {sft:.2f} s" if method else ""),
    } | peaks(device)


def trl(shape: str, device: str, size: Size) -> dict[str, Any]:
    """Three steps of TRL's GRPOTrainer, in chunks of as many rows as fit into ours."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    took: list[float] = []

    class Timing(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            took.append(-wait(device))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            took[-1] += wait(device)

    model, tokenizer = random_model(shape, device)
    rows = size.prompts * size.group
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and n * (size.tokens + size.length) <= size.chunk)
    with tempfile.TemporaryDirectory() as place:
        settings = GRPOConfig(
            output_dir=place,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=rows // at_once,
            num_generations=size.group,
            max_completion_length=size.length,
            generation_kwargs={"min_new_tokens": size.length},
            max_steps=STEPS,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            loss_type="grpo",
            beta=0.0,
            save_strategy="no",
            seed=0,
            use_cpu=device == "cpu",
            bf16=True,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: coin(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts(size, STEPS)]),
            callbacks=[Timing()],
        )
        trainer.train()
    return {"seconds": statistics.median(took[1:])} | peaks(device)
