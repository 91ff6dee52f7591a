"""The engine that decodes with the training weights in the training process."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from mifo_lightning.ending import end_tokens
from mifo_lightning.policy import Policy
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.sampler import next_token, uniforms

STOP_SLACK = 32  # tokens decoded beyond the bytes of a stop string, since some tokens hold no text


class InProcessEngine:
    """Decodes with a key-value cache: one prefill per question, finished rows leave the batch.

    Args:
        rows: Most responses decoded at once; bounds memory, does not change results.
    """

    def __init__(self, rows: int = 512) -> None:
        self.rows = rows

    def generate(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        keys: list[int],
        samples: int,
        sampling: Sampling,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        done: list[list[Completion]] = []
        at_once = max(1, self.rows // samples)
        with policy.sampling():
            for i in range(0, len(prompts), at_once):
                decoding = _Decoding(policy, tokenizer, sampling, samples)
                done += decoding.run(prompts[i : i + at_once], keys[i : i + at_once])
        return done


class _Decoding:
    """One batch being decoded; `alive` maps the rows still in the batch to all rows."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, samples: int) -> None:
        self.policy, self.tokenizer, self.sampling, self.samples = policy, tokenizer, sampling, samples
        self.ends = torch.tensor(sorted(end_tokens(tokenizer)), device=policy.device)
        self.cache = DynamicCache(config=policy.model.config)
        self.attention: Tensor | None = None  # [rows, tokens so far], 0 at padding; None where nothing is padded

    @torch.no_grad()
    def run(self, prompts: list[list[int]], keys: list[int]) -> list[list[Completion]]:
        device, limit = self.policy.device, self.sampling.max_new_tokens
        logits = self._prefill(prompts, device)
        n = len(prompts) * self.samples
        tokens = torch.full((n, limit), int(self.tokenizer.pad_token_id), device=device)
        logp = torch.zeros(n, limit, device=device)
        lengths = torch.full((n,), limit, device=device)
        finished = torch.zeros(n, dtype=torch.bool, device=device)
        # the last rollout index is folded into the key, so that a group's size does not change its first members
        row_keys = (torch.tensor(keys, device=device)[:, None] + torch.arange(self.samples, device=device)).flatten()
        alive = torch.arange(n, device=device)
        for step in range(limit):
            token, token_logp = next_token(logits, uniforms(row_keys[alive], step), self.sampling)
            tokens[alive, step], logp[alive, step] = token, token_logp
            ended = self._ended(tokens[alive, : step + 1], token) & ~finished[alive]
            finished[alive[ended]] = True
            lengths[alive[ended]] = step + 1
            running = ~finished[alive]
            if step + 1 == limit or not running.any():
                break
            # dropping rows copies the cache: worth it once an eighth of the batch has finished
            if running.sum() <= 0.875 * len(alive):
                alive, token = alive[running], token[running]
                self.cache.batch_select_indices(running.nonzero()[:, 0])
                if self.attention is not None:
                    self.attention = self.attention[running]
            logits = self._step(token)
        rows = [
            Completion(t[:n], p[:n], f)
            for t, p, n, f in zip(tokens.tolist(), logp.tolist(), lengths.tolist(), finished.tolist(), strict=True)
        ]
        return [rows[i : i + self.samples] for i in range(0, len(rows), self.samples)]

    def _prefill(self, prompts: list[list[int]], device: torch.device) -> Tensor:
        """Run each prompt once, then repeat cache and logits for its samples; [rows, V] fp32."""
        width = max(map(len, prompts))
        pad = int(self.tokenizer.pad_token_id)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        positions = None
        if any(len(p) < width for p in prompts):
            lengths = torch.tensor([[len(p)] for p in prompts], device=device)
            columns = torch.arange(width, device=device)
            self.attention = (columns >= width - lengths).long()
            positions = (columns - (width - lengths)).clamp_min(0)
        out = self.policy.decode(
            input_ids=ids, attention_mask=self.attention, position_ids=positions, past_key_values=self.cache
        )
        self.cache.batch_repeat_interleave(self.samples)
        if self.attention is not None:
            self.attention = self.attention.repeat_interleave(self.samples, 0)
        return out.logits[:, -1].float().repeat_interleave(self.samples, 0)

    def _step(self, token: Tensor) -> Tensor:
        """Feed one token per row; the next logits [rows, V] fp32."""
        positions = None
        if self.attention is not None:
            positions = self.attention.sum(-1, keepdim=True)
            self.attention = torch.cat([self.attention, torch.ones_like(token)[:, None]], 1)
        out = self.policy.decode(
            input_ids=token[:, None],
            attention_mask=self.attention,
            position_ids=positions,
            past_key_values=self.cache,
        )
        return out.logits[:, -1].float()

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
