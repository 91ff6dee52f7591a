"""An SFT step without Lightning: demonstrations packed, the tokens that the loss sees, micro-batch by micro-batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mifo_callbacks.sharding import sum_over, world_group
from mifo_lightning.data.loader import WorkItem
from mifo_lightning.distributed import rank, ranks, sum_ranks
from mifo_lightning.errors import InputError
from mifo_lightning.losses.sft import SFTWeight, sft_loss, sft_weights
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.question import Question
from mifo_lightning.rollout.batch import score_without_gradient

INITIAL_ROWS = 64  # demonstrations packed together; bounds padding


class Supervision:
    """An SFT step without Lightning, one micro-batch after the other.

    Args:
        tokenizer: The model's.
        weight: What multiplies each demonstration token's cross-entropy.
        entropy_bonus: Weight of the policy's mean entropy on demonstration tokens, which is taken off the loss
            (ReLIFT).

    Attributes:
        initial_losses: [N] by question id, from `initial_losses`; None unless the weight is flow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, weight: SFTWeight, entropy_bonus: float = 0.0) -> None:
        self.tokenizer, self.weight, self.entropy_bonus = tokenizer, weight, entropy_bonus
        self.initial_losses: Tensor | None = None
        self._demonstrations: Demonstrations | None = None  # of the running optimizer step

    def begin(self, policy: Policy, loader: Any) -> None:
        """A run begins: measure the losses before training, if the weight wants them, of all `loader.questions`."""
        if self.weight == "flow":
            self.initial_losses = initial_losses(policy, loader.questions, padding(self.tokenizer))

    def go_on(self, losses: Tensor | None) -> None:
        """A run is resumed with the losses before training; raises InputError if they do not fit the weight."""
        if (losses is None) == (self.weight == "flow"):
            raise InputError(f"model.sft_weight: {self.weight} is not allowed; with flow a run begins and ends")
        self.initial_losses = losses

    def step(
        self, policy: Policy, item: WorkItem, select_tokens: Any, profile: Callable[[str], AbstractContextManager[None]]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """Loss, metrics and work of one micro-batch.

        Args:
            policy: The policy.
            item: SFT work.
            select_tokens: What `EntropyTokenSelection` put on the module, or None.
            profile: Times activities by name.
        """
        first, alone = item["micro"] == 0, item["micro_batches"] == 1
        if first:
            self._demonstrations = Demonstrations.pack(
                item["questions"], self.tokenizer, policy.device, self.initial_losses
            )
        demos = self._demonstrations
        assert demos is not None, "the loader begins every optimizer step with its first micro-batch"
        scored = 0
        if first and not alone:
            # the threshold belongs to the optimizer step: all entropies are needed before the first backward
            entropies = None
            if select_tokens is not None:
                scored = demos.sequences.token_count()
                with profile("entropies"):
                    entropies = score_without_gradient(policy, demos.sequences, temperature=1.0)[1]
            demos.select(select_tokens, entropies)
        rows = torch.arange(len(demos.mask), device=policy.device).tensor_split(item["micro_batches"])[item["micro"]]
        sequences = demos.sequences.select(rows)
        with profile("forward"):
            logp, entropy = policy(sequences, entropy_gradient=self.entropy_bonus > 0)
        if alone:
            demos.select(select_tokens, entropy.detach())
        loss, metrics = demos.loss(rows, logp, entropy, self.weight, self.entropy_bonus)
        shown = [item["questions"][i].id for i in rows.tolist()]
        work = {"generated": 0, "scored": scored, "trained": sequences.token_count(), "demonstrations": shown}
        return loss, metrics, work

    def let_go(self) -> None:
        """The optimizer step is over: keep no tensors of it."""
        self._demonstrations = None


@dataclass
class Demonstrations:
    """This rank's demonstrations of one SFT optimizer step.

    Attributes:
        sequences: [B] prompts with demonstrations.
        mask: [B, L] bool, all demonstration tokens.
        named: Masks [B, L] bool of tokens that a selection may be told to keep: `eos`, and `answer` where a marker
            (`data.answer_after`) says where answers begin.
        tokens: Demonstration tokens of the optimizer step over all ranks.
        initial: [B] loss of each demonstration before training in units of the median; None unless it is a weight.
        selected: [B, L] bool, tokens that the loss sees.
        denominator: What the summed loss is divided by, over all micro-batches and ranks.
    """

    sequences: Sequences
    mask: Tensor
    named: dict[str, Tensor]
    tokens: float
    initial: Tensor | None
    selected: Tensor = field(init=False)
    denominator: float = field(init=False)

    @classmethod
    def pack(
        cls,
        questions: list[Question],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        initial_losses: Tensor | None = None,
    ) -> "Demonstrations":
        """Pad the questions' demonstrations to tensors; collective, since tokens are counted over all ranks.

        Args:
            questions: This rank's questions, each with a demonstration.
            tokenizer: The model's.
            device: Where the tensors go.
            initial_losses: [N] by question id, from `initial_losses`.
        """
        responses = [q.demonstration or [] for q in questions]
        sequences = Sequences.pack([q.prompt for q in questions], responses, padding(tokenizer)).to(device)
        mask = sequences.mask()
        columns = torch.arange(mask.shape[1], device=device)
        named = {"eos": columns == sequences.response_lengths[:, None] - 1}
        if any(q.answer_start is not None for q in questions):
            # no marker in this demonstration: its answer begins after its end
            starts = [
                len(r) if q.answer_start is None else q.answer_start for q, r in zip(questions, responses, strict=True)
            ]
            named["answer"] = mask & (columns >= torch.tensor(starts, device=device)[:, None])
        initial = None if initial_losses is None else initial_losses[[q.id for q in questions]].to(device)
        return cls(sequences, mask, named, float(sum_ranks([mask.sum()])[0]), initial)

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

    def loss(
        self, rows: Tensor, logp: Tensor, entropy: Tensor, weight: SFTWeight, entropy_bonus: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The SFT loss of one micro-batch, once tokens are selected.

        Args:
            rows: [b] the rows of the micro-batch.
            logp: [b, l] log-probabilities of their tokens in nats, with gradient.
            entropy: [b, l] entropies in nats, with gradient if there is a bonus.
            weight: What multiplies each token's cross-entropy.
            entropy_bonus: Weight of the mean entropy over all demonstration tokens, whatever is selected.

        Returns:
            The scalar loss, and as scalars `loss`, `nll` (mean over all demonstration tokens) and `entropy`.
        """
        length = logp.shape[1]
        selected, valid = self.selected[rows, :length], self.mask[rows, :length]
        initial = None if self.initial is None else self.initial[rows]
        weights = sft_weights(weight, logp, entropy, valid, initial)
        loss, metrics = sft_loss(logp, selected, self.denominator, weights)
        metrics["nll"] = -(logp.detach() * valid).sum() / self.tokens
        mean_entropy = (entropy * valid).sum() / self.tokens
        metrics["entropy"] = mean_entropy.detach()
        return loss - entropy_bonus * mean_entropy if entropy_bonus else loss, metrics


def initial_losses(policy: Policy, questions: list[Question], pad: int) -> Tensor:
    """Loss of each question's demonstration under the present policy, in units of the median (FLOW, arXiv 2502.02797).

    Costs one forward pass over all demonstrations, shared by the ranks; collective.

    Returns:
        [N] fp32 on the CPU, mean nats per token over their median; 0 where there is no demonstration.
    """
    losses = torch.zeros(len(questions), device=policy.device)
    shown = [i for i, q in enumerate(questions) if q.demonstration]
    with policy.sampling():
        for start in range(rank() * INITIAL_ROWS, len(shown), ranks() * INITIAL_ROWS):
            chosen = shown[start : start + INITIAL_ROWS]
            prompts = [questions[i].prompt for i in chosen]
            responses = [questions[i].demonstration or [] for i in chosen]
            sequences = Sequences.pack(prompts, responses, pad).to(policy.device)
            logp, _ = score_without_gradient(policy, sequences, temperature=1.0)
            losses[chosen] = -logp.sum(-1) / sequences.response_lengths
    losses = sum_over(losses, world_group()).cpu()
    # a median of 0 means that half of them are known by heart: these keep weight 1, the others get 0, none is NaN
    return losses / losses[shown].quantile(0.5).clamp_min(torch.finfo(losses.dtype).tiny)
