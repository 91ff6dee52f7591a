"""Exact k-th largest and top-k masks over many tensors and ranks, without a sort or a flat copy.

Non-negative fp32 numbers order like their bits read as int32, so three histograms of 11, 11 and 9 bits, each
summed over the tensors, in chunks, and over the ranks, give the k-th largest key exactly. The smallest ones
come from the same algorithm on mirrored keys. Where one rank holds many scores, a sample says between which keys the
k-th almost surely is: one pass counts what lies above and takes out what lies between, and histograms are of that.
"""

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mifo_callbacks.collectives import gather_over, rank_in, sum_over

Order = Literal["largest", "smallest", "smallest_zero_last"]
Count = TypeVar("Count", int, Tensor)

CHUNK = 1 << 17  # elements: the largest temporary; a few of them fit into a second-level cache
MAX_KEY = 0x7FFFFFFF
NARROWED_FROM = 1 << 20  # scores
SAMPLE = 1 << 15
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
        scores: Non-negative fp32 tensors of any shape, on one device; this rank's parts when `group` is
            given.
        k: How many scores lie before the cut, over all ranks; at least 1.
        group: Ranks that hold further parts of the same ranking; None when this rank holds all of it.
        order: "largest" first, "smallest" first, or "smallest_zero_last": smallest non-zero first, zeros at
            the end.

    Raises:
        ValueError: If `k` is not between 1 and the number of scores, or a tensor is not fp32.
    """
    return find_cuts(scores, [k], group, order)[0]


def find_cuts(
    scores: Sequence[Tensor], ks: Sequence[int], group: dist.ProcessGroup | None = None, order: Order = "largest"
) -> list[Cut]:
    """`find_cut` for each of `ks`; several cost little more than one."""
    ranking = _Ranking(scores, order)
    narrowed = _narrowed(ranking, ks) if group is None else {}
    return [_cut(*narrowed.get(k, (ranking, k)), group, order) for k in ks]


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


def _cut(ranking: _Ranking, k: int, group: dist.ProcessGroup | None, order: Order) -> Cut:
    """The cut after the first `k`: a histogram of the highest bits, then of the next among those that matter."""
    prefix, take, ties = 0, k, 0
    for shift, bits in LEVELS:
        histogram = sum_over(_histogram(ranking, prefix, shift, bits), group).tolist()
        if shift == LEVELS[0][0] and not 1 <= k <= sum(histogram):
            raise ValueError(f"k = {k}; allowed: 1 to the number of scores, {sum(histogram)}")
        bucket = len(histogram) - 1
        while take > histogram[bucket]:
            take -= histogram[bucket]
            bucket -= 1
        prefix, ties = prefix << bits | bucket, histogram[bucket]
    value = _mirrored(torch.tensor(prefix, dtype=torch.int32), order).view(torch.float32).item()
    return Cut(value, prefix, take, ties)


def _narrowed(ranking: _Ranking, ks: Sequence[int]) -> dict[int, tuple[_Ranking, int]]:
    """For those `k` where a sample tells between which keys the cut is: the scores there, and how many of them to take.

    Empty where there are few scores, or too many between (one number that is most of them, for example).
    """
    n = sum(tensor.numel() for tensor in ranking.scores)
    if n < NARROWED_FROM:
        return {}
    step = n // SAMPLE | 1  # odd: no column of a matrix is all of it
    sample = torch.cat([*_Ranking([t.reshape(-1)[::step] for t in ranking.scores], ranking.order).ranked()])
    sample = sample.sort(descending=True).values
    between = [_bracket(sample, k / n) for k in ks]
    above = torch.zeros(len(ks), dtype=torch.int64, device=sample.device)
    taken, count = [], 0
    for keys in ranking.ranked():
        inside = torch.zeros_like(keys)
        for i, (low, high) in enumerate(between):
            # comparisons with int32 results: a CPU takes three times as long for bool ones
            over, from_low = (torch.empty_like(keys) for _ in range(2))
            above[i] += torch.gt(keys, high, out=over).sum(dtype=torch.int32)
            inside += torch.ge(keys, low, out=from_low).sub_(over)
        taken.append(keys[inside.nonzero()[:, 0]])
        count += len(taken[-1])
        if count > n // 8:
            return {}
    kept = torch.cat(taken)
    found = {}
    for k, (low, high), before in zip(ks, between, above.tolist(), strict=True):
        part = kept[(kept >= low) & (kept <= high)]
        if 1 <= k - before <= len(part):
            # keys mirrored twice are themselves: the part is ranked as the scores were
            found[k] = _Ranking([_mirrored(part, ranking.order).view(torch.float32)], ranking.order), k - before
    return found


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
    quotas: list[int | None] = [None] * len(scores)
    if cut.take < cut.ties:
        counts = torch.stack([_count(t, cut.key, order) for t in scores])
        by_tensor = gather_over(counts, group).t()  # [tensors, ranks]: the order in which ties are taken
        earlier = by_tensor.reshape(-1).cumsum(0).view_as(by_tensor) - by_tensor
        quotas = (cut.take - earlier[:, rank_in(group)]).tolist()
    return [_mask(t, cut.key, quota, order) for t, quota in zip(scores, quotas, strict=True)]


def top_mask(
    scores: Sequence[Tensor], k: int, group: dist.ProcessGroup | None = None, order: Order = "largest"
) -> list[Tensor]:
    """Bool masks of the first `k` scores in `order`: `find_cut`, then `cut_mask`; all False for `k` = 0."""
    if k == 0:
        return [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in scores]
    return cut_mask(scores, find_cut(scores, k, group, order), group, order)


def _keys(scores: Tensor, order: Order) -> Iterator[Tensor]:
    """Chunks of int32 keys, in flat order, that are larger for scores that come earlier in `order`."""
    if scores.dtype != torch.float32:
        raise ValueError(f"scores are {scores.dtype}; allowed: torch.float32")
    for chunk in torch.split(scores.reshape(-1), CHUNK):
        yield _mirrored(chunk.view(torch.int32), order)


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


def _count(scores: Tensor, key: int, order: Order) -> Tensor:
    """How many scores have exactly this key: int64 []."""
    count = torch.zeros((), dtype=torch.int64, device=scores.device)
    for keys in _keys(scores, order):
        count += (keys == key).count_nonzero()  # a bool sum() is 20 times slower on a CPU
    return count


def _mask(scores: Tensor, key: int, quota: int | None, order: Order) -> Tensor:
    """Everything before `key`, and the first `quota` of those equal to it (None: all of them)."""
    mask = torch.empty(scores.numel(), dtype=torch.bool, device=scores.device)
    seen = torch.zeros((), dtype=torch.int64, device=scores.device)  # on the device: no wait per chunk
    for out, keys in zip(torch.split(mask, CHUNK), _keys(scores, order), strict=True):
        torch.ge(keys, key, out=out) if quota is None else torch.gt(keys, key, out=out)
        if quota is not None and quota > 0:
            tied = keys == key
            out |= tied & (tied.cumsum(0) + seen <= quota)
            seen += tied.count_nonzero()
    return mask.view(scores.shape)
