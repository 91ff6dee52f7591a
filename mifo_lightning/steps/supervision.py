"""The demonstrations of an SFT step as a `Batch`, and the tokens that its loss sees."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mifo_callbacks.collectives import rank, ranks, sum_over, sum_ranks, world_group
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.losses.sft_weights import as_sft_weight
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.scoring import score_without_gradient
from mifo_lightning.steps.batch import Batch, Stream
from mifo_lightning.steps.objective import Objective
from mifo_lightning.steps.settings import SFTLoss

INITIAL_ROWS = 64  # demonstrations packed together; bounds padding


class Supervision:
    """Everything of an SFT step but the forward pass with a gradient.

    Args:
        tokenizer: The model's.
        settings: The loss.

    Raises:
        InputError: If a setting is impossible.

    Attributes:
        objective: The loss of a chunk.
        initial_losses: [N] fp32 by question id, for a weight that wants them; None before `measure`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: SFTLoss) -> None:
        settings.check("model.sft_loss")
        self.tokenizer, self.settings = tokenizer, settings
        self.objective = Objective(sft_weight=as_sft_weight(settings.weight))
        self.initial_losses: Tensor | None = None

    @property
    def own_demonstrations(self) -> bool:
        """Whether a buffered question is learned from a correct rollout of the model's own."""
        return self.settings.demonstrations == "own"

    @property
    def needs_initial_losses(self) -> bool:
        """Whether the weight wants each demonstration's loss before training."""
        return self.objective.sft_weight.needs_initial_losses

    def measure(self, policy: Policy, questions: list[Question]) -> None:
        """Measure them, of all training questions; collective."""
        self.initial_losses = initial_losses(policy, questions, padding(self.tokenizer))

    def load_initial_losses(self, losses: Tensor | None) -> None:
        """Take those of a checkpoint.

        Raises:
            InputError: There are some and they are not wanted, or the other way round.
        """
        if (losses is None) == self.needs_initial_losses:
            raise InputError(
                "model.sft_loss.weight: flow is not allowed here, nor its loss; with flow a run begins and ends"
            )
        self.initial_losses = losses

    def batch(self, questions: list[Question], device: torch.device) -> Batch:
        """As `sft_batch`, with these settings."""
        return sft_batch(questions, self.tokenizer, device, self.settings.entropy_bonus, self.initial_losses)


def sft_batch(
    questions: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    entropy_bonus: float = 0.0,
    initial_losses: Tensor | None = None,
) -> Batch:
    """This rank's demonstrations of one SFT optimizer step; collective, since tokens are counted over all ranks.

    The loss sees all their tokens until `selected` says which.

    Args:
        questions: This rank's questions, each with a demonstration.
        tokenizer: The model's.
        device: Where the tensors go.
        entropy_bonus: Weight of the policy's mean entropy on all demonstration tokens, which is taken off the loss.
        initial_losses: [N] by question id, from `initial_losses`; None where no weight wants them.
    """
    responses = [q.demonstration or [] for q in questions]
    sequences = Sequences.pack([q.prompt for q in questions], responses, padding(tokenizer)).to(device)
    mask, ids = sequences.mask(), [q.id for q in questions]
    columns = torch.arange(mask.shape[1], device=device)
    named = {"eos": columns == sequences.response_lengths[:, None] - 1}
    if any(q.answer_start is not None for q in questions):
        # no marker in this demonstration: its answer begins after its end
        starts = [
            len(r) if q.answer_start is None else q.answer_start for q, r in zip(questions, responses, strict=True)
        ]
        named["answer"] = mask & (columns >= torch.tensor(starts, device=device)[:, None])
    tokens = float(sum_ranks([mask.sum()])[0])
    return Batch(
        sequences=sequences,
        question=torch.tensor(ids, device=device),
        minibatch=torch.zeros(len(ids), dtype=torch.long, device=device),
        active=torch.ones(len(ids), dtype=torch.bool, device=device),
        demonstrated=mask,
        ce=Stream(mask, tokens),
        bonus=Stream(mask, tokens, entropy_bonus),
        initial=None if initial_losses is None else initial_losses[ids].to(device),
        named=named,
    )


def selected(batch: Batch, select_tokens: Any, entropy: Tensor) -> Batch:
    """The batch of an SFT step whose loss sees the tokens of a selection alone.

    Args:
        batch: This rank's demonstrations of the whole optimizer step.
        select_tokens: What `EntropyTokenSelection` put on the module.
        entropy: [B, L] their entropies in nats, without gradient.
    """
    assert batch.ce is not None, "an SFT step has demonstrations"
    mask, denominator = select_tokens(entropy, batch.ce.weight, named=batch.named)
    return replace(batch, ce=Stream(mask, denominator))


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
