"""Masks on bits: exact for every value, dtype and memory layout."""

import pytest
import torch
from torch import Tensor

from mifo_callbacks import mask_gradients, masking
from mifo_callbacks.masking import PackedMask, kept, moved, restore_, zero_

ODD = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -3.0, 7.25]


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = masking.INTEGERS[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["flat", "transposed", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_keep_restore_and_moved_are_exact(
    dtype: torch.dtype, layout: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "CHUNK", 10)
    before = torch.tensor(ODD, dtype=dtype).repeat(3).view(4, 6)
    mask = torch.arange(24).view(4, 6) % 3 == 0
    if layout == "transposed":
        before, mask = before.t(), mask.t().contiguous()
    elif layout == "scalar":
        before, mask = before[0, 2], mask[0, 0]
    held = PackedMask(mask) if packed else mask
    zeroed = zero_(before.clone(), held)
    assert same_bits(zeroed, torch.where(mask, torch.zeros_like(before), before))
    reference = kept(before, held)
    assert same_bits(reference, torch.where(mask, before, torch.zeros_like(before)))
    now = torch.randn(before.shape).to(dtype)
    restored = restore_(now.clone(), held, reference)
    assert same_bits(restored, torch.where(mask, before, now))
    assert moved(restored, held, reference) == 0
    assert moved(torch.full_like(before, 9.0), held, reference) == mask.sum()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (3, 5), (1000,)])
def test_a_packed_mask_is_the_mask_in_a_bit_a_coordinate(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "CHUNK", 64)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    for given in (mask, torch.zeros_like(mask), torch.ones_like(mask), mask.t() if mask.dim() == 2 else mask):
        packed = PackedMask(given)
        assert torch.equal(packed.unpack(), given)
        assert packed.nbytes == -(-given.numel() // 8)


def test_mask_gradients() -> None:
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    norms = mask_gradients(gradients, [torch.tensor([True, False]), torch.tensor([True])])
    assert norms.tolist() == [13.0, 4.0]
    assert [g.tolist() for g in gradients] == [[0.0, 4.0], [0.0]]
