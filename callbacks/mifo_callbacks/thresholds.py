"""Exact k-th largest and top-k masks over many tensors and ranks, without a sort or a flat copy.

Non-negative fp32 numbers order like their bits read as int32, so three histograms of 11, 11 and 9 bits, each
summed over the tensors, in chunks, and over the ranks, give the k-th largest key exactly. The smallest ones
come from the same algorithm on mirrored keys. Where one rank holds all scores and they are many, a sample says between
which keys the k-th almost surely is: one pass counts what lies above and takes out what lies between. Few on a CPU are
partitioned, by NumPy, which has vector instructions for that.
"""

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import reduce
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mifo_callbacks.collectives import gather_over, rank_in, sum_over
from mifo_callbacks.masking import GPU_CHUNK

Order = Literal["largest", "smallest", "smallest_zero_last"]
Count = TypeVar("Count", int, Tensor)
Brackets = dict[int, tuple[int, int]]

CHUNK = 1 << 15  # elements: the largest temporaries are a few times that and fit into a second-level cache
MAX_KEY = 0x7FFFFFFF
NARROWED_FROM = 1 << 20  # scores
SAMPLE = 1 << 15  # at least; of many scores one in a hundred, so that few lie between
LEVELS = ((20, 11), (9, 11), (0, 9))  # (shift, bits) of the three histograms: 31 bits without the sign


class Cut(NamedTuple):
    """Where a ranking of n scores is cut after the first k.

    `value` is the k-th score and `key` its integer rank key; of the `ties` scores equal to it, `take` belong
    to the k.
    """

    value: float
    key: int
    take: int
    ties: int


def ceil_share(fraction: float, n: Count) -> Count:
    """ceil(fraction * n), `n` an int or int64 tensor, without float error: 0.2 means exactly one fifth."""
    ratio = Fraction(fraction).limit_denominator(1_000_000)
    return -(-n * ratio.numerator // ratio.denominator)


def floor_share(fraction: float, n: int) -> int:
    """floor(fraction * n) without float error: 0.2 means exactly one fifth."""
    return int(n * Fraction(fraction).limit_denominator(1_000_000))


def random_scores(shape: Sequence[int], *seed: int) -> Tensor:
    """Uniform fp32 scores in [0, 1) on the CPU that depend on the integers in `seed` and on nothing else."""
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=4).digest()
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))


def find_cut(scores: Sequence[Tensor], k: int, group: dist.ProcessGroup | None = None, order: Order = "largest") -> Cut:
    """The exact cut after the first `k` scores in `order`, over all tensors and all ranks of `group`.

    Args:
        scores: Non-negative fp32 or bf16 tensors of any shape, on one device; this rank's parts when `group` is
            given.
        k: How many scores lie before the cut, over all ranks; at least 1.
        group: Ranks that hold further parts of the same ranking; None when this rank holds all of it.
        order: "largest" first, "smallest" first, or "smallest_zero_last": smallest non-zero first, zeros at
            the end.

    Raises:
        ValueError: If `k` is not between 1 and the number of scores, or a tensor is of another dtype.
    """
    return find_cuts(scores, [k], group, order)[0]


def find_cuts(
    scores: Sequence[Tensor], ks: Sequence[int], group: dist.ProcessGroup | None = None, order: Order = "largest"
) -> list[Cut]:
    """`find_cut` for each of `ks`; several cost little more than one."""
    ranking = _Ranking(scores, order)
    if group is not None:
        return [_cut(ranking, k, group) for k in ks]
    narrowed = _narrowed(ranking, ks)
    return [narrowed.get(k) or _alone(ranking, k) for k in ks]


def kth_largest(scores: Sequence[Tensor], k: int, group: dist.ProcessGroup | None = None) -> float:
    """The exact `k`-th largest of all scores; arguments and errors as in `find_cut`."""
    return find_cut(scores, k, group).value


class _Ranking(NamedTuple):
    """Scores as keys that are larger for what comes earlier."""

    scores: Sequence[Tensor]
    order: Order

    def ranked(self) -> Iterator[Tensor]:
        """All int32 keys, in chunks."""
        return (keys for tensor in self.scores for keys in _keys(tensor, self.order))

    def value(self, key: int) -> float:
        """The score that has this key."""
        return _mirrored(torch.tensor(key, dtype=torch.int32), self.order).view(torch.float32).item()


def _alone(ranking: _Ranking, k: int) -> Cut:
    """The cut after the first `k` of scores that this rank has all of."""
    if sum(tensor.numel() for tensor in ranking.scores) < NARROWED_FROM and ranking.scores[0].device.type == "cpu":
        return _partitioned(ranking, k)
    return _cut(ranking, k)


def _partitioned(ranking: _Ranking, k: int) -> Cut:
    """The cut after the first `k` of few scores on a CPU."""
    keys = torch.cat([*ranking.ranked()]).numpy()
    place = len(keys) - k
    _require_place(k, len(keys))
    keys = np.partition(keys, place)
    first, rest = (int(np.count_nonzero(part == keys[place])) for part in (keys[place:], keys[:place]))
    return Cut(ranking.value(int(keys[place])), int(keys[place]), first, first + rest)


def _require_place(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}; allowed: 1 to the number of scores, {n}")


def _cut(ranking: _Ranking, k: int, group: dist.ProcessGroup | None = None) -> Cut:
    """The cut after the first `k`: a histogram of the highest bits, then of the next among those that matter."""
    prefix, take, ties = 0, k, 0
    for shift, bits in LEVELS:
        histogram = sum_over(_histogram(ranking, prefix, shift, bits), group)
        upto = histogram.flip(0).cumsum(0)  # how many keys are in the highest bucket, the two highest, ...
        if shift == LEVELS[0][0]:
            _require_place(k, int(upto[-1]))
        place = int(torch.searchsorted(upto, take))
        earlier = int(upto[place - 1]) if place else 0
        ties = int(upto[place]) - earlier
        prefix, take = prefix << bits | (len(upto) - 1 - place), take - earlier
    return Cut(ranking.value(prefix), prefix, take, ties)


def _narrowed(ranking: _Ranking, ks: Sequence[int]) -> dict[int, Cut]:
    """The cuts after those `k` where a sample tells between which keys they are.

    Empty where there are few scores, or too many between. One number that is many of the scores is never between:
    the sample has it as an end of the bracket, and a second look counts how many there are.
    """
    n = sum(tensor.numel() for tensor in ranking.scores)
    if n < NARROWED_FROM or not all(1 <= k <= n for k in ks):
        return {}
    step = min(n // SAMPLE, 100) | 1  # odd: no column of a matrix is all of it
    sample = torch.cat([*_Ranking([t.reshape(-1)[::step] for t in ranking.scores], ranking.order).ranked()])
    sample = sample.sort().values.flip(0)  # a descending sort takes many times as long on a CPU
    between = {k: _bracket(sample, k / n) for k in ks}
    found, ends = _found(ranking, between, n // 8)
    return found | _found(ranking, ends, 0)[0] if ends else found


def _found(ranking: _Ranking, between: Brackets, most: int) -> tuple[dict[int, Cut], Brackets]:
    """Cuts inside of the brackets, or at a bracket of one key; of those that are not, the end where they may be.

    Nothing where more than `most` keys lie inside.
    """
    device = ranking.scores[0].device
    lows, highs = zip(*between.values(), strict=True)
    bounds = torch.tensor([*lows, *(high - 1 for high in highs)], dtype=torch.int32, device=device)[:, None]
    # reused, and no bools: a CPU takes three times as long for comparisons with such results
    buffer = torch.empty(len(bounds), _chunk(device), dtype=torch.int32, device=device)
    counts: list[Tensor] = []
    kept: list[Tensor] = []
    left = most
    for keys in ranking.ranked():
        flags = torch.gt(keys, bounds, out=buffer[:, : len(keys)])
        counts.append(flags.sum(1, dtype=torch.int32))
        if most:
            above, upto = flags.split(len(between))
            inside = torch.gt(above, upto, out=above)  # none where low is high
            kept.append(_where(keys, reduce(torch.bitwise_or, inside).to(torch.int8)))
            left -= len(kept[-1])
            if left < 0:
                return {}, {}
    sums = torch.stack(counts).sum(0).view(2, len(between)).t().tolist()
    found: dict[int, Cut] = {}
    ends: Brackets = {}
    inner = torch.cat(kept) if kept else torch.empty(0)
    for (k, (low, high)), (above_low, upto_high) in zip(between.items(), sums, strict=True):
        if low == high:
            if above_low < k <= upto_high:
                found[k] = Cut(ranking.value(low), low, k - above_low, upto_high - above_low)
        elif upto_high < k <= above_low:
            part = inner[((inner > low) & (inner < high)).nonzero()[:, 0]]
            # keys mirrored twice are themselves: the part is ranked as the scores were
            scores = _mirrored(part, ranking.order).view(torch.float32)
            found[k] = _alone(_Ranking([scores], ranking.order), k - upto_high)
        else:
            ends[k] = (high, high) if k <= upto_high else (low, low)
    return found, ends


def _where(keys: Tensor, flags: Tensor) -> Tensor:
    """The `keys` [n] whose int8 flag [n] is 1; where these are rare, looking at eight at once takes a third as long."""
    if len(keys) % 8 == 0:
        rows = flags.view(torch.int64).nonzero()[:, 0]
        keys, flags = (t.view(-1, 8).index_select(0, rows).view(-1) for t in (keys, flags))
    return keys.index_select(0, flags.view(torch.bool).nonzero()[:, 0])


def _bracket(sample: Tensor, share: float) -> tuple[int, int]:
    """Keys between which the cut after a share of all keys is, by a sorted sample, but for five standard deviations."""
    place, margin = share * len(sample), 5 * (len(sample) * share * (1 - share)) ** 0.5 + 5
    first, last = int(place - margin), int(place + margin)
    low = int(sample[last]) if last < len(sample) else 0
    return low, int(sample[first]) if first >= 0 else MAX_KEY


def cut_mask(
    scores: Sequence[Tensor], cut: Cut, group: dist.ProcessGroup | None = None, order: Order = "largest"
) -> list[Tensor]:
    """Bool masks, shaped like `scores`, of what lies before `cut`: exactly k True over all tensors and ranks.

    Ties are taken by position: earlier tensors first, within a tensor lower ranks first, then lower flat
    indices. For tensors sharded by rows that is the order of the unsharded tensor.
    """
    if cut.take == cut.ties:
        return [_mask(t, cut.key, None, order) for t in scores]
    counts = [_counts(t, cut.key, order) for t in scores]
    by_tensor = gather_over(torch.stack([c.sum() for c in counts]), group).t()  # [tensors, ranks]: the order of ties
    earlier = by_tensor.reshape(-1).cumsum(0).view_as(by_tensor) - by_tensor
    of_tensors = cut.take - earlier[:, rank_in(group)]
    quotas = [q - (c.cumsum(0) - c) for q, c in zip(of_tensors, counts, strict=True)]
    return [_mask(t, cut.key, (q, c), order) for t, q, c in zip(scores, quotas, counts, strict=True)]


def top_mask(
    scores: Sequence[Tensor], k: int, group: dist.ProcessGroup | None = None, order: Order = "largest"
) -> list[Tensor]:
    """Bool masks of the first `k` scores in `order`: `find_cut`, then `cut_mask`; all False for `k` = 0."""
    if k == 0:
        return [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in scores]
    return cut_mask(scores, find_cut(scores, k, group, order), group, order)


def _keys(scores: Tensor, order: Order) -> Iterator[Tensor]:
    """Chunks of int32 keys, in flat order, that are larger for scores that come earlier in `order`."""
    if scores.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"scores are {scores.dtype}; allowed: torch.float32, torch.bfloat16")
    for chunk in torch.split(scores.reshape(-1), _chunk(scores.device)):
        yield _mirrored(chunk.float().view(torch.int32), order)


def _chunk(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else GPU_CHUNK


def _mirrored(bits: Tensor, order: Order) -> Tensor:
    """The keys of int32 bits, and the bits of such keys: each is the mirror image of the other."""
    if order == "largest":
        return bits
    mirrored = MAX_KEY - bits
    return mirrored if order == "smallest" else torch.where(bits == 0, 0, mirrored)


def _histogram(ranking: _Ranking, prefix: int, shift: int, bits: int) -> Tensor:
    """Counts [2**bits] of the next `bits` bits among the keys that begin with `prefix`."""
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=ranking.scores[0].device)
    first = shift == LEVELS[0][0]
    for keys in ranking.ranked():
        matching = keys if first else keys[keys >> (shift + bits) == prefix]
        counts += torch.bincount(matching >> shift & ((1 << bits) - 1), minlength=1 << bits)
    return counts


def _counts(scores: Tensor, key: int, order: Order) -> Tensor:
    """How many scores of each chunk have exactly this key: int64 [chunks]."""
    equal = torch.empty(_chunk(scores.device), dtype=torch.int32, device=scores.device)
    counts = [
        torch.eq(keys, key, out=equal[: len(keys)]).sum(dtype=torch.int32)  # int64 takes three times as long
        for keys in _keys(scores, order)
    ]
    return torch.stack(counts).long()


def _mask(scores: Tensor, key: int, ties: tuple[Tensor, Tensor] | None, order: Order) -> Tensor:
    """Everything before `key`, and of those equal to it all (None), or the first `quotas` of `counts` in each chunk."""
    mask = torch.empty(scores.numel(), dtype=torch.bool, device=scores.device)
    parts = mask.split(_chunk(scores.device))
    quotas, counts = ([0] * len(parts),) * 2 if ties is None else (t.tolist() for t in ties)
    for out, keys, quota, count in zip(parts, _keys(scores, order), quotas, counts, strict=True):
        bits = out.view(torch.int8)  # a bool result takes three times as long on a CPU
        torch.ge(keys, key, out=bits) if quota >= count else torch.gt(keys, key, out=bits)
        if 0 < quota < count:
            tied = keys == key
            out |= tied & (tied.cumsum(0) <= quota)
    return mask.view(scores.shape)
