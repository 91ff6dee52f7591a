"""How fast is decoding beside transformers' `generate`, and which responses depend on what else is decoded?

    python -m benchmarks.decoding --model DIR      # DIR: a Hugging Face directory

16 prompts of 75 tokens x 8 responses of exactly 32 at temperature 1. Each side is a process of its own, one CPU
thread; rounds alternate between the sides; seconds are CPU seconds of prefill and decoding together. Then the share of
responses that are others when 16 rows are decoded at once in place of all: 0 in fp32, where it is promised.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.profiler import profile

from benchmarks.child import measured
from benchmarks.endless import NEVER
from benchmarks.sizes import TOKENS, prompts
from mifo_lightning.policy.ending import set_ends
from mifo_lightning.policy.loading import load_policy, load_tokenizer
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.in_process import InProcessEngine

PROMPTS, GROUP, LENGTH, FEW = 16, 8, 32, 16
SIDES = {
    f"{side}, {precision}": (side, precision) for precision in ("fp32", "bf16") for side in ("transformers", "ours")
}


def drawing(model: str, side: str, precision: str) -> Callable[[int], list[list[int]]]:
    """A call that draws all responses, decoding at most so many rows at once, and returns their tokens."""
    policy, tokenizer = load_policy(model), load_tokenizer(model)
    set_ends(tokenizer, NEVER)  # every response is of full length
    texts = prompts(tokenizer, PROMPTS, TOKENS)
    asked = torch.tensor([tokenizer.encode(text, add_special_tokens=False) for text in texts])
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    if precision == "bf16":
        policy.numerics = lambda: torch.autocast("cpu", torch.bfloat16)

    def ours(rows: int) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=LENGTH)
        keys = list(range(PROMPTS))
        drawn = InProcessEngine(rows).generate(policy, tokenizer, asked.tolist(), keys, GROUP, sampling)
        return [c.tokens for group in drawn for c in group]

    def theirs(rows: int) -> list[list[int]]:
        ids = asked.repeat_interleave(GROUP, 0)
        with torch.no_grad(), autocast:
            found = policy.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=LENGTH,
                min_new_tokens=LENGTH,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=0,
            )
        tokens: list[list[int]] = found[:, TOKENS:].tolist()
        return tokens

    return ours if side == "ours" else theirs


def measure(model: str, side: str) -> dict[str, float]:
    """One side in this process: tokens per CPU second, peak memory in GiB, and the share of responses that differ."""
    torch.set_num_threads(1)
    draw = drawing(model, *SIDES[side])
    start = time.process_time()
    whole = draw(PROMPTS * GROUP)
    rate = sum(map(len, whole)) / (time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parts = draw(FEW) if SIDES[side][0] == "ours" else whole
    return {"rate": rate, "peak": peak, "differ": sum(a != b for a, b in zip(whole, parts, strict=True)) / len(whole)}


def main() -> None:
    """Measure every side in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--side", choices=list(SIDES), help="one side, in this process")
    parser.add_argument("--profile", action="store_true", help="of that side: where the time goes, by operation")
    given = parser.parse_args()
    if given.side and given.profile:
        draw = drawing(given.model, *SIDES[given.side])
        with profile() as seen:
            draw(PROMPTS * GROUP)
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
    elif given.side:
        print(json.dumps(measure(given.model, given.side)))
    else:
        compare(given.model, given.rounds)


def compare(model: str, rounds: int) -> None:
    """Every side so many times, each time in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(measured(side, "benchmarks.decoding", "--model", model, "--side", side))
    head = [
        "decoding",
        "tokens per CPU second",
        "least - most",
        "of transformers, same precision",
        "peak GiB",
        "differ",
    ]
    print(f"| {' | '.join(head)} |")
    print("|---|---|---|---|---|---|")
    for side, rows in found.items():
        rates, base = (sorted(r["rate"] for r in found[s]) for s in (side, f"transformers, {SIDES[side][1]}"))
        middle, share = statistics.median(rates), statistics.median(rates) / statistics.median(base)
        differ = f"{rows[0]['differ']:.3f}" if SIDES[side][0] == "ours" else "-"
        peak = max(r["peak"] for r in rows)
        print(f"| {side} | {middle:.0f} | {rates[0]:.0f} - {rates[-1]:.0f} | {share:.2f} | {peak:.1f} | {differ} |")


if __name__ == "__main__":
    main()
