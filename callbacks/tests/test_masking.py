"""Masks on bits: exact for every value, dtype and memory layout."""

import pytest
import torch
from torch import Tensor

from mifo_callbacks import mask_gradients, masking
from mifo_callbacks.masking import restore_, zero_

ODD = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -3.0, 7.25]


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = masking.INTEGERS[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))


@pytest.mark.parametrize("layout", ["flat", "transposed", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_and_restore_are_exact(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "CHUNK", 5)
    before = torch.tensor(ODD, dtype=dtype).repeat(3).view(4, 6)
    mask = torch.arange(24).view(4, 6) % 3 == 0
    if layout == "transposed":
        before, mask = before.t(), mask.t().contiguous()
    elif layout == "scalar":
        before, mask = before[0, 2], mask[0, 0]
    zeroed = zero_(before.clone(), mask)
    assert same_bits(zeroed, torch.where(mask, torch.zeros_like(before), before))
    reference = zero_(before.clone(), ~mask)
    moved = torch.randn(before.shape).to(dtype)
    assert same_bits(restore_(moved.clone(), mask, reference), torch.where(mask, before, moved))


def test_mask_gradients() -> None:
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    norms = mask_gradients(gradients, [torch.tensor([True, False]), torch.tensor([True])])
    assert norms.tolist() == [13.0, 4.0]
    assert [g.tolist() for g in gradients] == [[0.0, 4.0], [0.0]]
