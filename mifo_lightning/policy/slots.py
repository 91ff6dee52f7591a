"""Keys and values of rows that are being decoded: two tensors a layer, allocated once; rows leave and others enter."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from mifo_lightning.policy.prefix import ALIKE, cannot_share
from mifo_lightning.policy.rows import padded_left

if TYPE_CHECKING:
    from mifo_lightning.policy.policy import Policy

PREFILL = 16384  # prompt tokens, padding included, that run at once: bounds what a prefill needs beside the cache
FAR = 1024  # columns: how far ahead of a row others are in the trial; GPT-Neo's local layers look back 256


class Slots:
    """Rows in slots: each writes at a place of its own, and nothing is copied from token to token.

    Prompts are padded on the left to the longest that enters with them; the tokens of a row follow without a gap.
    Rows in the batch are slots `0 .. n`. Under autocast keys and values lie in its dtype, in which attention reads
    them.

    Args:
        policy: The model; one whose `decoding.slots` is true.
        slots: S, most rows at once.
        width: W, most tokens of a row with its padding.
        pad: Token id that fills prompts up.
    """

    joins = drops = True

    def __init__(self, policy: "Policy", slots: int, width: int, pad: int) -> None:
        self.policy, self.slots, self.width, self.pad, self.n = policy, slots, width, pad, 0
        device = policy.device
        self.row = torch.arange(slots, device=device)
        self.attention = torch.zeros(slots, width, dtype=torch.long, device=device)  # [S, W], 1 where a token lies
        self.start = torch.zeros(slots, dtype=torch.long, device=device)  # [S] columns of padding
        self.filled = torch.zeros(slots, dtype=torch.long, device=device)  # [S] columns that are taken
        self.even = True  # whether `filled` is the same in all rows, `columns` then, and is left alone
        self.padded = False
        self.place: int | Tensor = 0  # the column, or that of each row, where the token under way is written
        self.columns = 0  # most columns that are taken in a row
        self.cache: Any = None

    def enter(self, prompts: list[list[int]], samples: int) -> Tensor:
        """See `Rows.enter`; prompts run once each, so many at once that a prefill stays small."""
        width = max(map(len, prompts))
        at_once = max(1, PREFILL // width)
        parts = [self._enter(prompts[i : i + at_once], samples, width) for i in range(0, len(prompts), at_once)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _enter(self, prompts: list[list[int]], samples: int, width: int) -> Tensor:
        ids, attention, positions = padded_left(prompts, self.pad, self.policy.device, width)
        new = slice(self.n, self.n + len(prompts) * samples)
        logits, cache = self.policy.decode(ids, None, attention, positions)
        if self.cache is None:
            self.cache = Cache(layers=[_Layer(self, layer) for layer in cache.layers])
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            mine.take(theirs, new, samples)
        if self.even and self.n and width != self.columns:
            self.filled[: self.n], self.even = self.columns, False
        self.even, self.padded = self.even or not self.n, (self.padded and self.n > 0) or attention is not None
        self.columns = max(self.columns, width) if self.n else width
        self.filled[new], self.start[new], self.attention[new] = width, 0, 0
        if attention is not None:
            self.start[new] = (width - attention.sum(-1)).repeat_interleave(samples)
        self.attention[new, :width] = 1 if attention is None else attention.repeat_interleave(samples, 0)
        self.n = new.stop
        return logits.repeat_interleave(samples, 0)

    def step(self, token: Tensor) -> Tensor:
        """See `Rows.step`."""
        n = self.n
        if self.even:
            self.place = self.columns
            positions = self.place - self.start[:n]
            self.attention[:n, self.place] = 1
        else:
            # a row that has ended and is still here may be at its end
            self.place = self.filled[:n].clamp_max(self.width - 1)
            positions = self.place - self.start[:n]
            self.filled[:n] += 1
            self.attention[self.row[:n], self.place] = 1
        self.columns = min(self.columns + 1, self.width)
        whole = self.even and not self.padded
        attention = None if whole else self.attention[:n, : self.columns]
        logits, _ = self.policy.decode(token[:, None], self.cache, attention, positions[:, None])
        return logits

    def keep(self, rows: Tensor) -> None:
        """See `Rows.keep`; only rows that change their slot are copied."""
        self.n = len(rows)
        to = (rows != self.row[: self.n]).nonzero()[:, 0]
        came = rows[to]
        held = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        for tensor in (*(t[:, :, : self.columns] for t in held), self.attention, self.start, self.filled):
            tensor[to] = tensor[came]
        if not self.even and self.n:
            self.columns = min(int(self.filled[: self.n].max()), self.width)


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [S, heads, W, width of a head] each."""

    is_sliding = False

    def __init__(self, slots: Slots, like: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.is_initialized = slots, True
        self.keys, self.values = (self._room(x) for x in (like.keys, like.values))

    def _room(self, like: Tensor) -> Tensor:
        device = like.device.type
        autocast = torch.is_autocast_enabled(device) and like.dtype == torch.float32
        shape = self.slots.slots, like.shape[1], self.slots.width, like.shape[3]
        # zeros: what is masked counts nothing, but nothing times a stray NaN is NaN
        return like.new_zeros(shape, dtype=torch.get_autocast_dtype(device) if autocast else like.dtype)

    def take(self, layer: Any, new: slice, samples: int) -> None:
        """Copy prefilled prompts, each into the slots of its samples."""
        for room, states in ((self.keys, layer.keys), (self.values, layer.values)):
            assert room is not None
            part = room[new].unflatten(0, (len(states), samples))
            part[:, :, :, : states.shape[2]] = states[:, None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to be made."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row; keys and values so far [n, heads, columns, width of a head]."""
        slots, found = self.slots, []
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            assert room is not None
            if isinstance(slots.place, int):
                room[: slots.n, :, slots.place] = states[:, :, 0]
            else:
                room[slots.row[: slots.n], :, slots.place] = states[:, :, 0].to(room.dtype)
            found.append(room[: slots.n, :, : slots.columns])
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention sees, and where they begin."""
        return self.slots.columns, 0

    def get_seq_length(self) -> int:
        """Columns before the token under way."""
        return self.slots.columns - 1

    def get_max_length(self) -> int:
        """Most columns."""
        return self.slots.width


@torch.no_grad()
def decodes_in_slots(policy: "Policy") -> bool:
    """Whether slots give the model's own logits: tried with rows that enter, move and write at different places.

    And with one that others are far ahead of: layers that look back so many columns, counted from the last column of
    the batch, do not see it, whatever its attention mask says.
    """
    decoding, model = policy.decoding, policy.model
    if not (decoding.movable and decoding.padded and decoding.argument == "past_key_values") or cannot_share(model):
        return False
    try:
        found, wanted = _tried(policy)
    except Exception:  # whatever a model's own code raises: the path of every family is left
        return False
    return bool(found.isfinite().all() and (found - wanted).norm() <= ALIKE * wanted.norm())


def _tried(policy: "Policy") -> tuple[Tensor, Tensor]:
    """[N, V] logits of some rows by slots, and of each row alone in one forward pass."""
    first, second = [0, 1, 2, 3], [3, 1]
    slots = Slots(policy, 3, 8, 0)
    told = [slots.enter([first, second], 1)]
    ids = torch.tensor([2, 1], device=policy.device)
    told.append(slots.step(ids))
    slots.keep(torch.tensor([1], device=policy.device))  # the second moves into the first's place
    told += [slots.enter([[2, 0, 1]], 1), slots.step(torch.tensor([0, 3], device=policy.device))]
    behind = Slots(policy, 1, FAR, 0)
    behind.enter([first], 1)
    behind.even, behind.columns = False, FAR - 1  # as if another row had come so far
    told.append(behind.step(ids[:1]))
    rows = [first, second, [*first, 2], [*second, 1], [2, 0, 1], [*second, 1, 0], [2, 0, 1, 3], [*first, 2]]
    alone = [policy.decode(torch.tensor([row], device=policy.device), None, None, None)[0] for row in rows]
    return torch.cat(told).float(), torch.cat(alone).float()
