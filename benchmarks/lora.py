"""What does an adapter save? MIFO on all weights and on low-rank adapters, each in a process of its own, one thread.

    python -m benchmarks.lora --model DIR    # DIR: a Hugging Face directory

Two RL steps of 4 prompts of 75 tokens x 8 responses of exactly 32, a prompt at a time, graded by a coin; after each an
SFT phase of two steps on 2 demonstrations of 150 tokens, with entropy selection, importance and freezing. Seconds are
CPU seconds of an optimizer step without what callbacks do between phases, medians without the first of each kind; the
checkpoint is the one at the end.
"""

import argparse
import json
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch

import mifo_lightning as mifo
from benchmarks.child import measured
from benchmarks.endless import Endless
from benchmarks.ours import data, module, trainer
from benchmarks.sizes import GROUP, LENGTH, PROMPTS, TOKENS, Clock, Size, prompts
from mifo_callbacks import BufferPhaseSwitch, EntropyTokenSelection, GradientFreezing, ImportanceEMA
from mifo_callbacks.sharding import trainable

STEPS = 2
SIDES: dict[str, dict[str, Any] | None] = {
    "all weights": None,
    "rank 16": {},
    "rank 16, frozen A": {"frozen_a": True},
}


class Timing(lightning.Callback):
    """CPU seconds of the steps of each phase kind."""

    def __init__(self) -> None:
        self.clocks = {"rl": Clock(), "sft": Clock()}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self.clocks[batch["phase"]].begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """It is done."""
        self.clocks[batch["phase"]].end()


def train(model: str, adapter: dict[str, Any] | None) -> dict[str, float]:
    """Seconds of an RL step and of an SFT step, trained weights, bytes of a checkpoint and peak memory in GiB."""
    torch.set_num_threads(1)
    trained = module(
        model,
        Size(PROMPTS, TOKENS, GROUP, LENGTH),
        optimizer=mifo.OptimizerSettings(micro_batches=PROMPTS),
        adapter=None if adapter is None else mifo.Adapter(**adapter),
    )
    texts = prompts(trained.tokenizer, PROMPTS * STEPS, TOKENS)
    questions = data([(text, 2 * text) for text in texts], rl_steps=STEPS, prompts_per_step=PROMPTS, sft_batch=2)
    timing = Timing()
    method = [EntropyTokenSelection(), ImportanceEMA(), GradientFreezing(), BufferPhaseSwitch(size=PROMPTS)]
    run = trainer(*method, timing, Endless())
    run.fit(trained, questions)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "last.ckpt")
        run.save_checkpoint(path)
        kept = path.stat().st_size / 2**20
    seconds = {phase: statistics.median(clock.took[1:]) for phase, clock in timing.clocks.items()}
    return {**seconds, "trained": sum(p.numel() for p in trainable(trained).values()), "kept": kept, "peak": peak}


def main() -> None:
    """Measure every side in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(train(given.model, SIDES[given.side])))
        return
    print(f"{PROMPTS} prompts of {TOKENS} tokens x {GROUP} responses of {LENGTH}, one thread\n")
    print("| trained | weights, millions | RL step, s | SFT step, s | peak GiB | checkpoint MiB |")
    print("|---|---|---|---|---|---|")
    for side in SIDES:
        found = measured(side, "benchmarks.lora", "--model", given.model, "--side", side)
        numbers = f"{found['trained'] / 1e6:.2f} | {found['rl']:.1f} | {found['sft']:.1f} | {found['peak']:.1f}"
        print(f"| {side} | {numbers} | {found['kept']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
