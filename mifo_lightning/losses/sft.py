"""The SFT loss: cross-entropy on the selected tokens of demonstrations, each token or sample weighted."""

from typing import Literal

import torch
from torch import Tensor

SFTWeight = Literal["uniform", "dft", "chord", "low_entropy", "high_entropy", "flow"]


def sft_loss(logp: Tensor, selected: Tensor, denominator: float, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_SFT = -sum(M w logp) / denominator` (MIFO, entropy-based token selection; w from `sft_weights`).

    Args:
        logp: [B, L] log-probabilities of the demonstration tokens, with gradient.
        selected: [B, L] bool, the tokens the loss sees: M; or fp32, what each counts, 0 for none.
        denominator: Tokens of the whole optimizer step over all micro-batches and ranks, so that the sum over them is
            the loss of the undivided batch.
        weight: [B, L] or [B, 1] weights, without gradient.

    Returns:
        The scalar loss and `{"loss": ...}` without gradient.
    """
    loss = -(logp * selected * weight).sum() / denominator
    return loss, {"loss": loss.detach()}


def sft_weights(kind: SFTWeight, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None) -> Tensor:
    """What each token's cross-entropy is multiplied by; nothing flows through it.

    Args:
        kind: `uniform`: 1. `dft`: p (arXiv 2508.05629). `chord`: p (1 - p) (arXiv 2508.11408). `low_entropy` and
            `high_entropy`: exp(-H) and exp(+H), H the mean entropy of the sequence (SRFT's paper and SRFT's code).
            `flow`: exp(-l / tau), l the sample's loss before training and tau the median of it (arXiv 2502.02797).
        logp: [B, L] log-probabilities of the demonstration tokens, nats.
        entropy: [B, L] entropies, nats.
        mask: [B, L] bool, all demonstration tokens.
        initial: [B] l / tau of each sample; for `flow`.

    Returns:
        [B, L] or [B, 1] fp32 weights without gradient.
    """
    p = logp.detach().exp()
    if kind == "dft":
        return p
    if kind == "chord":
        return p * (1 - p)
    if kind in ("low_entropy", "high_entropy"):
        mean = mean_over(entropy, mask)
        return (-mean if kind == "low_entropy" else mean).exp()
    if kind == "flow":
        assert initial is not None, "flow needs the losses before training"
        return (-initial).exp()[:, None]
    return torch.ones_like(p[:, :1])


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 1] mean of [B, L] `values` over each sequence's valid tokens, without gradient."""
    valid = mask.float()
    return (values.detach() * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1.0)
