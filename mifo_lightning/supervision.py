"""The demonstrations of one SFT optimizer step, packed, with the tokens that the loss sees."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mifo_lightning.data.question import Question
from mifo_lightning.distributed import sum_ranks
from mifo_lightning.policy import Sequences


@dataclass
class Demonstrations:
    """This rank's demonstrations of one SFT optimizer step.

    Attributes:
        sequences: [B] prompts with demonstrations.
        mask: [B, L] bool, all demonstration tokens.
        named: Masks [B, L] bool of tokens that a selection may be told to keep: `eos`, and `answer` where a marker
            (`data.answer_after`) says where answers begin.
        tokens: Demonstration tokens of the optimizer step over all ranks.
        selected: [B, L] bool, tokens that the loss sees.
        denominator: What the summed loss is divided by, over all micro-batches and ranks.
    """

    sequences: Sequences
    mask: Tensor
    named: dict[str, Tensor]
    tokens: float
    selected: Tensor = field(init=False)
    denominator: float = field(init=False)

    @classmethod
    def pack(
        cls, questions: list[Question], tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> "Demonstrations":
        """Pad the questions' demonstrations to tensors; collective, since tokens are counted over all ranks."""
        responses = [q.demonstration or [] for q in questions]
        sequences = Sequences.pack([q.prompt for q in questions], responses, int(tokenizer.pad_token_id)).to(device)
        mask = sequences.mask()
        columns = torch.arange(mask.shape[1], device=device)
        named = {"eos": columns == sequences.response_lengths[:, None] - 1}
        if any(q.answer_start is not None for q in questions):
            # no marker in this demonstration: its answer begins after its end
            starts = [
                len(r) if q.answer_start is None else q.answer_start for q, r in zip(questions, responses, strict=True)
            ]
            named["answer"] = mask & (columns >= torch.tensor(starts, device=device)[:, None])
        return cls(sequences, mask, named, float(sum_ranks([mask.sum()])[0]))

    def select(self, select_tokens: Any, entropy: Tensor | None) -> None:
        """Choose the tokens that the loss sees; all of them where there is no selection.

        Args:
            select_tokens: What `EntropyTokenSelection` put on the module, or None.
            entropy: [B, L] entropies in nats of the whole optimizer step on this rank.
        """
        if select_tokens is None:
            self.selected, self.denominator = self.mask, self.tokens
        else:
            assert entropy is not None
            self.selected, self.denominator = select_tokens(entropy, self.mask, named=self.named)
