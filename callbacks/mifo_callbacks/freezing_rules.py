"""Which coordinates a phase freezes: a rule scores them, and those that come first in its order are frozen."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from mifo_callbacks.checks import require_choice
from mifo_callbacks.collectives import sum_over
from mifo_callbacks.sharding import local, shard_group, shard_like
from mifo_callbacks.thresholds import cut_mask, find_cut, floor_share

RuleName = Literal["rl_topk", "rl_bottomk", "random", "none"]
Scope = Literal["tensor", "global"]
Order = Literal["largest", "smallest_zero_last"]
INFINITY = 0x7F800000  # as bits: those of NaN are larger, those of negative numbers below 0


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of one parameter, for a rule to score.

    `name` and the full `shape` are the parameter's; tensors are laid out like it. `draw()` gives uniform fp32 numbers
    in [0, 1) that depend on the seed, the phase and the parameter alone. `known` is the importance and `first_gradient`
    the gradient of the phase's first optimizer step; each is None where the rule needs none.
    """

    name: str
    shape: torch.Size
    draw: Callable[[], Tensor]
    known: Tensor | None = None
    first_gradient: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """Importance of every coordinate, fp32, not to be changed.

        Raises:
            MisconfigurationException: If the rule says that it needs none.
        """
        if self.known is None:
            raise MisconfigurationException("a freezing rule with needs_importance = False asks for importance")
        return self.known

    @property
    def gradient(self) -> Tensor:
        """Gradient of every coordinate in the phase's first optimizer step, before any weight moves; not to be changed.

        Raises:
            MisconfigurationException: If the rule does not say that it needs one.
        """
        if self.first_gradient is None:
            raise MisconfigurationException("a freezing rule with needs_gradient = False asks for the gradient")
        return self.first_gradient


class FreezingRule(ABC):
    """Scores coordinates; of n, the floor(fraction * n) that come first in `order` are frozen, ties by position.

    A score follows from what `score` is given and from nothing else: a resumed run asks again. `order` is "largest"
    scores first or "smallest_zero_last". A rule that does not look at importance says so in `needs_importance`; then
    none has to be measured. One that looks at the gradient says `needs_gradient`; then the mask is drawn at the phase's
    first optimizer step, and is in the checkpoint. One whose scores mean something in one `scope` alone names it.
    """

    needs_importance: bool = True
    needs_gradient: bool = False
    order: Order = "largest"
    scope: Scope | None = None

    @abstractmethod
    def score(self, at: Coordinates) -> Tensor | None:
        """Scores of one parameter's coordinates, fp32 and not negative, in its shape; None leaves all of them free."""


class MostImportant(FreezingRule):
    """Freeze what matters most ("rl_topk", the method's)."""

    def score(self, at: Coordinates) -> Tensor:
        return at.importance


class LeastImportant(MostImportant):
    """Freeze what matters least, but something ("rl_bottomk", a control)."""

    order = "smallest_zero_last"


class AtRandom(FreezingRule):
    """Freeze as many at random, others in each phase ("random", a control)."""

    needs_importance = False

    def score(self, at: Coordinates) -> Tensor:
        return at.draw()


RULES: dict[RuleName, FreezingRule | None] = {
    "rl_topk": MostImportant(),
    "rl_bottomk": LeastImportant(),
    "random": AtRandom(),
    "none": None,
}


def rule_of(name: str, selector: RuleName | FreezingRule) -> FreezingRule | None:
    """The rule that `selector` is or names; None for "none".

    Raises:
        MisconfigurationException: If it is neither, or its order is none; `name` is what the message calls it.
    """
    if isinstance(selector, FreezingRule):
        require_choice(f"{type(selector).__name__}.order", selector.order, Order)
        return selector
    if selector not in get_args(RuleName):
        names = ", ".join(get_args(RuleName))
        raise MisconfigurationException(f"{name} is {selector!r}; allowed: {names}, or an object of a FreezingRule")
    return RULES[selector]


def checked_score(score: Tensor, name: str, parameter: Tensor) -> Tensor:
    """`score` laid out like its parameter; collective if that is sharded.

    Raises:
        MisconfigurationException: If it has another shape or dtype, or a number is negative or NaN.
    """
    score = score.detach()
    if score.shape != parameter.shape or score.dtype != torch.float32:
        raise MisconfigurationException(
            f"the freezing score of {name!r} is {tuple(score.shape)}, {score.dtype}; allowed: its shape "
            f"{tuple(parameter.shape)}, torch.float32"
        )
    score = shard_like(score, parameter)
    part = local(score)
    least, most = _range_of_bits(part)
    bad = torch.zeros((), dtype=torch.int64, device=part.device)
    if least < 0 or most > INFINITY:
        bad = (~(part >= 0)).count_nonzero()
    if count := int(sum_over(bad, shard_group([score]))):
        raise MisconfigurationException(
            f"the freezing score of {name!r} is negative or NaN at {count} of {score.numel()} coordinates; "
            "allowed: numbers of at least 0"
        )
    return score + 0.0 if least < 0 else score  # -0.0: its bits would rank above everything


def _range_of_bits(score: Tensor) -> tuple[int, int]:
    """The least and the largest fp32 number's bits, read as int32: one look where comparisons are several."""
    if not score.numel():
        return 0, 0
    least, most = torch.aminmax(score.view(torch.int32))
    return int(least), int(most)


class Frozen(NamedTuple):
    """This rank's part of a freezing mask, and what it froze over all shards.

    `masks` are bool by parameter name, True where frozen. `frozen` of `total` coordinates are frozen; `tied`
    of all coordinates lay at a threshold where position decided; `zero` of the frozen ones have a score of
    exactly 0.
    """

    masks: dict[str, Tensor]
    frozen: int
    total: int
    tied: int
    zero: int


def freezing_masks(
    scores: Iterable[tuple[str, Tensor]],
    fraction: float = 0.5,
    scope: Scope = "tensor",
    order: Order = "largest",
) -> Frozen:
    """Freeze exactly floor(fraction * n) coordinates: the first in `order`, ties by position.

    Args:
        scores: Name and non-negative fp32 score of every parameter, sharded or not; with scope "tensor" only
            one of them needs to exist at a time.
        fraction: Share of the coordinates to freeze, in (0, 1].
        scope: n is the size of each "tensor", or of all of them together ("global").
        order: "largest" scores first, or "smallest_zero_last": smallest first, zeros at the end.
    """
    return together(frozen_blocks(scores, fraction, scope, order))


def frozen_blocks(
    scores: Iterable[tuple[str, Tensor]], fraction: float, scope: Scope, order: Order
) -> Iterator[Frozen]:
    """`freezing_masks` of one tensor after the other, or of all at once; arguments as there."""
    blocks = ([named] for named in scores) if scope == "tensor" else [list(scores)]
    for block in filter(None, blocks):
        group = shard_group(score for _, score in block)
        parts = [local(score) for _, score in block]
        n = sum(score.numel() for _, score in block)
        k, cut = floor_share(fraction, n), None
        if k == 0:
            drawn = [torch.zeros(part.shape, dtype=torch.bool, device=part.device) for part in parts]
        else:
            cut = find_cut(parts, k, group, order)
            drawn = cut_mask(parts, cut, group, order)
        tied = cut.ties if cut and cut.take < cut.ties else 0
        zero = cut.take if cut and cut.value == 0 else 0  # zeros come last, so they are the ones at the cut
        yield Frozen({name: mask for (name, _), mask in zip(block, drawn, strict=True)}, k, n, tied, zero)


def together(blocks: Iterable[Frozen]) -> Frozen:
    """Blocks as one."""
    masks: dict[str, Tensor] = {}
    counts = [0, 0, 0, 0]
    for block in blocks:
        masks |= block.masks
        counts = [a + b for a, b in zip(counts, block[1:], strict=True)]
    return Frozen(masks, *counts)
