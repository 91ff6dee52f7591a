"""Scores of whole sequences where no gradient is needed, and how far two policies are apart by them."""

import torch
from torch import Tensor

from mifo_lightning.policy.policy import Policy, Sequences

SCORING_TOKENS = 2**15  # tokens scored at once; bounds memory, does not change results
K3_LIMIT = 10.0  # d of the k3 estimator


def score_without_gradient(
    policy: Policy, sequences: Sequences, temperature: float, grouped: bool = False, top_k: int = 0
) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies [B, L] in nats of all sequences, in evaluation mode; collective under FSDP2.

    Arguments and what is returned as of `Policy.forward`.
    """
    rows = max(1, SCORING_TOKENS // sequences.tokens.shape[1])
    length = int(sequences.response_lengths.max())
    count, device = len(sequences.tokens), sequences.tokens.device
    scores: list[Tensor] = []
    with policy.sampling():
        for chosen in torch.arange(count, device=device).split(rows):
            parts = policy(sequences.select(chosen), temperature, grouped=grouped, top_k=top_k)
            scores = scores or [torch.zeros(count, length, *part.shape[2:], device=device) for part in parts]
            for whole, part in zip(scores, parts, strict=True):
                whole[chosen, : part.shape[1]] = part
    return tuple(scores)


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Non-negative estimate of KL(policy || reference) per token: `exp(d) - d - 1`, d = logp_ref - logp, at most 10.

    Unbiased but for the cut. Only the exponential needs it: below 0 the estimate is linear, and exact however far.
    """
    d = (logp_ref - logp).clamp_max(K3_LIMIT)
    return torch.expm1(d) - d
