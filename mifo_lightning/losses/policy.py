"""The policy-loss family of reinforcement learning: one loss made of a surrogate, a ratio and an aggregation.

| | surrogate | ratio | aggregation | advantage |
|---|---|---|---|---|
| GRPO | clipped | token | sequence | group_std |
| Dr.GRPO | clipped | token | constant | group_mean |
| DAPO | clipped, 0.2 / 0.28 | token | token | group_std, with dynamic sampling |
| GSPO | clipped, 3e-4 / 4e-4 | sequence | sequence | group_std |
| CISPO | truncated | token | token | group_std |
| RLOO | reinforce | | constant | leave_one_out |
| ReLIFT, LUFFY, HPT | unclipped | token | sum | group_mean |
"""

from typing import Literal

import torch
from torch import Tensor

Surrogate = Literal["clipped", "unclipped", "truncated", "reinforce"]
Ratio = Literal["token", "sequence"]
Aggregation = Literal["sequence", "token", "constant", "sum"]

LOG_RATIO_LIMIT = 20.0  # |log r|: exp overflows at 88, and then min(r A, clip(r) A) is finite but its gradient NaN
K3_LIMIT = 10.0  # d of the k3 estimator


def token_weights(
    mask: Tensor,
    aggregation: Aggregation,
    *,
    sequences: float,
    tokens: float,
    max_length: int,
    sum_sequences: float = 64.0,
) -> Tensor:
    """How much each token counts in the loss of an optimizer step; summing weighted tokens aggregates them.

    The counts are those of the whole step, so losses and gradients summed over micro-batches and ranks are those of the
    undivided batch.

    Args:
        mask: [B, L] bool response mask.
        aggregation: Mean over `sequence`s of their token means (GRPO), mean over all `token`s (DAPO), the sum over
            a `constant`, sequences times the longest possible response (Dr.GRPO), or the `sum` over `sum_sequences`
            sequences by the longest possible response (ReLIFT), on average over the step.
        sequences: Sequences of the optimizer step over all micro-batches and ranks.
        tokens: Response tokens of the same.
        max_length: Longest response that sampling allows, in tokens.
        sum_sequences: How many sequences `sum` adds up, whatever the step has.

    Returns:
        [B, L] fp32 weights, 0 outside the mask.
    """
    valid = mask.float()
    if aggregation == "sequence":
        return valid / valid.sum(-1, keepdim=True).clamp_min(1.0) / sequences
    if aggregation == "token":
        return valid / tokens
    return valid / (sequences * max_length / (sum_sequences if aggregation == "sum" else 1.0))


def policy_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    weight: Tensor,
    *,
    surrogate: Surrogate = "clipped",
    ratio: Ratio = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float = 5.0,
    keep: Tensor | None = None,
    demonstrated: Tensor | None = None,
    shape: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`-sum(weight * objective)`, r = exp(logp - logp_old), with one of these objectives per token.

    `clipped`: `min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`. `unclipped`: `r A`. `truncated`:
    `sg[min(r, ratio_cap)] A logp` (CISPO). `reinforce`: `A logp`. With `ratio` "sequence" r is
    `exp(mean over the sequence of logp - logp_old)` (GSPO). Log-ratios are cut off at +-20. Tokens of demonstrations
    have no sampling policy: theirs is `A f(p)`, f(x) = x / (x + shape), p the probability of the token (LUFFY).

    Args:
        logp: [B, L] log-probabilities of the response tokens, with gradient.
        logp_old: [B, L] the same under the policy that sampled, without gradient.
        advantages: [B] advantage of each sequence.
        weight: [B, L] from `token_weights`; 0 outside the responses.
        surrogate: The objective.
        ratio: One ratio per token, or one per sequence.
        clip_low: Lower clip range.
        clip_high: Upper clip range.
        ratio_cap: Largest ratio of `truncated`.
        keep: [B, L] bool entropy mask; tokens outside do not push the policy but still count in the denominator. A
            sequence's ratio then has the gradient of each token for itself (GSPO-token).
        demonstrated: [B] bool, sequences that are demonstrations.
        shape: The constant in f.

    Returns:
        The scalar loss, and as scalars `policy_loss`, `kl_old` and `clip_share` (of the policy's own tokens): means or
        sums in the sense of the aggregation, to which sequences that were left out for want of an advantage add 0.
    """
    valid = (weight > 0).float()
    log_ratio = (logp - logp_old) * valid
    if demonstrated is not None:
        log_ratio = log_ratio.masked_fill(demonstrated[:, None], 0.0)
    if ratio == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1.0)
        if keep is not None:
            # the same value, but a token that is left out gets no gradient by way of the others' ratio
            log_ratio = log_ratio.detach() + logp - logp.detach()
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    r = log_ratio.exp()
    advantage = advantages[:, None]
    clipped = r.clamp(1.0 - clip_low, 1.0 + clip_high)
    limited = (clipped * advantage < r * advantage).float()
    if surrogate == "clipped":
        objective = torch.minimum(r * advantage, clipped * advantage)
    elif surrogate == "unclipped":
        objective, limited = r * advantage, torch.zeros_like(limited)
    elif surrogate == "truncated":
        objective = r.detach().clamp_max(ratio_cap) * advantage * logp
        limited = (r > ratio_cap).float()
    else:
        objective, limited = advantage * logp, torch.zeros_like(limited)
    if demonstrated is not None:
        p = logp.exp()
        objective = torch.where(demonstrated[:, None], advantage * p / (p + shape), objective)
    if keep is not None:
        objective = objective * keep
    loss = -(objective * weight).sum()
    metrics = {
        "policy_loss": loss.detach(),
        "kl_old": ((r - 1 - log_ratio) * weight).sum().detach(),
        "clip_share": (limited * weight).sum().detach(),
    }
    return loss, metrics


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Non-negative estimate of KL(policy || reference) per token: `exp(d) - d - 1`, d = logp_ref - logp, at most 10.

    Unbiased but for the cut. Only the exponential needs it: below 0 the estimate is linear, and exact however far.
    """
    d = (logp_ref - logp).clamp_max(K3_LIMIT)
    return torch.expm1(d) - d
