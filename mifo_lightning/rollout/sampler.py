"""Choosing the next token, with randomness that depends on keys and not on the batch."""

import torch
from torch import Tensor

from mifo_lightning.rollout.engine import Sampling


def uniforms(keys: Tensor, step: int) -> Tensor:
    """One uniform number in [0, 1) per key and step, without a generator's state (SplitMix64 finaliser).

    Args:
        keys: [B] int64.
        step: Position in the response.

    Returns:
        [B] fp64.
    """
    x = keys + _signed((step + 1) * 0x9E3779B97F4A7C15)  # int64 arithmetic wraps around, as intended
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
        logits: [B, V] fp32.
        u: [B] fp64 in [0, 1); unused if greedy.
        sampling: Temperature, top_p and top_k.

    Returns:
        [B] int64 tokens and [B] fp32 log-probabilities in nats under the distribution drawn from (for greedy: under
        the untouched distribution).
    """
    if sampling.temperature == 0:
        logp = logits.log_softmax(-1)
        best = logp.argmax(-1)
        return best, logp.gather(-1, best[:, None])[:, 0]
    logits = _restrict(logits / sampling.temperature, sampling)
    log_probs = logits.log_softmax(-1)
    cdf = log_probs.exp().cumsum(-1, dtype=torch.float64)
    # right=True skips tokens of probability 0: their cdf equals their predecessor's
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).clamp_max_(logits.shape[-1] - 1)
    return token[:, 0], log_probs.gather(-1, token)[:, 0]


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
