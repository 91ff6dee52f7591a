"""How long does a step take, and how much memory, beside TRL's and beside its products alone? Sides interleaved.

    make bench MODEL=DIR                                             # sets TRL up in an environment of its own
    python -m benchmarks.run --model DIR --trl trl-env/bin/python    # DIR: a Hugging Face directory
    python -m benchmarks.run --model DIR --work grpo sft             # some of the work, and this framework alone

Works: `grpo`, 4 prompts of 75 tokens x 8 responses of exactly 32 on the given model; `sft`, 16 demonstrations of 64
tokens behind prompts of 75 on it; on a random model of a million weights, 4 prompts of 16 tokens x 8 responses of
exactly 64 at a vocabulary of 32 (`forced`) and of 32,768 (`wide`), and of at most 64 at 32 (`ends`). All groups are
trained: responses are drawn at temperature 1 and graded by a coin, then one AdamW update. The limit is the products
with weights that such a step cannot do without.

Every measurement is a process of its own with one thread and several steps, the first of which does not count; rounds
alternate between the sides, so that a machine that slows down slows all. Seconds are CPU seconds.
"""

import argparse
import importlib
import json
import platform
import resource
import statistics
import sys
from typing import Any, NamedTuple

from benchmarks.child import measured
from benchmarks.shapes import million, random_model, words
from benchmarks.sizes import GROUP, LENGTH, PROMPTS, TOKENS, Clock, Model, Size


class Work(NamedTuple):
    """What is compared.

    Attributes:
        kind: Function of the sides' modules.
        size: Of a step.
        vocabulary: Of the random model it runs on; 0: on the given one.
        sides: Module and arguments by name; others are measured against the first of TRL's.
    """

    kind: str
    size: Size
    vocabulary: int
    sides: dict[str, tuple[str, dict[str, Any]]]


FP32, BF16 = {"bf16": False}, {"bf16": True}
BOTH = {"TRL": ("theirs", FP32), "ours": ("ours", FP32), "limit": ("products", FP32)}
WORKS = {
    "grpo": Work(
        "grpo",
        Size(PROMPTS, TOKENS, GROUP, LENGTH),
        0,
        {
            "TRL, fp32": ("theirs", FP32),
            "ours, fp32": ("ours", FP32),
            "ours, fp32, in two micro-batches": ("ours", FP32 | {"parts": 2}),
            "ours, fp32, every row with its own prompt": ("ours", FP32 | {"share": False}),
            "limit, fp32": ("products", FP32),
            "TRL, bf16": ("theirs", BF16),
            "ours, bf16-mixed": ("ours", BF16),
            "limit, bf16": ("products", BF16),
        },
    ),
    "sft": Work(
        "sft",
        Size(prompts=16, tokens=75, group=1, length=64),
        0,
        {
            "TRL, fp32": ("theirs", FP32),
            "ours, fp32": ("ours", FP32 | {"selection": False}),
            "ours, fp32, selection": ("ours", FP32 | {"selection": True}),
            "limit, fp32": ("products", FP32),
        },
    ),
    "forced": Work("grpo", Size(prompts=4, tokens=16, group=8, length=64, steps=11), 32, BOTH),
    "ends": Work(  # without a limit: it depends on how long each response is
        "grpo",
        Size(prompts=4, tokens=16, group=8, length=64, steps=21, ends=True),
        32,
        {side: how for side, how in BOTH.items() if side != "limit"},
    ),
    "wide": Work("grpo", Size(prompts=4, tokens=16, group=8, length=64), 32768, BOTH),
}


def run(work: Work, side: str, model: str, clock: Clock) -> None:
    """One side's steps, in this process, with one thread."""
    import torch

    torch.set_num_threads(1)
    module, settings = work.sides[side]
    steps = getattr(importlib.import_module(f"benchmarks.{module}"), work.kind)
    used: Model = model
    if work.vocabulary:
        tokenizer = words(work.vocabulary)
        used = random_model(tokenizer, million(work.vocabulary)), tokenizer
    steps(used, work.size, clock, **settings)


def measure(work: Work, side: str, model: str) -> dict[str, float]:
    """Median CPU seconds of a side's steps, or of a token where lengths differ, and peak memory in GiB."""
    clock = Clock()
    run(work, side, model, clock)
    took, tokens = clock.took[1:], clock.tokens[1:]
    seconds = sum(took) / sum(tokens) if work.size.ends else statistics.median(took)
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def profiled(work: Work, side: str, model: str) -> str:
    """Where the time of a side's last step goes, by operation."""
    from torch.profiler import ProfilerActivity, profile

    seen = profile(activities=[ProfilerActivity.CPU])

    class Profiled(Clock):
        def begin(self) -> None:
            super().begin()
            if len(self.tokens) == work.size.steps:
                seen.start()

        def end(self) -> None:
            super().end()
            if len(self.tokens) == work.size.steps:
                seen.stop()

    run(work, side, model, Profiled())
    return str(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


def lines(name: str, found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Rows of a Markdown table: medians over rounds, their spread, and what they are of TRL's in fp32."""
    scale, unit, digits = (1e3, "ms a token", 3) if WORKS[name].size.ends else (1, "s", 2)
    of = [statistics.median(r["seconds"] for r in rounds) for side, rounds in found.items() if side.startswith("TRL")]
    rows = []
    for side, rounds in found.items():
        seconds = sorted(r["seconds"] * scale for r in rounds)
        middle, peak = statistics.median(seconds), max(r["peak"] for r in rounds)
        share = f"{middle / scale / of[0]:.2f}" if of else "-"
        spread = f"{middle:.{digits}f} {unit} | {seconds[0]:.{digits}f} - {seconds[-1]:.{digits}f}"
        rows.append(f"| {name} | {side} | {spread} | {share} | {peak:.1f} |")
    return rows


def main() -> None:
    """Measure every side in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--trl", help="the Python of an environment with TRL; without it this framework alone")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS), help="all of it by default")
    parser.add_argument("--side", help="one side of one work, in this process")
    parser.add_argument("--profile", action="store_true", help="of that side: where the time of a step goes")
    given = parser.parse_args()
    if given.side:
        work = WORKS[given.work[0]]
        if given.side not in work.sides:
            parser.error(f"--side: {given.side} is none of {given.work[0]}; allowed: {', '.join(work.sides)}")
        print(
            profiled(work, given.side, given.model)
            if given.profile
            else json.dumps(measure(work, given.side, given.model))
        )
        return
    print(f"{platform.processor() or platform.machine()}, one thread, {given.rounds} rounds\n")
    print("| work | side | CPU time | least - most | of TRL, fp32 | peak GiB |\n|---|---|---|---|---|---|")
    for name in given.work:
        found: dict[str, list[dict[str, float]]] = {
            side: [] for side, (module, _) in WORKS[name].sides.items() if given.trl or module != "theirs"
        }
        for _ in range(given.rounds):
            for side in found:
                python = given.trl if WORKS[name].sides[side][0] == "theirs" else sys.executable
                arguments = ("--model", given.model, "--work", name, "--side", side)
                found[side].append(measured(f"{name}, {side}", "benchmarks.run", *arguments, python=python))
                print(f"{name}, {side}: {found[side][-1]}", file=sys.stderr, flush=True)  # a stop loses no measurement
        print("\n".join(lines(name, found)), flush=True)


if __name__ == "__main__":
    main()
