"""What a model remembers of the rows that it decodes, as the engine drives it: rows enter, step and leave."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mifo_lightning.policy.policy import Policy


class Rows(Protocol):
    """A batch of rows being decoded.

    Attributes:
        n: Rows in it.
        joins: Whether rows may enter while others are there.
        drops: Whether some may leave before all are done.
    """

    n: int
    joins: bool
    drops: bool

    def enter(self, prompts: list[list[int]], samples: int) -> Tensor:
        """Run the prompts; `samples` rows of each follow the rows that are there.

        Returns:
            [prompts * samples, V] logits of their first response tokens.
        """

    def step(self, token: Tensor) -> Tensor:
        """Feed one token a row, [n] int64; the next logits [n, V]."""

    def keep(self, rows: Tensor) -> None:
        """These rows, [m] int64, stay, in this order."""


class Growing:
    """Rows in the cache that the model makes, which grows by a copy at each token: right for every family."""

    joins = False

    def __init__(self, policy: "Policy", pad: int) -> None:
        self.policy, self.pad, self.n, self.drops = policy, pad, 0, policy.decoding.movable
        self.cache: Any = None
        self.attention: Tensor | None = None  # [n, tokens so far], 0 at padding; None where nothing is padded
        self.seen = 0  # tokens in the cache, padding included

    def enter(self, prompts: list[list[int]], samples: int) -> Tensor:
        """See `Rows.enter`; each prompt runs once if the cache can be repeated for its samples."""
        if not self.drops:
            prompts = [p for p in prompts for _ in range(samples)]
        ids, self.attention, positions = padded_left(prompts, self.pad, self.policy.device)
        logits, self.cache = self.policy.decode(ids, None, self.attention, positions)
        self.n, self.seen = len(prompts), ids.shape[1]
        if self.drops:
            rows = torch.arange(self.n, device=ids.device).repeat_interleave(samples)
            logits = logits[rows]
            self.keep(rows)
        return logits

    def step(self, token: Tensor) -> Tensor:
        """See `Rows.step`."""
        if self.attention is None:
            positions = torch.full_like(token, self.seen)[:, None]
        else:
            positions = self.attention.sum(-1, keepdim=True)
            self.attention = torch.cat([self.attention, torch.ones_like(token)[:, None]], 1)
        self.seen += 1
        logits, self.cache = self.policy.decode(token[:, None], self.cache, self.attention, positions)
        return logits

    def keep(self, rows: Tensor) -> None:
        """See `Rows.keep`."""
        self.n = len(rows)
        if self.n:
            self.cache.reorder_cache(rows)
            self.attention = None if self.attention is None else self.attention[rows]


def padded_left(
    prompts: list[list[int]], pad: int, device: torch.device, width: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[B, T] int64 token ids, attention and positions of prompts; the last two None where nothing is padded."""
    width = width or max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    if all(len(p) == width for p in prompts):
        return ids, None, None
    padding = width - torch.tensor([[len(p)] for p in prompts], device=device)
    columns = torch.arange(width, device=device)
    return ids, (columns >= padding).long(), (columns - padding).clamp_min(0)
