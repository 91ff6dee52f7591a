"""Log-probability and entropy from logits that never exist all at once: tiles of tokens x vocabulary, made twice."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mifo_lightning.policy.head import LogitTransform

CPU_TILE = (512, 1024)  # tokens, vocabulary entries: fp32 logits of 2 MiB, which stay in the second-level cache
GPU_TILE = (4096, 16384)  # 256 MiB: enough work for all of its cores


class Settings(NamedTuple):
    """What stands between hidden states and scores besides weights.

    Attributes:
        dtype: Of the products; sums are in fp32, or in fp64 where `dtype` is.
        temperature: Logits are divided by it.
        transform: What the model does to its head's outputs.
        entropy_gradient: Whether a gradient flows through the entropy.
        top_k: How many of each token's largest log-probabilities are kept.
    """

    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    transform: LogitTransform = LogitTransform()
    entropy_gradient: bool = False
    top_k: int = 0

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums."""
        return torch.promote_types(self.dtype, torch.float32)


class RunningScores(torch.autograd.Function):
    """`logp` and `entropy` [N], in nats, of tokens under softmax(transform(hidden W^T + b) / temperature).

    Where `top_k` is above 0 also `top` [N, min(top_k, V)], the largest log-probabilities, which have no gradient.

    Forward keeps a running maximum m, s = sum e^(x - m) and t = sum (x - m) e^(x - m) over the vocabulary: log Z =
    m + log s and H = log s - t / s. Backward makes each tile of logits again and turns it into its gradient in place;
    tokens without a gradient, as those that a selection leaves out, are left out of it.

    Arguments are hidden [N, D], weight [V, D], bias [V] or None, targets [N] int64, and `Settings`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: Settings
    ) -> tuple[Tensor, ...]:
        top = torch.full(targets.shape, torch.finfo(settings.wide).min, dtype=settings.wide, device=hidden.device)
        total, weighted, picked = (torch.zeros_like(top) for _ in range(3))
        largest = top[:, None].repeat(1, min(settings.top_k, len(weight)))
        for tile in _tiles(hidden, weight, bias, targets, settings):
            rows, logits = tile.rows, tile.logits
            picked[rows].index_copy_(0, tile.hits, logits[tile.hits, tile.hit_columns])
            if settings.top_k:
                found = logits.topk(min(settings.top_k, logits.shape[1])).values
                largest[rows] = torch.cat([largest[rows], found], 1).topk(largest.shape[1]).values
            highest = torch.maximum(top[rows], logits.amax(1))
            shift = top[rows] - highest
            e = torch.exp(logits.sub_(highest[:, None]), out=tile.spare)
            # the weighted sum first: it takes the total that belongs to the old maximum
            weighted[rows] = (weighted[rows] + total[rows] * shift) * shift.exp() + logits.mul_(e).sum(1)
            total[rows] = total[rows] * shift.exp() + e.sum(1)
            top[rows] = highest
        spread = total.log()
        entropy = (spread - weighted / total).clamp_min_(0.0)  # rounding can push a certain token just below zero
        ctx.save_for_backward(hidden, weight, bias, targets, top + spread, entropy)
        ctx.settings = settings
        others = [largest - (top + spread)[:, None]] if settings.top_k else []
        ctx.mark_non_differentiable(*([] if settings.entropy_gradient else [entropy]), *others)
        return picked - top - spread, entropy, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: Tensor, of_entropy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        settings: Settings = ctx.settings
        used = (of_logp != 0) | (of_entropy != 0) if settings.entropy_gradient else of_logp != 0
        places = used.nonzero()[:, 0]
        kept = [t[places] for t in (hidden, targets, log_z, entropy, of_logp, of_entropy)]
        gradients = [
            torch.zeros(t.shape, dtype=settings.wide, device=t.device) if wanted else None
            for t, wanted in zip((kept[0], weight, bias), ctx.needs_input_grad, strict=False)
        ]
        for tile in _tiles(kept[0], weight, bias, kept[1], settings):
            _turn_into_gradient(tile, [t[tile.rows] for t in kept[2:]], settings)
            _accumulate(tile, *gradients)
        of_hidden, of_weight, of_bias = gradients
        if of_hidden is not None:
            of_hidden = torch.zeros_like(hidden).index_copy_(0, places, of_hidden.to(hidden.dtype))
        return of_hidden, _as(of_weight, weight), _as(of_bias, bias), None, None


class _Tile(NamedTuple):
    """Logits of the tokens `rows` at the entries `columns` of the vocabulary.

    `hits` are the rows whose target is among the columns, and `hit_columns` where; `hidden` [n, D] and `weight` [v, D]
    are what the product is of; `spare` is memory like `logits`, which live until the next tile.
    """

    rows: slice
    columns: slice
    hidden: Tensor
    weight: Tensor
    logits: Tensor
    spare: Tensor
    hits: Tensor
    hit_columns: Tensor


@torch.no_grad()
def _tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: Settings) -> Iterator[_Tile]:
    """All tiles, entries of the vocabulary outside: their weights are cast once, and their gradient is done with."""
    dtype, wide, device = settings.dtype, settings.wide, hidden.device
    height, width = CPU_TILE if device.type == "cpu" else GPU_TILE
    hidden = hidden.to(dtype)
    memory, spare, narrow = (
        torch.empty(min(height, len(hidden)) * width, dtype=t, device=device) for t in (wide, wide, dtype)
    )
    for column in range(0, len(weight), width):
        columns = slice(column, min(column + width, len(weight)))
        w = weight[columns].to(dtype)
        b = None if bias is None else bias[columns].to(dtype)
        for row in range(0, len(hidden), height):
            rows = slice(row, min(row + height, len(hidden)))
            h, shape = hidden[rows], (rows.stop - row, len(w))
            logits, product = (_shaped(t, shape) for t in (memory, memory if dtype == wide else narrow))
            with torch.autocast(device.type, enabled=False):
                torch.mm(h, w.t(), out=product) if b is None else torch.addmm(b, h, w.t(), out=product)
            if dtype != wide:
                logits.copy_(product)
            settings.transform.in_place(logits)
            if settings.temperature != 1.0:
                logits.div_(settings.temperature)
            place = targets[rows] - column
            hits = ((place >= 0) & (place < len(w))).nonzero()[:, 0]
            yield _Tile(rows, columns, h, w, logits, _shaped(spare, shape), hits, place[hits])


def _shaped(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    return memory[: shape[0] * shape[1]].view(shape)


def _turn_into_gradient(tile: _Tile, scores: Sequence[Tensor], settings: Settings) -> None:
    """Logits x become the loss's gradient by the head's outputs.

    By softmax: dlogp / dx_j = [j = target] - p_j and dH / dx_j = -p_j (log p_j + H). `scores` are log Z, H and the
    loss's gradients by logp and by H, [n].
    """
    x, transform = tile.logits, settings.transform
    log_z, entropy, of_logp, of_entropy = scores
    slope = transform.slope(x if settings.temperature == 1.0 else x * settings.temperature)
    of_logp, of_entropy = (g * (transform.scale / settings.temperature) for g in (of_logp, of_entropy))
    x.sub_(log_z[:, None])
    if settings.entropy_gradient:
        p = torch.exp(x, out=tile.spare)
        x.mul_(-of_entropy[:, None]).sub_((of_logp + of_entropy * entropy)[:, None]).mul_(p)
    else:
        x.exp_().mul_(-of_logp[:, None])
    x[tile.hits, tile.hit_columns] += of_logp[tile.hits]
    if slope is not None:
        x.mul_(slope)


def _accumulate(tile: _Tile, of_hidden: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None) -> None:
    """Add the gradients of a tile, whose logits are their own gradient now, where they are wanted."""
    of_outputs = tile.logits.to(tile.hidden.dtype)
    if of_hidden is not None:
        _add_product(of_hidden[tile.rows], of_outputs, tile.weight)
    if of_weight is not None:
        _add_product(of_weight[tile.columns], of_outputs.t(), tile.hidden)
    if of_bias is not None:
        of_bias[tile.columns] += tile.logits.sum(0)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    with torch.autocast(total.device.type, enabled=False):
        if a.dtype == total.dtype:
            torch.addmm(total, a, b, out=total)
        else:
            total.add_(a @ b)


def _as(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    return None if gradient is None or of is None else gradient.to(of.dtype)
