"""The radix selection against a full sort."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mifo_callbacks import kth_largest, thresholds, top_mask
from mifo_callbacks.thresholds import ceil_share, find_cut, find_cuts, floor_share, random_scores


def scores(kind: str) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(7, 30), (0,), (501,), (), (3, 4, 5)]
    if kind == "normal":
        made = [torch.randn(s, generator=draw).square() for s in shapes]
    elif kind == "tied":
        made = [torch.randint(4, s, generator=draw).float() for s in shapes]
    elif kind == "zero-heavy":
        made = [torch.randn(s, generator=draw).clamp(min=0.3) - 0.3 for s in shapes]
    elif kind == "constant":
        made = [torch.full(s, 2.5) for s in shapes]
    else:  # every exponent, subnormal numbers and infinity
        made = [torch.exp2(torch.randint(-149, 129, s, generator=draw).float()) for s in shapes]
    return made


KINDS = ["normal", "tied", "zero-heavy", "constant", "extreme"]


@pytest.fixture(params=["whole", "histograms", "chunks", "narrowed", "badly narrowed"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "histograms":
        monkeypatch.setattr(thresholds, "_partitioned", thresholds._cut)
    if request.param != "whole":
        monkeypatch.setattr(thresholds, "CHUNK", 64)
    if "narrowed" in request.param:
        monkeypatch.setattr(thresholds, "NARROWED_FROM", 1)
        monkeypatch.setattr(thresholds, "SAMPLE", 4 if request.param == "badly narrowed" else 200)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_kth_largest_equals_a_full_sort(kind: str, chunk: str) -> None:
    tensors = scores(kind)
    ordered = torch.cat([t.flatten() for t in tensors]).sort(descending=True).values.tolist()
    for k in (1, 2, 17, len(ordered) // 2, len(ordered) - 1, len(ordered)):
        assert kth_largest(tensors, k) == ordered[k - 1]


def sorted_mask(flat: Tensor, k: int, order: str) -> Tensor:
    """The definition: a stable sort, so ties go by position."""
    key = flat if order == "largest" else -flat
    if order == "smallest_zero_last":
        key = torch.where(flat == 0, -torch.inf, key.clamp(min=-3e38))
    mask = torch.zeros(flat.shape, dtype=torch.bool)
    mask[key.argsort(descending=True, stable=True)[:k]] = True
    return mask


@pytest.mark.parametrize("order", ["largest", "smallest", "smallest_zero_last"])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_top_mask_equals_a_stable_sort(kind: str, order: str, chunk: str) -> None:
    tensors = scores(kind)
    flat = torch.cat([t.flatten() for t in tensors])
    for k in (0, 1, 100, len(flat) // 2, len(flat) - 1, len(flat)):
        masks = top_mask(tensors, k, order=order)
        assert [m.shape for m in masks] == [t.shape for t in tensors]
        assert torch.equal(torch.cat([m.flatten() for m in masks]), sorted_mask(flat, k, order))


def test_bf16_scores_rank_like_the_same_numbers_in_fp32(chunk: str) -> None:
    tensors = [t.bfloat16() for t in scores("normal")]
    assert find_cut(tensors, 300) == find_cut([t.float() for t in tensors], 300)


def test_cut_counts_its_ties() -> None:
    cut = find_cut([torch.tensor([5.0, 1.0, 3.0]), torch.tensor([3.0, 3.0, 0.0])], 3)
    assert (cut.value, cut.take, cut.ties) == (3.0, 2, 3)


@pytest.mark.parametrize("k", [0, 8])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k = {k}; allowed: 1 to .* 7"):
        kth_largest([torch.rand(7)], k)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        kth_largest([torch.rand(7, dtype=torch.float64)], 1)


def test_non_contiguous_scores() -> None:
    score = torch.rand(20, 30).t()
    assert torch.equal(top_mask([score], 200)[0], top_mask([score.contiguous()], 200)[0])


@pytest.mark.parametrize(
    ("fraction", "n", "floor", "ceil"),
    [
        (0.2, 5, 1, 1),
        (0.1, 30, 3, 3),
        (0.3, 10, 3, 3),
        (1 / 3, 9, 3, 3),
        (2 / 3, 3, 2, 2),
        (0.5, 3, 1, 2),
        (1.0, 7, 7, 7),
    ],
)
def test_shares_are_free_of_float_error(fraction: float, n: int, floor: int, ceil: int) -> None:
    assert (floor_share(fraction, n), ceil_share(fraction, n)) == (floor, ceil)
    assert ceil_share(fraction, torch.tensor([n])).tolist() == [ceil]


def test_random_scores_depend_on_every_seed() -> None:
    base = random_scores((50,), 1, 2, 3)
    assert torch.equal(base, random_scores((50,), 1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (12, 3)):
        assert not torch.equal(base, random_scores((50,), *other))


@pytest.mark.parametrize(("tied", "looks"), [(0.0, 2), (0.6, 3)])
def test_several_cuts_are_those_of_each_and_look_at_little_more_than_once(
    tied: float, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and once more where many scores are one number, as after a single step of AdamW."""
    looked: list[int] = []
    keys_of = thresholds._keys

    def counted(tensor: Tensor, order: thresholds.Order) -> Iterator[Tensor]:
        looked.append(tensor.numel())
        return keys_of(tensor, order)

    tensors = [torch.randn(1 << 20).square(), torch.randn(300, 1001).square()]
    for t in tensors:
        t[torch.rand(t.shape) < tied] = 0.7
    n = sum(t.numel() for t in tensors)
    ks = [n // 2, n // 10, n // 100, n, 1]
    whole = [find_cut(tensors, k) for k in ks]
    monkeypatch.setattr(thresholds, "_keys", counted)
    assert find_cuts(tensors, ks) == whole
    assert sum(looked) < looks * n
    monkeypatch.setattr(thresholds, "NARROWED_FROM", 1 << 60)
    assert find_cuts(tensors, ks) == whole
