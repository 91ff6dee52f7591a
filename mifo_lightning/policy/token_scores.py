"""Log-probability and entropy of given tokens, without ever holding a second [tokens, vocabulary] tensor."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mifo_lightning.losses.distillation import reverse_kl
from mifo_lightning.policy.head import LogitTransform
from mifo_lightning.policy.running_scores import RunningScores, Settings

RUNNING_FROM = 2**22  # logits, 16 MiB in fp32: fewer are faster made once and kept for the backward pass
CHUNK_ELEMENTS = 2**25  # 128 MiB: as many are made at once where the head is no linear layer


def token_scores(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    transform: LogitTransform = LogitTransform(),
    top_k: int = 0,
    teacher: Tensor | None = None,
    teacher_head: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Score each target token under softmax(transform(head(hidden)) / temperature).

    Where there are many logits they never exist at once: from `RUNNING_FROM` on a linear head's are made in tiles, from
    `CHUNK_ELEMENTS` on any other's in chunks of tokens, both made again in the backward pass. Under autocast the head
    computes in its dtype, whatever the cache of casts around it holds.

    Args:
        head: Maps hidden states [n, D] to outputs [n, V].
        hidden: [N, D] hidden states, one per scored token.
        targets: [N] int64 token ids.
        temperature: The sampling temperature; 1 in SFT.
        entropy_gradient: Whether the entropy needs a gradient: a bonus does, a selection does not.
        transform: What makes logits of the head's outputs.
        top_k: How many of each position's largest log-probabilities are wanted beside the target's.
        teacher: [N, D] hidden states of a teacher, whose KL is wanted; None wants none.
        teacher_head: Maps them to outputs; None is `head`.

    Returns:
        `logp` [N] fp32 log-probabilities in nats, with gradient, and `entropy` [N] fp32 in nats; where `top_k` is
        above 0 also `top` [N, min(top_k, V)] fp32 in nats, the largest first, without gradient; with a `teacher` as
        the fourth (`top` is [N, 0] if it is not wanted) `kl` [N] fp32, KL(student || teacher) in nats over the whole
        vocabulary, with gradient by the student alone.
    """
    if transform.input_scale != 1.0:
        hidden = hidden * transform.input_scale
        teacher = None if teacher is None else teacher * transform.input_scale
    if teacher is None and _is_linear(head) and len(hidden) * len(head.weight) >= RUNNING_FROM:
        settings = Settings(_dtype(head.weight), temperature, transform, entropy_gradient, top_k)
        apply: Any = RunningScores.apply
        return tuple(scores.float() for scores in apply(hidden, head.weight, head.bias, targets, settings))
    with _without_cache(hidden.device.type):
        n = max(1, CHUNK_ELEMENTS // vocabulary_size(head, hidden))
    rest = temperature, entropy_gradient, transform, top_k, teacher_head or head
    if len(hidden) <= n:
        return _score(head, hidden, targets, *rest, teacher)
    others = repeat(None) if teacher is None else teacher.split(n)
    parts = [
        checkpoint(_score, head, h, t, *rest, other, use_reentrant=False)
        for h, t, other in zip(hidden.split(n), targets.split(n), others, strict=False)
    ]
    return tuple(torch.cat(scores) for scores in zip(*parts, strict=True))


def vocabulary_size(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """Number of logits per token: the head's weight says so; a bare function is asked with one row."""
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if weight is not None else int(head(hidden[:1]).shape[-1])


def _is_linear(head: Callable[[Tensor], Tensor]) -> TypeGuard[nn.Linear]:
    """Whether nothing else than its weight and bias makes the head's outputs."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    return not (head._forward_hooks or head._forward_pre_hooks)


def _dtype(weight: Tensor) -> torch.dtype:
    """What the head computes in."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _score(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    entropy_gradient: bool,
    transform: LogitTransform,
    top_k: int,
    teacher_head: Callable[[Tensor], Tensor],
    teacher: Tensor | None,
) -> tuple[Tensor, ...]:
    with _without_cache(hidden.device.type):  # here, not in the caller: chunks are made again in the backward pass
        logits = transform(head(hidden).float())
        with torch.no_grad():
            shown = None if teacher is None else transform(teacher_head(teacher).float())
    if temperature != 1.0:
        logits = logits / temperature
        shown = None if shown is None else shown / temperature
    log_z = logits.logsumexp(-1)
    logp = logits.gather(-1, targets[:, None])[:, 0] - log_z
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        # H = log Z - E[logit]; rounding can push a deterministic token just below zero
        probs = torch.exp(logits - log_z[:, None])
        entropy = (log_z - (probs * logits).sum(-1)).clamp_min(0.0)
    if not top_k and shown is None:
        return logp, entropy
    with torch.no_grad():
        top = logits.topk(min(top_k, logits.shape[-1])).values - log_z[:, None]
    return (logp, entropy, top) if shown is None else (logp, entropy, top, reverse_kl(logits, shown))


def _without_cache(device: str) -> AbstractContextManager[object]:
    """The autocast that is active, if one is, without its cache of casts.

    The cache would keep a cast of the head's weight alive from chunk to chunk, and one made without a graph, in older
    torch, would take the weight's gradient away.
    """
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
