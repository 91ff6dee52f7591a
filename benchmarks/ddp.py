"""How much faster are two processes than one? RL steps of a random model of 11 million weights under DDP, on CPUs.

    python -m benchmarks.ddp    # alone on the machine, with a core for each process

Each process has the same work whatever their number: 4 prompts x 8 responses of 32 tokens a step, drawn, graded by a
coin and trained on, one thread a process. Rounds alternate; a round is a fit of its own, whose first step does not
count; samples per second are those of all processes by the wall clock, so anything else on the machine shows.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.child import measured
from benchmarks.endless import Endless
from benchmarks.plan import GROUP, configuration, written

PROMPTS, STEPS = 4, 6
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}


def measure(path: str) -> float:
    """Wall seconds of a step, the median of all but the first."""
    import lightning
    import torch

    from mifo_lightning.cli.command_line import make_cli

    torch.set_num_threads(1)
    took: list[float] = []

    class Clock(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            took.append(time.perf_counter() - self.began)

    cli: Any = make_cli(["--config", path], run=False)
    cli.trainer.callbacks += [Clock(), Endless()]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return statistics.median(took[1:])


def samples_per_second(path: Path, ranks: int) -> float:
    """Of one fit in processes of its own."""
    seconds = float(measured(f"{ranks} processes", "benchmarks.ddp", "--measure", str(path)))
    return ranks * PROMPTS * GROUP / seconds


def main() -> None:
    """Measure one and two processes in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each number of processes")
    parser.add_argument("--ranks", type=int, default=2, help="processes that are compared with one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        with redirect_stdout(sys.stderr):
            seconds = measure(given.measure)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(json.dumps(seconds))
        return
    found: dict[int, list[float]] = {1: [], given.ranks: []}
    with tempfile.TemporaryDirectory() as root:
        model = written(Path(root) / "model", **SHAPE)
        paths = {}
        for ranks in found:
            (place := Path(root) / str(ranks)).mkdir()
            schedule = {"rl_steps": STEPS, "prompts_per_step": PROMPTS * ranks}
            case = {"trainer": {"devices": ranks}, "data": {"schedule": schedule}}
            paths[ranks] = configuration(model, case, place, "cpu", rows=PROMPTS * ranks * STEPS)
        for _ in range(given.rounds):
            for ranks, path in paths.items():
                found[ranks].append(samples_per_second(path, ranks))
    print("| processes | samples/s | least - most | of one |\n|---|---|---|---|")
    one = statistics.median(found[1])
    for ranks, values in found.items():
        middle = statistics.median(values)
        print(f"| {ranks} | {middle:.1f} | {min(values):.1f} - {max(values):.1f} | {middle / one:.2f} |")


if __name__ == "__main__":
    main()
