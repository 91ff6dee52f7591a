"""The SFT loss: cross-entropy on the selected tokens of demonstrations, each token or sample weighted."""

from torch import Tensor


def sft_loss(logp: Tensor, selected: Tensor, denominator: float, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_SFT = -sum(M w logp) / denominator` (MIFO, entropy-based token selection; w from an `SFTWeight`).

    Args:
        logp: [B, L] log-probabilities of the demonstration tokens, with gradient.
        selected: [B, L] bool, the tokens the loss sees: M; or fp32, what each counts, 0 for none.
        denominator: Tokens of the whole optimizer step over all chunks and ranks, so that the sum over them is
            the loss of the undivided batch.
        weight: [B, L] or [B, 1] weights, without gradient.

    Returns:
        The scalar loss and `{"loss": ...}` without gradient.
    """
    loss = -(logp * selected * weight).sum() / denominator
    return loss, {"loss": loss.detach()}


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 1] mean of [B, L] `values` over each sequence's valid tokens, without gradient."""
    valid = mask.float()
    return (values.detach() * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1.0)
