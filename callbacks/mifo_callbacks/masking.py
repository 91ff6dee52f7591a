"""Masks applied to gradients and weights bit by bit: NaN does not survive a mask, and nothing kept is rounded.

Multiplying the bits of a number, read as an integer, by 0 or 1 clears or keeps them; on a CPU that is about ten
times faster than `masked_fill_` or `torch.where` and needs no temporary larger than a chunk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Generic, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.utils import get_total_norm

CHUNK = 1 << 16  # elements: what is read and written of a few tensors stays in a second-level cache
GPU_CHUNK = 1 << 24  # elsewhere: so large that starting a kernel costs nothing beside it, and temporaries stay small
Held = TypeVar("Held")
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: their bits stand side by side in the highest byte


class PackedMask:
    """A bool mask kept in one bit a coordinate; unpacked whole, or in flat chunks where it is applied.

    Args:
        mask: Bool, of any shape.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        flat = mask.contiguous().view(-1)
        parts = flat.split(_chunk(flat.device))
        self._bits = torch.cat([_packed(part) for part in parts]) if len(flat) else flat.byte()

    def chunks(self) -> Iterator[Tensor]:
        """The flat mask, bool, in chunks of as many coordinates as those of other tensors."""
        left = self.shape.numel()
        table = _bools(self._bits.device)
        for bits in self._bits.split(_chunk(self._bits.device) // 8):
            yield torch.index_select(table, 0, bits.int()).view(torch.bool)[:left]  # int64 indices take twice as long
            left -= 8 * len(bits)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._bits.nbytes

    def unpack(self) -> Tensor:
        """The mask as it was given."""
        return torch.cat([*self.chunks(), self._bits[:0].bool()]).view(self.shape)


Mask = Tensor | PackedMask


class Converted(Mapping[str, Tensor], Generic[Held]):
    """What is held by name, such as packed masks; each is made a tensor by `convert` when it is asked for."""

    def __init__(self, held: Mapping[str, Held], convert: Callable[[Held], Tensor]) -> None:
        self._held, self._convert = held, convert

    def __getitem__(self, name: str) -> Tensor:
        return self._convert(self._held[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def zero_(tensor: Tensor, mask: Mask) -> Tensor:
    """Set `tensor` to 0 in place where the bool `mask` of the same shape is True, NaN included.

    Raises:
        MisconfigurationException: If `tensor` is sparse.
    """
    for masked, bits in _chunks(mask, _bits(tensor)):
        bits.mul_(~masked)
    return tensor


def kept(tensor: Tensor, mask: Mask) -> Tensor:
    """A copy of `tensor` that is 0 where `mask` is False: `zero_` with the opposite mask, in one pass over memory."""
    copy = torch.empty_like(tensor)
    for masked, bits, out in _chunks(mask, _bits(tensor), _bits(copy)):
        torch.mul(bits, masked, out=out)
    return copy


def restore_(tensor: Tensor, mask: Mask, reference: Tensor) -> Tensor:
    """Set `tensor` in place to `reference`, bit by bit, where `mask` is True; `reference` is 0 everywhere else."""
    for masked, bits, kept in _chunks(mask, _bits(tensor), _bits(reference)):
        bits.mul_(~masked).bitwise_or_(kept)
    return tensor


def moved(tensor: Tensor, mask: Mask, reference: Tensor) -> Tensor:
    """How many numbers of `tensor` differ in a bit from `reference` where `mask` is True: int64, scalar."""
    counts = []
    for masked, bits, kept in _chunks(mask, _bits(tensor), _bits(reference)):
        counts.append((bits * masked).bitwise_xor_(kept).count_nonzero())
    return torch.stack(counts).sum()


def mask_gradients(gradients: Sequence[Tensor], masks: Sequence[Mask]) -> Tensor:
    """Set masked coordinates of `gradients` to zero in place; L2 norm of all gradients before and after, [2].

    Args:
        gradients: Gradients of any shape.
        masks: Bool masks of the same shapes, True where the gradient is dropped.

    Raises:
        MisconfigurationException: If a gradient is sparse.
    """
    for gradient in gradients:
        _require_dense(gradient)
    before, after = [], []
    for gradient, mask in zip(gradients, masks, strict=True):  # all of one while it is in the cache
        before.append(torch.linalg.vector_norm(gradient))
        after.append(torch.linalg.vector_norm(zero_(gradient, mask)))
    return torch.stack([get_total_norm(before), get_total_norm(after)])


def _require_dense(tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise MisconfigurationException(
            f"a gradient is {tensor.layout}; allowed: dense ones, as those of nn.Embedding(sparse=False)"
        )


def _bits(tensor: Tensor) -> Tensor:
    _require_dense(tensor)
    return tensor.view(INTEGERS[tensor.element_size()])


def _chunks(mask: Mask, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same elements of mask and `tensors`, which have one shape: flat chunks where memory allows."""
    if not isinstance(mask, PackedMask):
        yield from flat_chunks(mask, *tensors)
    elif all(tensor.is_contiguous() for tensor in tensors):
        chunk = _chunk(tensors[0].device)
        yield from zip(mask.chunks(), *(tensor.view(-1).split(chunk) for tensor in tensors), strict=True)
    else:
        yield mask.unpack(), *tensors


def flat_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same elements of each of `tensors`, which have one shape: flat chunks where memory allows."""
    if all(tensor.is_contiguous() for tensor in tensors):
        chunk = _chunk(tensors[0].device)
        yield from zip(*(tensor.view(-1).split(chunk) for tensor in tensors), strict=True)
    else:
        yield tensors


def _chunk(device: torch.device) -> int:
    """Elements of a chunk: whole bytes of a packed mask."""
    return max((CHUNK if device.type == "cpu" else GPU_CHUNK) // 8, 1) * 8


def _packed(mask: Tensor) -> Tensor:
    """[ceil(n / 8)] uint8 of a flat bool mask [n]."""
    whole = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(torch.int64)
    return (whole * GATHER >> 56).to(torch.uint8)


@cache
def _bools(device: torch.device) -> Tensor:
    """[256] int64, the eight bools of each byte, whatever the order of bytes in memory is."""
    patterns = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool().view(-1)
    table = torch.empty(256, dtype=torch.int64)
    table[_packed(patterns).long()] = patterns.view(torch.int64)
    return table.to(device)
