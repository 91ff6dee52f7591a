"""Answering questions: the one place where responses are drawn and graded, for RL, evaluation and monitors."""

from contextlib import suppress

import torch
from transformers import PreTrainedTokenizerBase

from mifo_callbacks import Seed
from mifo_lightning.checkpoints.safe_points import agree
from mifo_lightning.common.errors import Interrupted
from mifo_lightning.common.question import Question
from mifo_lightning.common.seeds import stable_key
from mifo_lightning.policy.ending import response_texts
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.grading import FailureWatch, check_success_threshold, grade_answers
from mifo_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from mifo_lightning.rollout.graded import Graded


class Responder:
    """Answers questions with the current weights and grades the answers.

    Args:
        engine: Draws responses.
        tokenizer: The model's.
        reward: Grades responses.
        success_threshold: Reward from which a response counts as correct.
        seed: Seed of all responses.

    Raises:
        InputError: If no response, or one that was cut off, would count as correct.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward,
        success_threshold: float,
        seed: Seed,
    ) -> None:
        check_success_threshold(success_threshold, reward)
        self.engine, self.tokenizer, self.reward = engine, tokenizer, reward
        self.success_threshold, self.seed = success_threshold, seed

    @property
    def own_numerics(self) -> bool:
        """That of the engine, which any object with a `generate` may be."""
        return bool(getattr(self.engine, "own_numerics", False))

    def key(self, *name: str | int) -> int:
        """The seed of a question's responses: equal names draw equally, whatever the batch and the rank."""
        return stable_key(self.seed.value, *name)

    def draw(
        self, policy: Policy, prompts: list[list[int]], keys: list[int], samples: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """`RolloutEngine.generate`, which an engine may leave by `poll`; collective.

        Raises:
            Interrupted: On all ranks, or on none.
        """
        drawn: list[list[Completion]] = []
        with suppress(Interrupted):  # the others learn of it where all meet
            drawn = self.engine.generate(policy, self.tokenizer, prompts, keys, samples, sampling)
        agree(policy.device)
        return drawn

    def grade(
        self, questions: list[Question], completions: list[list[Completion]], stop: list[str], what: str | None = None
    ) -> Graded:
        """Grade R responses to each question; one that did not end by itself gets at most the reward's `failed`.

        Args:
            questions: Q questions of this rank.
            completions: R responses to each.
            stop: Strings that end a response; what is graded ends before them.
            what: What the responses are, for the message: if every check of all ranks fails, the run ends. Collective
                then; None lets failures pass.

        Raises:
            InputError: Every check failed.
        """
        watch = FailureWatch(self.reward)
        flat = [c for group in completions for c in group]
        texts = response_texts(self.tokenizer, [c.tokens for c in flat], stop)
        asked = [q for q, group in zip(questions, completions, strict=True) for _ in group]
        scores = grade_answers(self.reward, asked, texts, [len(c.tokens) for c in flat], [c.finished for c in flat])
        if what is not None:
            watch.end(len(flat), what)
        n = len(flat) // max(len(questions), 1)
        rewards, judged, *parts = (
            torch.tensor(values).view(len(questions), n)
            for values in (scores.rewards, scores.judged, *scores.components.values())
        )
        components = dict(zip(scores.components, parts, strict=True))
        own_judge = judged if self.reward.solved_by is not None else None
        grouped = [texts[i : i + n] for i in range(0, len(texts), max(n, 1))]
        return Graded(questions, completions, rewards, self.success_threshold, own_judge, components, grouped)

    def respond(
        self, policy: Policy, questions: list[Question], keys: list[int], samples: int, sampling: Sampling
    ) -> Graded:
        """Draw and grade `samples` responses to each of this rank's questions; collective."""
        prompts = [q.prompt for q in questions]
        return self.grade(questions, self.draw(policy, prompts, keys, samples, sampling), sampling.stop)

    def state_dict(self) -> dict[str, int]:
        """What the engine keeps for a run that goes on; nothing if it keeps nothing."""
        found: dict[str, int] = getattr(self.engine, "state_dict", dict)()
        return found

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the engine go on from there."""
        if load := getattr(self.engine, "load_state_dict", None):
            load(state)

    def close(self) -> None:
        """Let an engine end what it has begun, such as a server."""
        if close := getattr(self.engine, "close", None):
            close()
