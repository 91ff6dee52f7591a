"""CumulativeFreezing: what one phase froze stays frozen in every later phase of its kind."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mifo_callbacks.collectives import sum_over
from mifo_callbacks.contracts import PhaseOf
from mifo_callbacks.freezing_rules import FreezingRule, Frozen, RuleName, Scope, frozen_blocks
from mifo_callbacks.gradient_freezing import GradientFreezing
from mifo_callbacks.sharding import local, shard_group
from mifo_callbacks.thresholds import floor_share, top_mask


class CumulativeFreezing(GradientFreezing):
    """Freeze in each phase what its rule chooses and all that earlier phases froze, up to a cap.

    A growing mask in the spirit of CPO (arXiv 2607.04364); the rule, the cap and that nothing is released are ours.
    What was frozen stays so; what the rule adds comes in its order, until the share `cap` is reached. All is free in
    other phases, as with `GradientFreezing`. The mask is in the checkpoint, and in memory a byte a weight.

    Args:
        fraction: Share of the coordinates that each phase asks for, in (0, 1].
        cap: Share of the coordinates that are frozen at most, from `fraction` to 1.
        selector: A rule by name or of your own, as in `GradientFreezing`, that ranks the largest first.
        scope: Rank and cap within each "tensor", or over all together ("global").
        seed: Seed of rules that draw; None follows `seed_everything`.
        during: Label of the phase in which coordinates are frozen.
        phase: Batch key that holds the phase label, or callable(trainer, pl_module, batch) -> label.

    Raises:
        MisconfigurationException: If an argument is outside what is allowed; else as `GradientFreezing`.
    """

    def __init__(
        self,
        fraction: float = 0.2,
        cap: float = 0.5,
        selector: RuleName | FreezingRule = "rl_topk",
        scope: Scope = "tensor",
        seed: int | None = None,
        during: str = "sft",
        phase: str | PhaseOf = "phase",
    ) -> None:
        super().__init__(fraction, selector, scope, seed, during, phase)
        if not fraction <= cap <= 1:
            raise MisconfigurationException(
                f"CumulativeFreezing.cap is {cap}; allowed: at least fraction, {fraction}, and at most 1"
            )
        if self.rule is not None and (self.rule.order != "largest" or self.rule.needs_gradient):
            raise MisconfigurationException(
                f"CumulativeFreezing.selector is {selector!r}; allowed: a rule whose order is largest and that needs "
                "no gradient"
            )
        self.cap = cap

    @property
    def _stores(self) -> bool:
        return True

    def _forget(self) -> None:
        """Nothing: what is frozen stays so."""

    def _blocks(
        self, rule: FreezingRule, pl_module: LightningModule, params: Mapping[str, nn.Parameter]
    ) -> Iterator[Frozen]:
        scores = self._scores(rule, params, self._known(pl_module))
        for block in filter(None, ([one] for one in scores) if self.scope == "tensor" else [list(scores)]):
            yield united(block, self._stored, self.fraction, self.cap)


def united(block: Sequence[tuple[str, Tensor]], earlier: Mapping[str, Tensor], fraction: float, cap: float) -> Frozen:
    """The first floor(fraction n) of n coordinates by score and all of `earlier`, at most floor(cap n) of them.

    Args:
        block: Names and non-negative fp32 scores of what is ranked together, sharded or not.
        earlier: Bool masks by name, laid out like the scores; they come before all others, then scores, then position.
        fraction: Share that is asked for by score, in (0, 1].
        cap: Largest share, at least `fraction`.
    """
    (asked,) = frozen_blocks(block, fraction, "global", "largest")
    group = shard_group(score for _, score in block)
    held = [_part(earlier.get(name), asked.masks[name]) for name, _ in block]
    counts = [(mask | before).count_nonzero() for mask, before in zip(asked.masks.values(), held, strict=True)]
    frozen = min(int(sum_over(torch.stack(counts).sum(), group)), floor_share(cap, asked.total))
    scores = [local(score).masked_fill(before, torch.inf) for (_, score), before in zip(block, held, strict=True)]
    masks = top_mask(scores, frozen, group)
    return asked._replace(masks={name: mask for (name, _), mask in zip(block, masks, strict=True)}, frozen=frozen)


def _part(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if mask is None else local(mask)
