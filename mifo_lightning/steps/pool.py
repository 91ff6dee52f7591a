"""Right responses of the model's own that SFT learns from (Self-SFT, arXiv 2510.18874): drawn, kept, drawn anew."""

from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_warn

from mifo_callbacks.collectives import gather_ranks, rank, ranks
from mifo_lightning.common.question import Question
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.respond import Responder


class Pool:
    """For each question the right response that was drawn for it last, if one ever was.

    Args:
        responder: Draws and grades.
        sampling: How responses are drawn: as rollouts are.
        attempts: Responses drawn for a question, one after the other, until one is right.

    Attributes:
        responses: Token ids with their end token, by question id; the same on every rank. None before `fill`.
    """

    def __init__(self, responder: Responder, sampling: Sampling, attempts: int) -> None:
        self.responder, self.sampling, self.attempts = responder, sampling, attempts
        self.responses: dict[int, list[int]] | None = None
        self._decoded = 0

    def fill(self, policy: Policy, questions: list[Question]) -> None:
        """Draw for all training questions, shared by the ranks, before training; collective.

        Costs at most `attempts` responses a question, fewer where it is easy.
        """
        found = self._draw(policy, questions[rank() :: ranks()], "initial")
        self.responses = {q.id: found[q.id] for q in questions if q.id in found}
        if len(found) < len(questions):
            rank_zero_warn(
                f"model.sft_loss.demonstrations: {len(found)} of {len(questions)} training questions have a right "
                f"response of the initial model in {self.attempts} attempts; the others are never learned from in SFT"
            )

    def refresh(self, policy: Policy, questions: list[Question], step: int) -> float:
        """Draw anew for the questions of an SFT phase; where none is right the old response stays.

        Args:
            policy: The running model.
            questions: This rank's share of them.
            step: Number of the SFT step that it begins with, which seeds the draw.

        Returns:
            Share of all ranks' questions that have a new response; collective.
        """
        found = self._draw(policy, questions, "refreshed", step)
        self.responses = {**(self.responses or {}), **found}
        return len(found) / max(1, sum(gather_ranks(len(questions))))

    def shown(self, questions: list[Question]) -> list[Question]:
        """The questions, each with its response in the place of the data's demonstration."""
        assert self.responses is not None, "`fill` comes first"
        return [replace(q, demonstration=self.responses[q.id], answer_start=None) for q in questions]

    def take_decoded(self) -> int:
        """Tokens that decoding ran through the model on this rank since the last call."""
        decoded, self._decoded = self._decoded, 0
        return decoded

    def _draw(self, policy: Policy, questions: list[Question], *name: str | int) -> dict[int, list[int]]:
        """The first right response to each question of all ranks that has one, by id."""
        found: dict[int, list[int]] = {}
        for attempt in range(self.attempts):
            left = [q for q in questions if q.id not in found]
            keys = [self.responder.key("pool", *name, attempt, q.id) for q in left]
            graded = self.responder.respond(policy, left, keys, 1, self.sampling)
            self._decoded += graded.tokens
            for q, (completion,), right in zip(left, graded.completions, graded.correct.any(-1).tolist(), strict=True):
                if right:
                    found[q.id] = completion.tokens
        return {number: tokens for each in gather_ranks(found) for number, tokens in each.items()}
