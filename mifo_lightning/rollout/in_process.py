"""The engine that decodes with the training weights in the training process."""

import warnings

import torch
from transformers import PreTrainedTokenizerBase

from mifo_lightning.common.errors import TrainingError, out_of_memory, require
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.policy import Policy
from mifo_lightning.policy.rows import Growing, Rows
from mifo_lightning.policy.slots import Slots
from mifo_lightning.rollout.decoder import Decoder, jobs
from mifo_lightning.rollout.engine import Completion, Listener, RolloutEngine, Sampling


class InProcessEngine(RolloutEngine):
    """Decodes with the training weights: one prefill per question, finished rows leave the batch and others enter.

    Keys and values lie in slots of `longest prompt + max_new_tokens` tokens that are allocated once a call; what a
    call holds is bounded by `cache_tokens` of them. A model whose own logits slots do not give (seen at load) decodes
    with its own cache, which grows: batch after batch, of equal length where it cannot be padded, and where rows
    cannot be dropped all stay. Responses do not depend on it.

    A call that runs out of memory begins anew with half the rows, as often as needed, and so do all later calls; the
    first time is told. Its result is to the bit that of a call with so few rows.

    Args:
        rows: Most responses decoded at once; bounds memory, does not change responses.
        cache_tokens: Most tokens whose keys and values are held at once, padding and what is still to come included;
            fewer rows are decoded at once where they would be more, down to a single one. A token takes 2 x layers x
            key-value heads x width of a head numbers, in the run's precision.

    Raises:
        InputError: There is no such number of rows or tokens.
    """

    def __init__(self, rows: int = 512, cache_tokens: int = 2**18) -> None:
        for name, value in (("rows", rows), ("cache_tokens", cache_tokens)):
            require(f"model.rollout.engine.init_args.{name}", value, value >= 1, "at least 1")
        self.rows, self.cache_tokens = rows, cache_tokens
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
        room = self.cache_tokens // (max(map(len, prompts), default=0) + sampling.max_new_tokens)
        with policy.sampling():  # entered by every rank, and once: ranks may begin anew each by itself
            while prompts:
                size = max(1, min(self.rows, room, len(prompts) * samples))
                try:
                    return self._draw(policy, tokenizer, prompts, keys, samples, sampling, size)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    problem = str(error).splitlines()[0]
                # only here, after the exception with its frames, is the memory of the failed try free
                self._halve(size, problem)
        return []

    def _draw(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        keys: list[int],
        samples: int,
        sampling: Sampling,
        size: int,
    ) -> list[list[Completion]]:
        decoding, width = policy.decoding, max(map(len, prompts)) + sampling.max_new_tokens
        pad = padding(tokenizer)
        rows: Rows = Slots(policy, size, width, pad) if decoding.slots else Growing(policy, pad)
        work = jobs(prompts, samples, min(size, samples), decoding.padded)
        return Decoder(policy, tokenizer, sampling, rows, size, self.listener).run(prompts, keys, samples, work)

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
