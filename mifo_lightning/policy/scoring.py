"""Scores of whole sequences where no gradient is needed."""

import torch
from torch import Tensor

from mifo_lightning.policy.policy import Policy, Sequences

SCORING_TOKENS = 2**15  # tokens scored at once; bounds memory, does not change results


def score_without_gradient(policy: Policy, sequences: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B, L] in nats of all sequences, in evaluation mode; collective under FSDP2."""
    rows = max(1, SCORING_TOKENS // sequences.tokens.shape[1])
    length = int(sequences.response_lengths.max())
    logp = torch.zeros(len(sequences.tokens), length, device=sequences.tokens.device)
    entropy = torch.zeros_like(logp)
    with policy.sampling():
        for chosen in torch.arange(len(logp), device=logp.device).split(rows):
            part_logp, part_entropy = policy(sequences.select(chosen), temperature)
            logp[chosen, : part_logp.shape[1]] = part_logp
            entropy[chosen, : part_entropy.shape[1]] = part_entropy
    return logp, entropy
