"""Choosing the next token, with randomness that depends on keys and not on the batch."""

import torch
from torch import Tensor

from mifo_lightning.rollout.engine import Sampling

BLOCK = 256  # tokens of a vocabulary that are summed before the sums are searched
IN_CACHE = 2**19  # logits that are looked at together on a CPU: 2 MiB stay in a core's cache from pass to pass


def uniforms(keys: Tensor, step: int | Tensor) -> Tensor:
    """One uniform number in [0, 1) per key and step, without a generator's state (SplitMix64 finaliser).

    Args:
        keys: [B] int64.
        step: Position in the response, of all rows or of each ([B] int64).

    Returns:
        [B] fp64.
    """
    moved = (step + 1) * _signed(0x9E3779B97F4A7C15)  # int64 wraps, as intended; a number of Python's does not
    x = keys + (_signed(moved) if isinstance(moved, int) else moved)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def _signed(number: int) -> int:
    """The int64 with the low 64 bits of `number`."""
    return (number + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def next_token(logits: Tensor, u: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `u`.

    Args:
        logits: [B, V], taken to fp32.
        u: [B] fp64 in [0, 1); unused if greedy.
        sampling: Temperature, top_p and top_k.

    Returns:
        [B] int64 tokens and [B] fp32 log-probabilities in nats under the distribution drawn from (for greedy: under
        the untouched distribution).
    """
    at_once = max(1, IN_CACHE // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    if at_once >= len(logits):
        return _next_token(logits, u, sampling)
    parts = [_next_token(*part, sampling) for part in zip(logits.split(at_once), u.split(at_once), strict=True)]
    tokens, logp = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logp)


def _next_token(logits: Tensor, u: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if sampling.temperature == 0:
        logp = logits.log_softmax(-1)
        best = logp.argmax(-1)
        return best, logp.gather(-1, best[:, None])[:, 0]
    log_probs = _restrict(logits / sampling.temperature, sampling).log_softmax(-1)
    token = _invert(log_probs, u)[:, None]
    return token[:, 0], log_probs.gather(-1, token)[:, 0]


def _invert(log_probs: Tensor, u: Tensor) -> Tensor:
    """[B] int64 the tokens at which the cumulative distribution passes `u`; of a large vocabulary first the block."""
    size = log_probs.shape[-1]
    if size <= BLOCK:
        return _passes(log_probs.exp(), u)
    blocks = -(-size // BLOCK)
    probs = log_probs.new_zeros(len(u), blocks * BLOCK)
    torch.exp(log_probs, out=probs[:, :size])
    probs = probs.view(len(u), blocks, BLOCK)
    sums = probs.sum(-1)
    block = _passes(sums, u)[:, None]
    cdf, of_block = sums.cumsum(-1, dtype=torch.float64), sums.gather(-1, block).double()
    # summed in another order, a block may end a rounding error before `u`: the place in it is a share of the block
    share = ((u * cdf[:, -1])[:, None] - cdf.gather(-1, block)) / of_block + 1
    inside = probs[torch.arange(len(u), device=u.device), block[:, 0]]
    found = block[:, 0] * BLOCK + _passes(inside, share[:, 0].clamp(0, 1 - 2.0**-53))
    return found.clamp_max_(size - 1)  # of NaN the last, as where there are no blocks: its step is told of, and skipped


def _passes(weights: Tensor, u: Tensor) -> Tensor:
    """[B] int64 where the cumulative sum of `weights` [B, N] passes the share `u` of the whole."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    # right=True skips what weighs 0: its cdf equals its predecessor's
    found = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)
    return found.clamp_max_(weights.shape[-1] - 1)[:, 0]


def _restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set logits outside top_k and top_p to -inf."""
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0.0  # the most likely token always stays
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits
