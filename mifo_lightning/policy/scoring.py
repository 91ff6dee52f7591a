"""Scores of whole sequences where no gradient is needed, and how far two policies are apart by them."""

import torch
from torch import Tensor

from mifo_lightning.policy.policy import Policy, Sequences

SCORING_TOKENS = 2**15  # tokens scored at once; bounds memory, does not change results
K3_LIMIT = 10.0  # d of the k3 estimator


def score_without_gradient(
    policy: Policy, sequences: Sequences, temperature: float, grouped: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B, L] in nats of all sequences, in evaluation mode; collective under FSDP2.

    Arguments as of `Policy.forward`.
    """
    rows = max(1, SCORING_TOKENS // sequences.tokens.shape[1])
    length = int(sequences.response_lengths.max())
    logp = torch.zeros(len(sequences.tokens), length, device=sequences.tokens.device)
    entropy = torch.zeros_like(logp)
    with policy.sampling():
        for chosen in torch.arange(len(logp), device=logp.device).split(rows):
            part_logp, part_entropy = policy(sequences.select(chosen), temperature, grouped=grouped)
            logp[chosen, : part_logp.shape[1]] = part_logp
            entropy[chosen, : part_entropy.shape[1]] = part_entropy
    return logp, entropy


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Non-negative estimate of KL(policy || reference) per token: `exp(d) - d - 1`, d = logp_ref - logp, at most 10.

    Unbiased but for the cut. Only the exponential needs it: below 0 the estimate is linear, and exact however far.
    """
    d = (logp_ref - logp).clamp_max(K3_LIMIT)
    return torch.expm1(d) - d
