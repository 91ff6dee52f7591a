"""Scores of whole sequences where no gradient is needed, and how far two policies are apart by them."""

import torch
from torch import Tensor

from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.token_scores import vocabulary_size

SCORING_TOKENS = 2**15  # tokens scored at once; bounds memory, does not change results
KL_ELEMENTS = 2**22  # logits of each model that exist at once in `exact_kl`, 16 MiB; bounds memory alone
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


@torch.no_grad()
def exact_kl(p: Policy, q: Policy, sequences: Sequences, regrouped: bool = False) -> Tensor:
    """KL(p || q) over the whole vocabulary where each response token stands, [B, L] fp32 nats; collective under FSDP2.

    At temperature 1, 0 outside the responses, and never below 0. At most `KL_ELEMENTS` logits of each model exist at
    once, or those of one token.

    Args:
        p: Whose mean it is.
        q: Of the same vocabulary; may be `p`.
        sequences: B prompts with responses, at least one.
        regrouped: Whether `q` runs half as many rows at once as `p`: of equal weights that gives what rounding makes.

    Raises:
        InputError: The vocabularies differ in size.
    """
    alone = not (p.split_head and q.split_head)  # such a model makes the logits of every token at once
    rows = 1 if alone else max(1, SCORING_TOKENS // sequences.tokens.shape[1])
    mask = sequences.mask()
    kl = torch.zeros(mask.shape, device=mask.device)
    with p.sampling(), q.sampling():
        for chosen in torch.arange(len(kl), device=kl.device).split(rows):
            groups = chosen.split(max(1, (len(chosen) + 1) // 2)) if regrouped else [chosen]
            of_p = p.states(sequences.select(chosen))
            of_q = torch.cat([q.states(sequences.select(group)) for group in groups])
            sizes = [vocabulary_size(model.head, states) for model, states in ((p, of_p), (q, of_q))]
            if sizes[0] != sizes[1]:
                raise InputError(f"KL: one model has {sizes[0]} logits a token, the other {sizes[1]}")
            n = max(1, KL_ELEMENTS // sizes[0])
            parts = [_kl(p.logits(a), q.logits(b)) for a, b in zip(of_p.split(n), of_q.split(n), strict=True)]
            kl[chosen] = kl[chosen].masked_scatter(mask[chosen], torch.cat(parts))
    return kl


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of softmaxes of [n, V] logits, [n], as the sum of p (e^d - 1 - d) with d = log q - log p.

    No term is below 0, so that little cancels where the two are nearly equal.
    """
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    p, d = log_p.exp(), log_q - log_p
    # where e^d could overflow as it stands, and where p is 0 and so d may be no number
    far = torch.where(p == 0, log_q.exp(), log_q.exp() - p - p * d)
    return torch.where((p > 0) & (d < 1), p * (torch.expm1(d) - d), far).sum(-1)
