"""The engine that decodes with the training weights in the training process."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mifo_lightning.checkpoints import safe_points
from mifo_lightning.common.errors import InputError, TrainingError, out_of_memory
from mifo_lightning.policy.ending import end_tokens, padding
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.engine import Completion, Decoded, Listener, RolloutEngine, Sampling
from mifo_lightning.rollout.sampler import next_token, uniforms

BLOCK = 16  # tokens between two looks at whether the run is to stop
STOP_SLACK = 32  # tokens decoded beyond the bytes of a stop string, since some tokens hold no text


class InProcessEngine(RolloutEngine):
    """Decodes with the model's cache: one prefill per question, finished rows leave the batch.

    A model whose cache cannot do that prefills every row and keeps all of them; one that cannot be padded decodes
    prompts of equal length together. Responses do not depend on it.

    A call that runs out of memory begins anew with half the rows, as often as needed, and so do all later calls; the
    first time is told. Its result is to the bit that of a call with so few rows.

    Args:
        rows: Most responses decoded at once; bounds memory, does not change responses.

    Raises:
        InputError: There is no such number of rows.
    """

    def __init__(self, rows: int = 512) -> None:
        if rows < 1:
            raise InputError(f"model.rollout.engine.init_args.rows: {rows} is not allowed; it must be at least 1")
        self.rows = rows
        self.listener: Listener | None = None
        self._halved = False

    def generate(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        keys: list[int],
        samples: int,
        sampling: Sampling,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            TrainingError: There is no memory for a single row.
        """
        with policy.sampling():  # entered once: ranks may begin anew each by itself
            while True:
                try:
                    return self._draw(policy, tokenizer, prompts, keys, samples, sampling)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    problem = str(error).splitlines()[0]
                # only here, after the exception with its frames, is the memory of the failed try free
                self._halve(min(self.rows, len(prompts) * samples), problem)

    def _draw(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        keys: list[int],
        samples: int,
        sampling: Sampling,
    ) -> list[list[Completion]]:
        done: list[list[Completion]] = [[] for _ in prompts]
        asked, tokens = len(prompts) * samples, 0

        def tell(step: int, rows: int) -> None:
            nonlocal tokens
            tokens += rows
            if self.listener is not None:
                self.listener(Decoded(sum(map(len, done)), asked, step, sampling.max_new_tokens, tokens))

        tell(0, 0)
        for batch in _batches(prompts, self.rows, samples, policy.decoding.padded):
            decoding = _Decoding(policy, tokenizer, sampling, batch.samples, tell)
            drawn = decoding.run([prompts[i] for i in batch.prompts], [keys[i] for i in batch.prompts])
            for i, completions in zip(batch.prompts, drawn, strict=True):
                done[i] += completions
        return done

    def _halve(self, rows: int, problem: str) -> None:
        """Half of the `rows` that were too many."""
        if rows <= 1:
            raise TrainingError(
                f"out of memory while decoding a single response: {problem:.200}; lower max_new_tokens, or take a "
                "smaller model or a larger device"
            )
        self.rows = rows // 2
        torch.cuda.empty_cache()
        if not self._halved:  # on whichever rank it is
            warnings.warn(
                f"out of memory while decoding {rows} responses at once: this call begins anew with {self.rows}, and "
                "so on if need be; set engine rows (model.rollout.engine.init_args.rows of InProcessEngine) that low "
                "to save the time",
                stacklevel=2,
            )
        self._halved = True

    def state_dict(self) -> dict[str, int]:
        """The rows that memory left, so that a resumed run decodes in the same batches; empty where all fitted."""
        return {"rows": self.rows} if self._halved else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Decode no more rows than that."""
        self.rows = min(self.rows, state.get("rows", self.rows))
        self._halved = bool(state)


class _Batch(NamedTuple):
    """What is decoded together: of the prompts at some positions the samples of some numbers."""

    prompts: list[int]
    samples: range


def _batches(prompts: list[list[int]], rows: int, samples: int, padded: bool) -> Iterator[_Batch]:
    """At most `rows` rows each: prompts in order, or those of equal length; or a part of one prompt's samples."""
    together: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        together.setdefault(0 if padded else len(prompt), []).append(i)
    size, part = max(1, rows // samples), min(rows, samples)
    for chosen in together.values():
        for i in range(0, len(chosen), size):
            for first in range(0, samples, part):
                yield _Batch(chosen[i : i + size], range(first, min(first + part, samples)))


class _Decoding:
    """One batch being decoded; `alive` maps the rows still in the batch to all rows."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        samples: range,
        tell: Callable[[int, int], None],
    ) -> None:
        self.policy, self.tokenizer, self.sampling = policy, tokenizer, sampling
        self.numbers, self.samples = samples, len(samples)  # which of a prompt's samples, and how many
        self.tell = tell  # the token's place in the response, and in how many rows it was drawn
        self.ends = torch.tensor(sorted(end_tokens(tokenizer)), device=policy.device)
        self.cache: Any = None  # the model makes its own
        self.attention: Tensor | None = None  # [rows, tokens so far], 0 at padding; None where nothing is padded
        self.seen = 0  # tokens in the cache, padding included

    @torch.no_grad()
    def run(self, prompts: list[list[int]], keys: list[int]) -> list[list[Completion]]:
        device, limit = self.policy.device, self.sampling.max_new_tokens
        logits = self._prefill(prompts, device)
        n = len(prompts) * self.samples
        tokens = torch.full((n, limit), padding(self.tokenizer), device=device)
        logp = torch.zeros(n, limit, device=device)
        lengths = torch.full((n,), limit, device=device)
        finished = torch.zeros(n, dtype=torch.bool, device=device)
        # the last rollout index is folded into the key, so that a group's size does not change its first members
        row_keys = (torch.tensor(keys, device=device)[:, None] + torch.tensor(self.numbers, device=device)).flatten()
        alive = torch.arange(n, device=device)
        for step in range(limit):
            if step % BLOCK == 0:
                safe_points.poll()
            token, token_logp = next_token(logits, uniforms(row_keys[alive], step), self.sampling)
            tokens[alive, step], logp[alive, step] = token, token_logp
            ended = self._ended(tokens[alive, : step + 1], token) & ~finished[alive]
            finished[alive[ended]] = True
            lengths[alive[ended]] = step + 1
            running = ~finished[alive]
            self.tell(step + 1, len(alive))
            if step + 1 == limit or not running.any():
                break
            # dropping rows copies the cache: worth it once an eighth of the batch has finished
            if self.policy.decoding.movable and running.sum() <= 0.875 * len(alive):
                alive, token = alive[running], token[running]
                self.cache.reorder_cache(running.nonzero()[:, 0])
                if self.attention is not None:
                    self.attention = self.attention[running]
            logits = self._step(token)
        rows = [
            Completion(t[:n], p[:n], f)
            for t, p, n, f in zip(tokens.tolist(), logp.tolist(), lengths.tolist(), finished.tolist(), strict=True)
        ]
        return [rows[i : i + self.samples] for i in range(0, len(rows), self.samples)]

    def _prefill(self, prompts: list[list[int]], device: torch.device) -> Tensor:
        """Run the prompts, each once if the cache can be repeated for its samples; [rows, V] fp32."""
        movable, samples = self.policy.decoding.movable, self.samples
        if not movable:
            prompts = [p for p in prompts for _ in range(samples)]
        width = max(map(len, prompts))
        pad = padding(self.tokenizer)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        positions = None
        if any(len(p) < width for p in prompts):
            lengths = torch.tensor([[len(p)] for p in prompts], device=device)
            columns = torch.arange(width, device=device)
            self.attention = (columns >= width - lengths).long()
            positions = (columns - (width - lengths)).clamp_min(0)
        logits = self._decode(ids, positions)
        self.seen = width
        if movable:
            rows = torch.arange(len(prompts), device=device).repeat_interleave(samples)
            self.cache.reorder_cache(rows)
            logits = logits[rows]
            self.attention = None if self.attention is None else self.attention[rows]
        return logits

    def _step(self, token: Tensor) -> Tensor:
        """Feed one token per row; the next logits [rows, V] fp32."""
        if self.attention is None:
            positions = torch.full_like(token, self.seen)[:, None]
        else:
            positions = self.attention.sum(-1, keepdim=True)
            self.attention = torch.cat([self.attention, torch.ones_like(token)[:, None]], 1)
        self.seen += 1
        return self._decode(token[:, None], positions)

    def _decode(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """One forward pass that reads and extends the cache; logits [rows, V] fp32 of the last position."""
        logits, self.cache = self.policy.decode(ids, self.cache, self.attention, positions)
        return logits.float()

    def _ended(self, so_far: Tensor, token: Tensor) -> Tensor:
        """Which rows end with this token: an end token, or one that completes a stop string."""
        ended = torch.isin(token, self.ends)
        if self.sampling.stop:
            # a token holds a byte or more of the string, if any text
            window = max(len(stop.encode()) for stop in self.sampling.stop) + STOP_SLACK
            tails = self.tokenizer.batch_decode(so_far[:, -window:], clean_up_tokenization_spaces=False)
            hit = [any(stop in tail for stop in self.sampling.stop) for tail in tails]
            ended = ended | torch.tensor(hit, device=token.device)
        return ended
