"""How fast is decoding, and what do the method's parts cost? CPU seconds, one thread; `benchmarks.head` times scoring.

python -m benchmarks.speed            # everything
python -m benchmarks.speed decode     # one part: decode | method
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from mifo_callbacks.thresholds import top_mask
from mifo_lightning.policy.ending import set_ends
from mifo_lightning.policy.loading import load_policy, load_tokenizer
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.in_process import InProcessEngine


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Fewest CPU seconds of several repeats after one to warm up."""
    work()
    took = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


def decode() -> None:
    """Tokens per second of the in-process engine on the embedded model, 256 rows."""
    policy, tokenizer = load_policy("embedded"), load_tokenizer("embedded")
    prompts = [tokenizer.encode(f"{100 + i}+{900 - i}=", add_special_tokens=False) for i in range(32)]
    sampling, engine = Sampling(max_new_tokens=14), InProcessEngine()
    for name in ("ended by themselves", "all 14 tokens long"):
        if name == "all 14 tokens long":
            set_ends(tokenizer, {23})  # a token that never comes
        work = partial(engine.generate, policy, tokenizer, prompts, list(range(32)), 8, sampling)
        tokens = sum(len(c.tokens) for group in work() for c in group)
        print(f"decode, 32 questions x 8, {name}: {tokens} tokens, {tokens / seconds(work):,.0f} tokens/s")


def method() -> None:
    """The exact half of 50 million scores, beside one fused AdamW step on as many weights."""
    n = 50_000_000
    weights = torch.nn.Parameter(torch.randn(n))
    weights.grad = torch.randn(n)
    optimizer = torch.optim.AdamW([weights], fused=True)
    step = seconds(optimizer.step)
    scores = torch.randn(n).square()
    mask = seconds(lambda: top_mask([scores], n // 2), repeats=3)
    print(
        f"{n:,} weights: fused AdamW step {step * 1e3:.0f} ms; exact top half {mask * 1e3:.0f} ms, once per SFT phase"
    )


def main() -> None:
    """Run the named part or all."""
    torch.set_num_threads(1)
    parts = {"decode": decode, "method": method}
    chosen = sys.argv[1:] or list(parts)
    if unknown := set(chosen) - set(parts):
        raise SystemExit(f"{', '.join(unknown)}: unknown; allowed: {', '.join(parts)}")
    for name in chosen:
        parts[name]()


if __name__ == "__main__":
    main()
