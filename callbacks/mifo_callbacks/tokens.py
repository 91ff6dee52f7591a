"""Which response tokens a supervised step learns from: the entropy selection of MIFO (arXiv 2510.04454)."""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from mifo_callbacks.collectives import gather_over, rank_in, sum_over
from mifo_callbacks.thresholds import Order, ceil_share, random_scores, top_mask

Selector = Literal["top", "bottom", "random"]
Scope = Literal["batch", "sequence", "fixed"]
Denominator = Literal["selected", "all"]


class Selection(NamedTuple):
    """The tokens to learn from, and what to divide the sum of their losses by.

    `mask` is bool [B, L], this rank's part. `denominator` counts tokens over all ranks for the whole
    optimizer step; it is at least 1, so that a step without a selected token has a loss of zero.
    """

    mask: Tensor
    denominator: float


def select_tokens(
    entropy: Tensor,
    mask: Tensor,
    *,
    fraction: float = 0.2,
    selector: Selector = "top",
    scope: Scope = "batch",
    threshold: float | None = None,
    denominator: Denominator = "selected",
    forced: Tensor | None = None,
    seed: tuple[int, ...] = (0,),
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """Choose tokens by entropy, add the forced ones, and count the denominator.

    The count of the chosen ones comes from the scope and their order from the selector. "batch": ceil(fraction * n) of
    the n valid tokens of all ranks. "sequence": ceil(fraction * n_i) of the n_i valid tokens of each sequence. "fixed":
    as many as have an entropy of at least `threshold`. Ties are cut by position.

    Args:
        entropy: Entropy in nats, float [B, L]: all sequences of one optimizer step on this rank.
        mask: Valid response tokens, bool [B, L].
        fraction: Share of the valid tokens to choose, in (0, 1].
        selector: "top" chooses the highest entropies, "bottom" the lowest, "random" as many at random.
        scope: One ranking over the "batch", one per "sequence", or a "fixed" threshold in nats.
        threshold: The threshold of scope "fixed", in nats.
        denominator: Count the "selected" tokens, forced ones included, or "all" valid ones.
        forced: Tokens to add to the chosen ones where they are valid, bool [B, L]; they displace nothing.
        seed: Integers that the choice of "random" depends on.
        group: Ranks that hold the other sequences of the step.

    Raises:
        MisconfigurationException: If shapes differ, or an entropy of a valid token is not finite.
    """
    if entropy.shape != mask.shape or entropy.dim() != 2 or mask.dtype != torch.bool:
        raise MisconfigurationException(
            f"entropy {tuple(entropy.shape)}, mask {tuple(mask.shape)} {mask.dtype}; "
            "allowed: the same shape [B, L], mask torch.bool"
        )
    # A sum of p*log(p) can round to just below zero or to -0.0, whose bits would rank above everything.
    values = entropy.detach()[mask].float().clamp(min=0) + 0.0  # [n]
    above = (values >= (threshold or 0.0)).sum()
    counts = gather_over(torch.stack([mask.sum(), above, (~values.isfinite()).sum()]), group).tolist()  # [R, 3]
    total, reaching, broken = (sum(column) for column in zip(*counts, strict=True))
    if broken:
        raise MisconfigurationException(f"entropy is NaN or infinite at {broken} of {total} valid tokens")
    if selector == "random":
        # sequence i of rank r is number i R + r, as samplers deal them: the choice does not depend on R
        numbers = range(rank_in(group), len(counts) * len(mask), len(counts))
        noise = [random_scores((n,), *seed, i) for n, i in zip(mask.sum(1).tolist(), numbers, strict=True)]
        values = torch.cat([values.new_zeros(0, device="cpu"), *noise]).to(entropy.device)
    if scope == "sequence":
        ranked = torch.zeros(mask.shape, device=mask.device)
        ranked[mask] = values
        chosen = _choose_per_sequence(ranked, mask, fraction, highest=selector != "bottom")
    else:
        order: Order = "smallest" if selector == "bottom" else "largest"
        k = reaching if scope == "fixed" else ceil_share(fraction, total)
        chosen = torch.zeros_like(mask)
        chosen[mask] = top_mask([values], k, group, order)[0]
    return with_forced(chosen, mask, forced, denominator, group)


def _choose_per_sequence(scores: Tensor, mask: Tensor, fraction: float, highest: bool) -> Tensor:
    outside = -torch.inf if highest else torch.inf
    order = scores.masked_fill(~mask, outside).argsort(dim=1, descending=highest, stable=True)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank < ceil_share(fraction, mask.sum(1, keepdim=True))


def with_forced(
    chosen: Tensor,
    mask: Tensor,
    forced: Tensor | None,
    denominator: Denominator,
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """Add the valid `forced` tokens to the `chosen` ones and count the denominator over all ranks."""
    selected = chosen if forced is None else chosen | (forced & mask)
    counted = sum_over((selected if denominator == "selected" else mask).sum(), group)
    return Selection(selected, max(float(counted), 1.0))


def selection_metrics(
    entropy: Tensor, mask: Tensor, chosen: Tensor, selected: Tensor, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """What was selected, over all ranks: share, count added by force, mean entropies in nats."""
    values = entropy.detach().double()
    parts = [
        mask.sum(),
        selected.sum(),
        (selected & ~chosen).sum(),
        values[mask].sum(),
        values[selected].sum(),
    ]
    sums = torch.stack([part.double() for part in parts])
    n, n_selected, forced, total, total_selected = sum_over(sums, group).tolist()
    return {
        "share": n_selected / max(n, 1),
        "forced": forced,
        "mean_all": total / max(n, 1),
        "mean_selected": total_selected / max(n_selected, 1),
    }


def threshold_metrics(
    entropy: Tensor, mask: Tensor, chosen: Tensor, selector: Selector, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Entropy in nats of the last token that "top" or "bottom" chose, and how many tokens equal it.

    Empty when no token is chosen.
    """
    sign = 1.0 if selector == "top" else -1.0
    values = entropy.detach().float().clamp(min=0)
    reached = torch.cat([sign * values[chosen], torch.full((1,), torch.inf, device=values.device)])
    last = sign * gather_over(reached.min(), group).min()
    if last.isinf():
        return {}
    ties = sum_over((mask & (values == last)).sum(), group)
    return {"threshold": float(last), "ties": float(ties)}
