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

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mifo_lightning.losses.surrogates import Surrogate

Ratio = Literal["token", "sequence"]
Aggregation = Literal["sequence", "token", "constant", "sum"]

LOG_RATIO_LIMIT = 20.0  # |log r|: exp overflows at 88, and then min(r A, clip(r) A) is finite but its gradient NaN


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
    surrogate: Surrogate,
    ratio: Ratio = "token",
    keep: Tensor | None = None,
    demonstrated: Tensor | None = None,
    lent: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`-sum(weight * objective)`, the objective of each token that of a `Surrogate` of r = exp(logp - logp_old).

    With `ratio` "sequence" r is `exp(mean over the sequence of logp - logp_old)` (GSPO). Log-ratios are cut off at
    +-20. Demonstrated tokens have no sampling policy: their objective is one of A and their probability p (LUFFY).

    Args:
        logp: [B, L] log-probabilities of the response tokens in nats, with gradient.
        logp_old: [B, L] the same under the policy that sampled, without gradient.
        advantages: [B] advantage of each sequence, or [B, L] of each token.
        weight: [B, L] from `token_weights`; 0 outside the responses.
        surrogate: The objective of the policy's own tokens.
        ratio: One ratio per token, or one per sequence.
        keep: [B, L] bool entropy mask; tokens outside do not push the policy but still count in the denominator. A
            sequence's ratio then has the gradient of each token for itself (GSPO-token).
        demonstrated: [B, L] bool, tokens of demonstrations.
        lent: Their objective [B, L] by A [B, 1] and p [B, L]; needed with `demonstrated`.

    Returns:
        The scalar loss, and as scalars `policy_loss`, `kl_old` and `clip_share` (of the policy's own tokens): means or
        sums in the sense of the aggregation, to which sequences that were left out for want of an advantage add 0.
    """
    valid = (weight > 0).float()
    log_ratio = (logp - logp_old) * valid
    if demonstrated is not None:
        log_ratio = log_ratio.masked_fill(demonstrated, 0.0)
    if ratio == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1.0)
        if keep is not None:
            # the same value, but a token that is left out gets no gradient by way of the others' ratio
            log_ratio = log_ratio.detach() + logp - logp.detach()
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    r = log_ratio.exp()
    advantage = advantages if advantages.dim() == 2 else advantages[:, None]
    objective, limited = surrogate(logp, r, advantage)
    if demonstrated is not None and lent is not None:
        objective = torch.where(demonstrated, lent(advantage, logp.exp()), objective)
    if keep is not None:
        objective = objective * keep
    loss = -(objective * weight).sum()
    metrics = {
        "policy_loss": loss.detach(),
        "kl_old": ((r - 1 - log_ratio) * weight).sum().detach(),
        "clip_share": (limited * weight).sum().detach(),
    }
    return loss, metrics
