"""What do log-probability and entropy cost, beside the products of matrices alone? CPU seconds and memory, one thread.

    python -m benchmarks.head                         # Qwen2.5-0.5B's head: V = 151,936, hidden 896, [4, 512] tokens
    python -m benchmarks.head --vocabulary 49152 --hidden 576 --tokens 1024

Naive makes all logits at once. The limit is the products alone: logits forward; backward logits again, and the
gradients of hidden states and of the weight. Each measurement is a process of its own, since peak memory never falls;
rounds alternate between the sides. Growth leaves out the weight's gradient, which every side has to return.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.child import measured
from mifo_lightning.policy import token_scores

PART = 8192  # vocabulary entries of a product in the limit
Work = Callable[[], Any]


def limit(head: torch.nn.Linear, hidden: Tensor) -> tuple[Work, Callable[[Any], None]]:
    """The products alone, forward and backward."""
    states, parts = hidden.detach(), head.weight.detach().split(PART)

    def forward() -> None:
        for weight in parts:
            torch.mm(states, weight.t())

    def backward(_: object) -> None:
        head.weight.grad = torch.empty_like(head.weight)
        of_states = torch.zeros_like(states)
        for weight, of_weight in zip(parts, head.weight.grad.split(PART), strict=True):
            logits = torch.mm(states, weight.t())
            of_states.addmm_(logits, weight)
            torch.mm(logits.t(), states, out=of_weight)

    return forward, backward


def scores(head: torch.nn.Linear, hidden: Tensor, targets: Tensor, bf16: bool) -> tuple[Work, Callable[[Any], None]]:
    """Log-probability with gradient and entropy without, as SFT and most of RL want them."""

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return token_scores.token_scores(head, hidden, targets)[0]

    return forward, lambda logp: logp.backward(torch.linspace(-1, 1, len(logp)))


def measure(side: str, vocabulary: int, width: int, tokens: int) -> dict[str, float]:
    """One side in this process: CPU seconds forward and backward, and growth of the peak in GiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    hidden, targets = torch.randn(tokens, width, requires_grad=True), torch.randint(vocabulary, (tokens,))
    if side.startswith("naive"):
        token_scores.RUNNING_FROM = token_scores.CHUNK_ELEMENTS = 2**60
    bf16 = side.endswith("bf16")
    forward, backward = limit(head, hidden) if side == "limit" else scores(head, hidden, targets, bf16)
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))  # the library's own memory is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [time.process_time()]
    result = forward()
    times.append(time.process_time())
    backward(result)
    times.append(time.process_time())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20 - head.weight.nbytes / 2**30
    return {"forward": times[1] - times[0], "backward": times[2] - times[1], "grown": grown}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians over rounds, and what they are of the limit's and of naive memory."""
    middle = {
        side: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for side, rounds in found.items()
    }
    lines = [
        "| scores | forward s | of the limit | backward s | of the limit | growth GiB | of naive |",
        "|---" * 7 + "|",
    ]
    for side, row in middle.items():
        cells = [side]
        for key in ("forward", "backward"):
            cells += [f"{row[key]:.2f}", f"{row[key] / middle['limit'][key]:.2f}"]
        cells += [f"{row['grown']:.2f}", f"{row['grown'] / middle['naive']['grown']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every side in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.side, given.vocabulary, given.hidden, given.tokens)))
        return
    found: dict[str, list[dict[str, float]]] = {s: [] for s in ("limit", "naive", "ours", "naive, bf16", "ours, bf16")}
    shape = [f"--{name}={getattr(given, name)}" for name in ("vocabulary", "hidden", "tokens")]
    for _ in range(given.rounds):
        for side, rounds in found.items():
            rounds.append(measured(side, "benchmarks.head", *shape, "--side", side))
    print(f"{platform.processor() or platform.machine()}, one thread, {given.rounds} rounds\n\n{table(found)}")


if __name__ == "__main__":
    main()
