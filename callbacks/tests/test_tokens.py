"""Token selection: exact counts, ties, padding, micro-batches, controls."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from mifo_callbacks import select_tokens


def tokens(seed: int = 0, b: int = 6, length: int = 20, tied: bool = False) -> tuple[Tensor, Tensor]:
    """Entropies and a mask of responses of different lengths, one of them empty."""
    draw = torch.Generator().manual_seed(seed)
    entropy = torch.rand(b, length, generator=draw) * 3
    lengths = torch.randint(1, length + 1, (b, 1), generator=draw)
    lengths[1] = 0
    return ((entropy * 2).round() / 2 if tied else entropy), torch.arange(length) < lengths


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("selector", ["top", "bottom", "random"])
def test_batch_scope_selects_exactly_ceil_of_the_valid_tokens(selector: str, fraction: float, tied: bool) -> None:
    entropy, mask = tokens(tied=tied)
    selection = select_tokens(entropy, mask, fraction=fraction, selector=selector)
    n = int(mask.sum())
    assert selection.mask.sum() == math.ceil(fraction * n - 1e-9) == selection.denominator
    assert not (selection.mask & ~mask).any()
    kept, left = entropy[selection.mask], entropy[mask & ~selection.mask]
    if selector == "top" and len(left):
        assert kept.min() >= left.max()
    if selector == "bottom" and len(left):
        assert kept.max() <= left.min()


def test_ties_are_cut_by_position() -> None:
    mask = torch.tensor([[False, True, True], [True, True, True]])
    selection = select_tokens(torch.ones(2, 3), mask, fraction=0.4)
    assert selection.mask.tolist() == [[False, True, True], [False, False, False]]


@pytest.mark.parametrize("selector", ["top", "bottom"])
def test_sequence_scope_selects_exactly_ceil_in_every_sequence(selector: str) -> None:
    for tied in (False, True):
        entropy, mask = tokens(tied=tied)
        chosen = select_tokens(entropy, mask, fraction=0.2, scope="sequence", selector=selector).mask
        assert chosen.sum(1).tolist() == [math.ceil(0.2 * n - 1e-9) for n in mask.sum(1).tolist()]
        sign = 1 if selector == "top" else -1
        for h, m, c in zip(sign * entropy, mask, chosen, strict=True):
            assert not (c & ~m).any()
            assert not (m & ~c).any() or not c.any() or h[c].min() >= h[m & ~c].max()


def test_fixed_scope_takes_everything_from_the_threshold_on() -> None:
    entropy, mask = tokens(tied=True)
    chosen = select_tokens(entropy, mask, scope="fixed", threshold=1.5).mask
    assert torch.equal(chosen, (entropy >= 1.5) & mask)
    for selector in ("bottom", "random"):
        control = select_tokens(entropy, mask, scope="fixed", threshold=1.5, selector=selector).mask
        assert control.sum() == chosen.sum()
        assert not torch.equal(control, chosen)


def test_no_token_above_the_threshold_leaves_a_denominator_of_one() -> None:
    entropy, mask = tokens()
    selection = select_tokens(entropy, mask, scope="fixed", threshold=99.0)
    assert not selection.mask.any()
    assert selection.denominator == 1


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("selector", ["top", "bottom", "random"])
def test_padding_does_not_matter(scope: str, selector: str) -> None:
    entropy, mask = tokens(tied=True)
    plain = select_tokens(entropy, mask, scope=scope, selector=selector)
    junk = torch.where(mask, entropy, torch.full_like(entropy, torch.nan))
    wide = torch.cat([junk, torch.full((6, 5), 77.0)], 1)
    padded = select_tokens(
        wide, torch.cat([mask, torch.zeros(6, 5, dtype=torch.bool)], 1), scope=scope, selector=selector
    )
    assert torch.equal(padded.mask[:, :20], plain.mask)
    assert padded.denominator == plain.denominator


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_order_of_sequences_does_not_matter(scope: str) -> None:
    entropy, mask = tokens()
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    plain = select_tokens(entropy, mask, scope=scope).mask
    assert torch.equal(select_tokens(entropy[order], mask[order], scope=scope).mask, plain[order])


def test_one_step_is_not_its_micro_batches() -> None:
    """A threshold per micro-batch would choose other tokens: the selection belongs to the whole step."""
    entropy, mask = tokens()
    entropy[:3] += 3
    whole = select_tokens(entropy, mask).mask
    split = torch.cat([select_tokens(entropy[i : i + 3], mask[i : i + 3]).mask for i in (0, 3)])
    assert not whole[3:].any()
    assert split[3:].any()


def test_forced_tokens_are_added_and_displace_nothing() -> None:
    entropy, mask = tokens()
    forced = torch.zeros_like(mask)
    forced[:, 0] = True
    plain = select_tokens(entropy, mask)
    added = select_tokens(entropy, mask, forced=forced)
    assert torch.equal(added.mask, plain.mask | (forced & mask))
    assert added.mask.sum() > plain.mask.sum()
    assert added.denominator == added.mask.sum()


def test_denominator_all_counts_valid_tokens() -> None:
    entropy, mask = tokens()
    assert select_tokens(entropy, mask, denominator="all").denominator == mask.sum()


def test_random_depends_on_its_seed_only() -> None:
    entropy, mask = tokens()
    first = select_tokens(entropy, mask, selector="random", seed=(3, 10)).mask
    assert torch.equal(first, select_tokens(entropy.flip(0), mask, selector="random", seed=(3, 10)).mask)
    assert not torch.equal(first, select_tokens(entropy, mask, selector="random", seed=(3, 11)).mask)


@pytest.mark.parametrize(("selector", "expected"), [("top", [1, 4]), ("bottom", [0, 2])])
def test_rounding_below_zero_counts_as_zero(selector: Any, expected: list[int]) -> None:
    entropy = torch.tensor([[-0.0, 0.5, -1e-9, 0.0, 0.1]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    chosen = select_tokens(entropy, mask, fraction=0.4, selector=selector).mask
    assert chosen[0].nonzero().flatten().tolist() == expected


def test_nothing_flows_through_the_selection() -> None:
    entropy, mask = tokens()
    entropy.requires_grad_()
    assert not select_tokens(entropy * 1.0, mask).mask.requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_entropy_is_an_error(bad: float) -> None:
    entropy, mask = tokens()
    entropy[0, 0] = bad
    with pytest.raises(MisconfigurationException, match="NaN or infinite at 1 of"):
        select_tokens(entropy, mask)


def test_shapes_must_agree() -> None:
    entropy, mask = tokens()
    with pytest.raises(MisconfigurationException, match=r"entropy \(6, 19\), mask \(6, 20\)"):
        select_tokens(entropy[:, 1:], mask)
    with pytest.raises(MisconfigurationException, match=r"torch.int64"):
        select_tokens(entropy, mask.long())
