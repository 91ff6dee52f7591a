"""The demonstrations of an SFT step as a `Batch`, and the tokens that its loss sees."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mifo_callbacks.collectives import rank, ranks, sum_over, sum_ranks, world_group
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import WorkItem
from mifo_lightning.losses.sed import SED, sed_threshold, top_sum
from mifo_lightning.losses.sft_weights import as_sft_weight
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.scoring import score_without_gradient
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.graded import Graded
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.steps.batch import Batch, Stream
from mifo_lightning.steps.objective import Objective
from mifo_lightning.steps.pool import Pool
from mifo_lightning.steps.settings import SFTLoss
from mifo_lightning.steps.teacher import Shown, Teacher

INITIAL_ROWS = 64  # demonstrations packed together; bounds padding


class Supervision:
    """Everything of an SFT step but the forward pass with a gradient.

    Args:
        tokenizer: The model's.
        settings: The loss.
        responder: Draws responses, where they are learned from; None where none are.
        sampling: How.

    Raises:
        InputError: If a setting is impossible.

    Attributes:
        objective: The loss of a chunk.
        initial_losses: [N] fp32 by question id, for a weight that wants them; None before `measure`.
        sed_threshold: tau of SED-SFT's term, where it is on; None before `measure`.
        pool: The model's own right responses, where they take the place of the data's demonstrations.
        teacher: Of SDFT; None without it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: SFTLoss,
        responder: Responder | None = None,
        sampling: Sampling = Sampling(),
    ) -> None:
        settings.check("model.sft_loss")
        self.tokenizer, self.settings = tokenizer, settings
        self.objective = Objective(sft_weight=as_sft_weight(settings.weight), sed=settings.sed)
        self.initial_losses: Tensor | None = None
        self.sed_threshold: float | None = None
        self.responder, self.sampling = responder, sampling
        pooled = settings.demonstrations in ("initial", "refreshed")
        self.pool = Pool(self._drawing, sampling, settings.attempts) if pooled else None
        self.teacher = None if settings.distillation is None else Teacher(settings.distillation.teacher_rate)
        self._decoded = 0

    @property
    def own_demonstrations(self) -> bool:
        """Whether a buffered question is learned from a correct response of the model's own."""
        return self.settings.demonstrations != "data"

    @property
    def draws(self) -> bool:
        """Whether SFT steps draw responses."""
        return self.settings.demonstrations == "refreshed" or self.settings.distillation is not None

    @property
    def needs_initial_losses(self) -> bool:
        """Whether the weight wants each demonstration's loss before training."""
        return self.objective.sft_weight.needs_initial_losses

    def groups(self, drawn: Graded) -> list[dict[str, Any]]:
        """What the buffer wants to know of fresh rollouts: above all which questions have something to learn from."""
        pool = None if self.pool is None else self.pool.responses
        return drawn.groups(self.settings.demonstrations == "own", pool)

    def answered(
        self, policy: Policy, item: WorkItem, phase: Callable[[], list[Question]]
    ) -> tuple[list[Question], dict[str, float]]:
        """The questions of an SFT step, each with what is learned from in the place of its demonstration; collective.

        Args:
            policy: The running model, which draws what is to be drawn.
            item: The SFT step.
            phase: Gives this rank's share of the questions of the whole phase; of a stage a step is one.

        Returns:
            The questions, and what is logged of them.
        """
        if self.pool is not None:
            metrics = {}
            if self.settings.demonstrations == "refreshed" and item["update"] == 0:
                metrics["refreshed"] = self.pool.refresh(policy, phase(), item["step"])
            return self.pool.shown(item["questions"]), metrics
        if self.settings.distillation is not None:
            return self._attempted(policy, item), {}
        return item["questions"], {}

    def _attempted(self, policy: Policy, item: WorkItem) -> list[Question]:
        """The questions with a response of the running model to each, right or not."""
        questions = item["questions"]
        keys = [self._drawing.key("sft", item["step"], q.id) for q in questions]
        drawn = self._drawing.draw(policy, [q.prompt for q in questions], keys, 1, self.sampling)
        responses = [response.tokens for (response,) in drawn]
        self._decoded += sum(len(q.prompt) + len(r) for q, r in zip(questions, responses, strict=True))
        return [replace(q, demonstration=r, answer_start=None) for q, r in zip(questions, responses, strict=True)]

    def take_decoded(self) -> int:
        """Tokens that decoding for SFT ran through the model on this rank since the last call, prompts included."""
        decoded, self._decoded = self._decoded, 0
        return decoded + (self.pool.take_decoded() if self.pool is not None else 0)

    @property
    def _drawing(self) -> Responder:
        assert self.responder is not None, "who learns from responses says who draws them"
        return self.responder

    @property
    def measures(self) -> bool:
        """Whether the loss depends on what the model makes of all demonstrations before training."""
        return self.needs_initial_losses or self.settings.sed.strength > 0

    def measure(self, policy: Policy, questions: list[Question]) -> None:
        """Score the demonstrations of all training questions before training, for all that depends on it; collective.

        Costs a forward pass over them for each, shared by the ranks, and the responses of a pool, if there is one.
        """
        pad = padding(self.tokenizer)
        if self.needs_initial_losses:
            self.initial_losses = initial_losses(policy, questions, pad)
        if self.settings.sed.strength:
            self.sed_threshold = initial_sed_threshold(policy, questions, pad, self.settings.sed)
        if self.pool is not None:
            self.pool.fill(policy, questions)
        if self.teacher is not None:
            self.teacher.begin(policy)

    def state_dict(self) -> dict[str, Any]:
        """What `measure` found, and what pool and teacher hold, for a checkpoint; collective if weights are sharded."""
        sed = self.settings.sed
        measured = (self.sed_threshold, sed.top_k, sed.mask_ratio) if self.sed_threshold is not None else None
        pool = None if self.pool is None else self.pool.responses
        teacher = {} if self.teacher is None else self.teacher.state_dict()
        return {"initial_losses": self.initial_losses, "sed": measured, "pool": pool, "teacher": teacher}

    def load_state_dict(self, state: dict[str, Any], policy: Policy) -> None:
        """Take what a run measured where it began, and where its teacher was.

        Raises:
            InputError: It measured what is not wanted now, or the other way round.
        """
        losses, measured, sed = state["initial_losses"], state.get("sed"), self.settings.sed
        if (losses is None) == self.needs_initial_losses:
            raise InputError(
                "model.sft_loss.weight: flow is not allowed here, nor its loss; with flow a run begins and ends"
            )
        wanted = (sed.top_k, sed.mask_ratio) if sed.strength else None
        if wanted != (begun := None if measured is None else tuple(measured[1:])):
            raise InputError(
                f"model.sft_loss.sed: {_named(wanted)} is not allowed here; the run began with {_named(begun)}, and "
                "its threshold stands still"
            )
        self.initial_losses, self.sed_threshold = losses, None if measured is None else measured[0]
        pool = state.get("pool")
        if (pool is None) != (self.pool is None):
            raise InputError(
                f"model.sft_loss.demonstrations: {self.settings.demonstrations} is not allowed here; initial and "
                "refreshed begin with a run, and end with it"
            )
        if self.pool is not None:
            self.pool.responses = pool
        teacher = state.get("teacher") or {}
        if self.teacher is not None:
            self.teacher.load_state_dict(policy, teacher)
        elif teacher:
            raise InputError(
                "model.sft_loss.distillation: null is not allowed here; the run began with a moving average for a "
                "teacher, which ends with it"
            )

    def shown(self, policy: Policy, chunk: Batch) -> Shown | tuple[None, None]:
        """What the teacher makes of a chunk; nothing where there is none."""
        if self.teacher is None or chunk.teacher is None:
            return None, None
        return self.teacher.shown(policy, chunk.teacher)

    def batch(self, questions: list[Question], device: torch.device) -> Batch:
        """As `sft_batch`, with these settings."""
        batch = sft_batch(questions, self.tokenizer, device, self.settings.entropy_bonus, self.initial_losses)
        teacher = self._teacher(questions).to(device) if self.settings.distillation is not None else None
        return replace(batch, sed_threshold=self.sed_threshold, teacher=teacher)

    def _teacher(self, questions: list[Question]) -> Sequences:
        """The responses after the prompts of the teacher."""
        prompts = [q.teacher_prompt or [] for q in questions]
        if not all(prompts):
            raise InputError(
                "model.sft_loss.distillation: a question has no prompt for the teacher; QuestionData makes them of "
                "demonstrations, other data sets Question.teacher_prompt"
            )
        return Sequences.pack(prompts, [q.demonstration or [] for q in questions], padding(self.tokenizer))


def _named(sed: tuple[Any, ...] | None) -> str:
    return "strength 0" if sed is None else f"top_k {sed[0]} and mask_ratio {sed[1]}"


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
        for chosen, sequences in _own_share(questions, shown, pad):
            logp, _ = score_without_gradient(policy, sequences.to(policy.device), temperature=1.0)
            losses[chosen] = -logp.sum(-1) / sequences.response_lengths.to(policy.device)
    losses = sum_over(losses, world_group()).cpu()
    # a median of 0 means that half of them are known by heart: these keep weight 1, the others get 0, none is NaN
    return losses / losses[shown].quantile(0.5).clamp_min(torch.finfo(losses.dtype).tiny)


def initial_sed_threshold(policy: Policy, questions: list[Question], pad: int, sed: SED) -> float:
    """tau of SED-SFT's term under the present policy, over the tokens of all demonstrations; collective.

    Costs one forward pass over them, shared by the ranks.
    """
    sums = [torch.zeros(0, device=policy.device)]
    shown = [i for i, q in enumerate(questions) if q.demonstration]
    with policy.sampling():
        for _, sequences in _own_share(questions, shown, pad):
            here = sequences.to(policy.device)
            *_, top = score_without_gradient(policy, here, temperature=1.0, top_k=sed.top_k)
            sums.append(top_sum(top)[here.mask()])
    return sed_threshold(torch.cat(sums), sed.mask_ratio, world_group())


def _own_share(questions: list[Question], shown: list[int], pad: int) -> Iterator[tuple[list[int], Sequences]]:
    """This rank's blocks of the demonstrations `shown`: places among the questions, and what stands there."""
    for start in range(rank() * INITIAL_ROWS, len(shown), ranks() * INITIAL_ROWS):
        chosen = shown[start : start + INITIAL_ROWS]
        prompts = [questions[i].prompt for i in chosen]
        yield chosen, Sequences.pack(prompts, [questions[i].demonstration or [] for i in chosen], pad)
