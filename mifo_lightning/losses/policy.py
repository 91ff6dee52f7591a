"""The policy loss of reinforcement learning: GRPO with clipping, optional KL to a reference and entropy mask."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """GRPO advantages `(R - mean) / (std + eps)` within each group of rollouts of one question.

    A group whose rewards are all equal gets exactly 0.

    Args:
        rewards: [B] rewards; the rollouts of a question stand next to each other.
        group_size: G, the number of rollouts per question.
        eps: Added to the standard deviation (over G - 1 degrees of freedom).

    Returns:
        [B] fp32 advantages.

    Raises:
        ValueError: If G < 2 or B is not a multiple of G.
    """
    if group_size < 2:
        raise ValueError(f"group advantages need at least 2 rollouts per question, got {group_size}")
    groups = rewards.float().view(-1, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    # the mean of equal numbers can be off by one rounding; that must not become a gradient
    equal = (groups == groups[:, :1]).all(-1, keepdim=True)
    advantages = centred / (groups.std(-1, keepdim=True) + eps)
    return advantages.masked_fill(equal, 0.0).flatten()


def policy_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    sequences: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    keep: Tensor | None = None,
    logp_ref: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO: `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`, token mean per sequence, mean over sequences.

    Summed over all micro-batches and ranks of an optimizer step the loss, its gradient and every metric are those of
    the undivided batch, since `sequences` counts the whole step.

    Args:
        logp: [B, L] log-probabilities of the response tokens, with gradient.
        logp_old: [B, L] the same under the policy that sampled, without gradient.
        advantages: [B] advantage of each sequence.
        mask: [B, L] bool, true up to and including the first end-of-sequence token.
        sequences: Number of sequences of the optimizer step over all micro-batches and ranks.
        clip_low: Lower clip range.
        clip_high: Upper clip range.
        keep: [B, L] bool entropy mask; tokens outside do not push the policy but still count in the denominator.
        logp_ref: [B, L] log-probabilities under the reference, needed if `kl_coefficient` is not 0.
        kl_coefficient: Weight of the KL term, estimator k3: `exp(d) - d - 1`, d = logp_ref - logp.

    Returns:
        The scalar loss, and as scalars `policy_loss`, `kl_old`, `clip_share` and `kl_ref`: means over all `sequences`,
        to which sequences that were left out for want of an advantage add 0.
    """
    valid = mask.float()
    # every token weighs 1 / (its sequence's tokens) / (sequences of the step)
    weight = valid / valid.sum(-1, keepdim=True).clamp_min(1.0) / sequences
    log_ratio = (logp - logp_old) * valid
    ratio = log_ratio.exp()
    advantage = advantages[:, None]
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if keep is not None:
        objective = objective * keep
    loss = -(objective * weight).sum()
    metrics = {
        "policy_loss": loss.detach(),
        "kl_old": ((ratio - 1 - log_ratio) * weight).sum().detach(),
        "clip_share": ((clipped * advantage < ratio * advantage).float() * weight).sum().detach(),
    }
    if kl_coefficient:
        if logp_ref is None:
            raise ValueError("kl_coefficient needs logp_ref")
        kl = (kl_k3(logp, logp_ref) * weight).sum()
        metrics["kl_ref"] = kl.detach()
        loss = loss + kl_coefficient * kl
    return loss, metrics


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) per token: `exp(d) - d - 1`, d = logp_ref - logp."""
    d = logp_ref - logp
    return torch.expm1(d) - d
