"""How long does a GRPO step take, and how much memory, beside TRL's? One table, sides interleaved, one CPU thread.

    make bench                                                       # sets TRL up in an environment of its own
    python -m benchmarks.run --model DIR --trl trl-env/bin/python    # DIR: a Hugging Face directory

A step is 4 prompts of 75 tokens x 8 responses of exactly 32, all groups trained: drawn at temperature 1, graded by a
coin, one AdamW update. Every measurement is a process of its own, of three steps, the first of which does not count;
rounds alternate between the sides, so that a machine that slows down slows all. Seconds are CPU seconds.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import measured

PROMPTS, TOKENS, GROUP, LENGTH, STEPS = 4, 75, 8, 32, 3
SIDES: dict[str, dict[str, Any]] = {
    "TRL, fp32": {"trl": True, "bf16": False},
    "ours, fp32": {"share": None, "bf16": False},
    "ours, fp32, every row with its own prompt": {"share": False, "bf16": False},
    "TRL, bf16": {"trl": True, "bf16": True},
    "ours, bf16-mixed": {"share": None, "bf16": True},
}


def coin(texts: Sequence[str]) -> list[float]:
    """0 or -1 at random: what was cut off gets at most 0 here, and every response is."""
    return [-float(zlib.crc32(text.encode()) % 2) for text in texts]


def prompts(tokenizer: Any, count: int = PROMPTS * STEPS) -> list[str]:
    """Texts of exactly `TOKENS` tokens each."""
    words = tokenizer.encode(Path(__file__).read_text(encoding="utf-8"), add_special_tokens=False)
    found: list[str] = []
    start = 0
    while len(found) < count:
        text = tokenizer.decode(words[start % 300 : start % 300 + TOKENS])
        start += 7
        if len(tokenizer.encode(text, add_special_tokens=False)) == TOKENS and text not in found:
            found.append(text)
    return found


class Clock:
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.took: list[float] = []

    def begin(self) -> None:
        """A step begins."""
        self.start = time.process_time()

    def end(self) -> None:
        """It is done."""
        self.took.append(time.process_time() - self.start)


def ours(model: str, share: bool | None, bf16: bool, clock: Clock) -> None:
    """Three steps of this framework."""
    import lightning

    import mifo_lightning as mifo
    from mifo_lightning.policy.ending import set_ends
    from mifo_lightning.policy.loading import load_tokenizer

    class Timing(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.begin()

        def on_train_batch_end(self, *_: Any) -> None:
            clock.end()

    def reward(responses: list[str], truths: list[str]) -> list[float]:
        return coin(responses)

    texts = prompts(load_tokenizer(model))
    rows: Any = [
        {"prompt": text, "data_source": "text", "reward_model": {"ground_truth": "-"}, "target": None} for text in texts
    ]
    lightning.seed_everything(0, verbose=False)
    module = mifo.MifoModule(
        model,
        mifo.FunctionReward(reward, isolate=False),
        mifo.Rollout(group_size=GROUP, sampling=mifo.Sampling(max_new_tokens=LENGTH), self_check=False),
        loading=mifo.Loading(share_prompts=share),
    )
    data = mifo.QuestionData(
        rows,
        prompts=mifo.Prompts(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"),
        schedule=mifo.Schedule(rl_steps=STEPS, prompts_per_step=PROMPTS, fit_sizes=False),
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        precision="bf16-mixed" if bf16 else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Timing()],
    )
    set_ends(module.tokenizer, set())  # every response is of full length
    trainer.fit(module, data)


def trl(model: str, bf16: bool, clock: Clock) -> None:
    """Three steps of TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Timing(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    with tempfile.TemporaryDirectory() as place:
        settings = GRPOConfig(
            output_dir=place,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=LENGTH,
            generation_kwargs={"min_new_tokens": LENGTH},
            max_steps=STEPS,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            loss_type="grpo",
            beta=0.0,
            save_strategy="no",
            seed=0,
            use_cpu=True,
            bf16=bf16,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: coin(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": t} for t in prompts(AutoTokenizer.from_pretrained(model))]),
            callbacks=[Timing()],
        )
        trainer.train()


def measure(model: str, side: str) -> dict[str, float]:
    """One side in this process: median CPU seconds of its steps but the first, and peak memory in GiB."""
    import torch

    torch.set_num_threads(1)
    clock, settings = Clock(), dict(SIDES[side])
    (trl if settings.pop("trl", False) else ours)(model, **settings, clock=clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": statistics.median(clock.took[1:]), "peak": peak}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: medians over rounds, their spread, and what they are of TRL's in fp32."""
    lines = ["| step | CPU seconds | least - most | of TRL, fp32 | peak GiB |", "|---|---|---|---|---|"]
    base = statistics.median(r["seconds"] for r in found["TRL, fp32"]) if found.get("TRL, fp32") else None
    for side, rounds in found.items():
        if rounds:
            seconds = sorted(r["seconds"] for r in rounds)
            middle, peak = statistics.median(seconds), max(r["peak"] for r in rounds)
            share = f"{middle / base:.2f}" if base else "-"
            lines.append(f"| {side} | {middle:.1f} | {seconds[0]:.1f} - {seconds[-1]:.1f} | {share} | {peak:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every side in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--trl", help="the Python of an environment with TRL; without it this framework alone")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.model, given.side)))
        return
    sides = [side for side, settings in SIDES.items() if given.trl or not settings.get("trl")]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(given.rounds):
        for side in sides:
            python = given.trl if SIDES[side].get("trl") else sys.executable
            found[side].append(measured(side, "benchmarks.run", "--model", given.model, "--side", side, python=python))
    print(f"{platform.processor() or platform.machine()}, one thread, {given.rounds} rounds\n\n{table(found)}")


if __name__ == "__main__":
    main()
