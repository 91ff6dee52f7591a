"""What do MIFO's four callbacks cost on a real model? CPU seconds and memory, one thread.

    python -m benchmarks.callbacks --model DIR    # a Hugging Face directory

One run with all four: two RL steps as in `benchmarks.run` (4 prompts of 75 tokens x 8 responses of 32, a group at a
time), which fill the buffer, then two SFT steps on 16 demonstrations of 32 tokens. What a callback does once a phase
(copy of the weights, map and its quantiles; mask, copy of what is frozen and the check that it stood still) is told
apart from what it does at each step, so that the share of a step follows for phases of any length.
"""

import argparse
import platform
import time
from collections import defaultdict
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import Profiler

import mifo_callbacks
import mifo_lightning as mifo
from benchmarks.endless import Endless
from benchmarks.ours import data, module, trainer
from benchmarks.sizes import GROUP, LENGTH, PROMPTS, TOKENS, Size, prompts
from mifo_callbacks.recipe import mifo as recipe

RL_STEPS, SFT_STEPS, SFT_BATCH = 2, 2, 16
PHASES = {"rl": 4, "sft": 8}  # steps a phase that shares are of: a buffer of 128, the method's, is eight batches of 16
TARGETS = {"rl": 0.01, "sft": 0.03}
ONCE = "once"
OF = {  # the phase that a callback's work of once a phase is for
    "EntropyTokenSelection": "sft",
    "ImportanceEMA": "rl",
    "GradientFreezing": "sft",
    "BufferPhaseSwitch": "rl",
}


class Seconds(Profiler):
    """CPU seconds of the method's callbacks: by name, and in which phase's later steps or `ONCE`."""

    def __init__(self) -> None:
        super().__init__()
        self.place = ONCE
        self.spent: dict[tuple[str, str], float] = defaultdict(float)
        self._open: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """Begin an action."""
        if action_name.startswith("[Callback]"):
            self._open[action_name] = time.process_time()

    def stop(self, action_name: str) -> None:
        """End it."""
        name = next((name for name in OF if name in action_name), None)
        if name and action_name in self._open:
            self.spent[name, self.place] += time.process_time() - self._open.pop(action_name)


class Steps(lightning.Callback):
    """Seconds of steps, and bytes of the callbacks' state; stands before the other callbacks."""

    def __init__(self, seconds: Seconds) -> None:
        self.seconds = seconds
        self.took: dict[str, list[float]] = defaultdict(list)
        self.bytes: dict[str, dict[str, int]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The clock starts."""
        self.seconds.place = batch["phase"] if batch["phase"] in self.took else ONCE
        self.began = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """It stops; what others do at the end of the batch is theirs."""
        self.took[batch["phase"]].append(time.process_time() - self.began)
        importance = next(c for c in trainer.callbacks if isinstance(c, mifo_callbacks.ImportanceEMA))
        freezing = next(c for c in trainer.callbacks if isinstance(c, mifo_callbacks.GradientFreezing))
        parts: dict[str, Any] = {
            "map": importance._map,
            "copy": {**importance._start, **freezing._reference},
            "mask": freezing._masks,
        }
        self.bytes[batch["phase"]] = {name: sum(t.nbytes for t in held.values()) for name, held in parts.items()}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """What others do when training ends they do once."""
        self.seconds.place = ONCE


def run(
    model: str, rl_phases: int = 1, importance: mifo_callbacks.ImportanceEMA | None = None
) -> tuple[Steps, Seconds, int]:
    """The run, with this importance in place of the recipe's; also how many weights there are."""
    target = " ".join(str(i % 10) for i in range(LENGTH // 2))
    cut = mifo.OptimizerSettings(micro_batches=PROMPTS)
    trained = module(model, Size(PROMPTS, TOKENS, GROUP, LENGTH), optimizer=cut)
    size = RL_STEPS * PROMPTS
    questions = data(
        [(text, target) for text in prompts(trained.tokenizer, size, TOKENS)],
        rl_steps=rl_phases * RL_STEPS,
        prompts_per_step=PROMPTS,
        sft_batch=SFT_BATCH,
        sft_epochs=SFT_STEPS * SFT_BATCH // size,
    )
    seconds = Seconds()
    steps = Steps(seconds)
    method = recipe(size=size, max_accuracy=1.0)
    if importance is not None:
        method = [importance if isinstance(c, mifo_callbacks.ImportanceEMA) else c for c in method]
    # with a logger quantiles and the like are computed
    watched = trainer(Endless(), steps, *method, logger=DummyLogger(), profiler=seconds)
    watched.fit(trained, questions)
    return steps, seconds, sum(p.numel() for p in trained.parameters())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps, seconds, weights = run(given.model)
    print(f"{platform.processor() or platform.machine()}, one thread, {weights:,} weights\n")
    took = {phase: min(seconds) for phase, seconds in steps.took.items()}  # the first has what begins a phase in it
    print(", ".join(f"{phase} step {seconds:.1f} CPU seconds" for phase, seconds in took.items()) + "\n")
    print("| callback | once a phase, s | an RL step, s | an SFT step, s |")
    print("|---|---|---|---|")
    each = {
        (name, phase): seconds.spent[name, phase] / (steps - 1)
        for name in OF
        for phase, steps in (("rl", RL_STEPS), ("sft", SFT_STEPS))
    }
    for name in OF:
        print(f"| {name} | {seconds.spent[name, ONCE]:.2f} | {each[name, 'rl']:.2f} | {each[name, 'sft']:.2f} |")
    print("\n| phase | CPU seconds a step | of them the callbacks | share | target |")
    print("|---|---|---|---|---|")
    for phase, length in PHASES.items():
        once = sum(seconds.spent[name, ONCE] for name in OF if OF[name] == phase)
        cost = once / length + sum(each[name, phase] for name in OF)
        # the quickest step is not a phase's first: its time lacks what is done once
        share = f"{cost / took[phase]:.1%} | {TARGETS[phase]:.0%}"
        print(f"| {length} {phase} steps | {took[phase]:.1f} | {cost:.2f} | {share} |")
    for phase, held in steps.bytes.items():
        print(f"\nbytes a weight in {phase}: " + ", ".join(f"{name} {n / weights:.3f}" for name, n in held.items()))


if __name__ == "__main__":
    main()
