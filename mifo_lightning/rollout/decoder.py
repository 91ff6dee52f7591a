"""Decoding many responses token by token: which rows are in the batch, what they drew, when they leave."""

from collections import deque
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mifo_lightning.checkpoints import safe_points
from mifo_lightning.policy.ending import end_tokens
from mifo_lightning.policy.policy import Policy
from mifo_lightning.policy.rows import Rows
from mifo_lightning.rollout.engine import Completion, Decoded, Listener, Sampling
from mifo_lightning.rollout.sampler import next_token, uniforms

TURNS = 16  # tokens between two looks at whether the run is to stop
STOP_SLACK = 32  # tokens decoded beyond the bytes of a stop string, since some tokens hold no text


class Job(NamedTuple):
    """Of the prompt at some position the samples of some numbers; they enter the batch together."""

    prompt: int
    samples: range


def jobs(prompts: list[list[int]], samples: int, most: int, padded: bool) -> list[Job]:
    """All samples of all prompts: prompts in order, or first those of one length; at most so many samples each."""
    together: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        together.setdefault(0 if padded else len(prompt), []).append(i)
    parts = [range(first, min(first + most, samples)) for first in range(0, samples, most)]
    return [Job(i, part) for chosen in together.values() for i in chosen for part in parts]


class Decoder:
    """Decodes jobs in the order given: rows that are done leave and the next enter, where the model's rows can.

    Args:
        policy: The model with its current weights.
        tokenizer: Knows the end tokens; decodes for stop strings.
        sampling: How to draw.
        rows: What the model remembers of the batch.
        size: S, most rows at once; no job has more.
        listener: Is told how far it is.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        rows: Rows,
        size: int,
        listener: Listener | None,
    ) -> None:
        self.policy, self.tokenizer, self.sampling = policy, tokenizer, sampling
        self.rows, self.size, self.listener = rows, size, listener
        device, limit = policy.device, sampling.max_new_tokens
        self.ends = torch.tensor(sorted(end_tokens(tokenizer)), device=device)
        self.row = torch.arange(size, device=device)
        # of each row in the batch; a row that is done and still here writes on, one place further
        self.tokens = torch.zeros(size, limit + 1, dtype=torch.long, device=device)
        self.logp = torch.zeros(size, limit + 1, device=device)
        self.length = torch.zeros(size, dtype=torch.long, device=device)
        self.key = torch.zeros(size, dtype=torch.long, device=device)
        self.finished = torch.zeros(size, dtype=torch.bool, device=device)
        self.who: list[tuple[int, int]] = []  # the prompt and number of each row
        self.since: list[int] = []  # the turn in which it entered

    @torch.no_grad()
    def run(self, prompts: list[list[int]], keys: list[int], samples: int, work: list[Job]) -> list[list[Completion]]:
        """The responses of each prompt, in order."""
        pending, done = deque(work), dict[tuple[int, int], Completion]()
        asked, drawn = len(prompts) * samples, 0
        self._tell(done, asked, 0, 0)
        logits = self._enter(self._next(pending, prompts), prompts, keys, 0)
        for turn in count():
            if turn % TURNS == 0:
                safe_points.poll()
            token, ended = self._draw(logits)
            drawn += len(token)
            leaving, entering = int(ended.sum()), list[Job]()
            if leaving >= len(token) / 8 if self.rows.drops else leaving == len(token):
                token = token[self._leave(ended, done)]
                if self.rows.joins or not self.who:
                    entering = self._next(pending, prompts)
            self._tell(done, asked, turn + 1, drawn)
            following = [self.rows.step(token)] if self.who else []
            if entering:
                following.append(self._enter(entering, prompts, keys, turn + 1))
            if not following:
                break
            logits = following[0] if len(following) == 1 else torch.cat(following)
        return [[done[i, k] for k in range(samples)] for i in range(len(prompts))]

    def _next(self, pending: deque[Job], prompts: list[list[int]]) -> list[Job]:
        """The next jobs, as many as there is room for and as can run together."""
        found, room = list[Job](), self.size - len(self.who)
        while pending and len(pending[0].samples) <= room and (not found or self._alike(found[0], pending[0], prompts)):
            found.append(pending.popleft())
            room -= len(found[-1].samples)
        return found

    def _enter(self, entering: list[Job], prompts: list[list[int]], keys: list[int], turn: int) -> Tensor:
        """Let jobs in; logits [rows of theirs, V]."""
        who = [(job.prompt, k) for job in entering for k in job.samples]
        new = slice(len(self.who), len(self.who) + len(who))
        self.who += who
        self.since += [turn] * len(who)
        # the number is added to the key, so that a group's size does not change its first members
        self.key[new] = torch.tensor([keys[i] for i, _ in who]) + torch.tensor([k for _, k in who])  # may wrap around
        self.length[new], self.finished[new] = 0, False
        return self.rows.enter([prompts[job.prompt] for job in entering], len(entering[0].samples))

    def _alike(self, a: Job, b: Job, prompts: list[list[int]]) -> bool:
        same_length = self.policy.decoding.padded or len(prompts[a.prompt]) == len(prompts[b.prompt])
        return len(a.samples) == len(b.samples) and same_length

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a token a row, [n] int64; and [n] bool which rows are done."""
        n = len(self.who)
        row, length, finished = self.row[:n], self.length[:n], self.finished[:n]
        token, logp = next_token(logits, uniforms(self.key[:n], length), self.sampling)
        self.tokens[row, length], self.logp[row, length] = token, logp
        running = ~finished & (length < self.sampling.max_new_tokens)
        length += running
        finished |= running & self._ended(token)
        return token, finished | (length == self.sampling.max_new_tokens)

    def _ended(self, token: Tensor) -> Tensor:
        """Which rows end with this token: an end token, or one that completes a stop string."""
        ended = torch.isin(token, self.ends)
        if self.sampling.stop:
            # a token holds a byte or more of the string, if any text
            window = max(len(stop.encode()) for stop in self.sampling.stop) + STOP_SLACK
            n, lengths = len(token), self.length[: len(token)].tolist()
            so_far = [row[max(0, k - window) : k] for row, k in zip(self.tokens[:n].tolist(), lengths, strict=True)]
            tails = self.tokenizer.batch_decode(so_far, clean_up_tokenization_spaces=False)
            hit = [any(stop in tail for stop in self.sampling.stop) for tail in tails]
            ended = ended | torch.tensor(hit, device=token.device)
        return ended

    def _leave(self, ended: Tensor, done: dict[tuple[int, int], Completion]) -> Tensor:
        """Rows that are done leave, and the last ones take their places; which rows stay, in their order now."""
        out = ended.nonzero()[:, 0]
        parts = (self.tokens[out], self.logp[out], self.length[out], self.finished[out])
        for i, t, p, k, f in zip(out.tolist(), *(part.tolist() for part in parts), strict=True):
            done[self.who[i]] = Completion(t[:k], p[:k], f)
        stay = (~ended).nonzero()[:, 0]
        m = len(stay)
        order = self.row[:m].clone()
        order[ended[:m]] = stay[stay >= m]
        for tensor in (self.tokens, self.logp, self.length, self.finished, self.key):
            tensor[:m] = tensor[order]
        self.who, self.since = ([held[i] for i in order.tolist()] for held in (self.who, self.since))
        self.rows.keep(order)
        return order

    def _tell(self, done: dict[tuple[int, int], Completion], asked: int, turn: int, drawn: int) -> None:
        if self.listener is not None:
            longest = turn - min(self.since, default=turn)
            self.listener(Decoded(len(done), asked, longest, self.sampling.max_new_tokens, drawn))
