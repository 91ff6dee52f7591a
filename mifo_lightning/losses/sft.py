"""The SFT loss: cross-entropy on the selected tokens of demonstrations."""

from torch import Tensor


def sft_loss(logp: Tensor, selected: Tensor, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_SFT = -sum(M logp) / denominator` (MIFO, entropy-based token selection).

    Args:
        logp: [B, L] log-probabilities of the demonstration tokens, with gradient.
        selected: [B, L] bool, the tokens the loss sees: M.
        denominator: Tokens of the whole optimizer step over all micro-batches and ranks, so that the sum over them is
            the loss of the undivided batch.

    Returns:
        The scalar loss and `{"loss": ...}` without gradient.
    """
    loss = -(logp * selected).sum() / denominator
    return loss, {"loss": loss.detach()}
