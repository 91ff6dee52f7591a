"""What does a GPU make of it? Decoding, a GRPO step beside TRL's, and ten steps of MIFO: speed, MFU and peak memory.

    python -m benchmarks.gpu                                         # three shapes, random weights, bf16-mixed
    python -m benchmarks.gpu --shape smollm2 --trl trl-env/bin/python
    python -m benchmarks.gpu --device cpu --shape tiny               # in a small size: that all of it runs

Nothing is downloaded: weights are drawn on the device, the tokenizer's tokens are words. Every response is of full
length, and every group has both rewards, so that all train. Each measurement is a process of its own; seconds are by
the clock, with the device waited for; of three steps the first does not count.

MFU is (operations of the model in an update / its seconds) / (operations a second of one product of square matrices in
the update's dtype, measured in the same process). An update is forward, backward, clipping and AdamW. Of the model are
6 operations for each weight and each token that it is multiplied with - the prompt once a group where the run does so,
the head at responses only - and 12 x layers x heads x width for each pair of a token and one that its mask is as wide
as. What a run computes twice (logits in the backward pass) counts once.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from typing import Any

import torch

from benchmarks.child import measured
from benchmarks.gpu_work import decode, train, trl
from benchmarks.shapes import SHAPES
from benchmarks.sizes import Size

LONG = ("qwen2.5-1.5b", "tiny")  # of which ten steps are made
TARGET = 0.45
SIZES = {
    "cuda": Size(prompts=16, tokens=128, group=8, length=512, chunk=8192),
    "cpu": Size(prompts=2, tokens=16, group=4, length=8, chunk=64),
}
ROWS = {"cuda": (64, 256, 1024), "cpu": (4, 8)}  # decoded at once


def measure(shape: str, device: str, what: str) -> dict[str, Any]:
    """One row of the table, in this process."""
    size, (kind, _, rows) = SIZES[device], what.partition(" ")
    if kind == "decode":
        return decode(shape, device, size, int(rows))
    return trl(shape, device, size) if kind == "trl" else train(shape, device, size, kind == "mifo")


def row(shape: str, title: str, found: dict[str, Any]) -> str:
    """A row of the table; what was not measured is left out."""
    forms = {"seconds": "{:.3g}", "rate": "{:,.0f}", "mfu": "{:.1%}", "used": "{:.1f}", "held": "{:.1f}", "note": "{}"}
    cells = [form.format(found[key]) if key in found else "-" for key, form in forms.items()]
    return f"| {shape}, {title} | {' | '.join(cells)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="by default all but tiny")
    parser.add_argument("--device", default="cuda", choices=list(SIZES))
    parser.add_argument("--trl", help="the Python of an environment with TRL; without it this framework alone")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda is not here; cpu runs all of it in a small size")
    size = SIZES[given.device]
    if given.measure:
        with redirect_stdout(sys.stderr):
            found = measure(given.shape[0], given.device, given.measure)
        print(json.dumps(found))
        return
    work = {f"decoding {n} rows": f"decode {n}" for n in ROWS[given.device]} | {"GRPO step": "grpo"}
    work |= {"GRPO step of TRL": "trl"} if given.trl else {}
    print(f"{torch.cuda.get_device_name() if given.device == 'cuda' else 'a CPU'}, torch {torch.__version__}; {size}\n")
    print(
        f"| | seconds | tokens/s | MFU (target {TARGET:.0%}) | peak GiB | held GiB | |\n|---|---|---|---|---|---|---|"
    )
    for shape in given.shape or [shape for shape in SHAPES if shape != "tiny"]:
        of_shape = work | ({"ten steps of MIFO": "mifo"} if shape in LONG else {})
        for title, what in of_shape.items():
            python = given.trl if what == "trl" else sys.executable
            arguments = ("--shape", shape, "--device", given.device, "--measure", what)
            found = measured(f"{shape}, {title}", "benchmarks.gpu", *arguments, python=python)
            print(row(shape, title, found), flush=True)


if __name__ == "__main__":
    main()
