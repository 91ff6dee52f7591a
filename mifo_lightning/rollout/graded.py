"""Graded responses: what the buffer, the tables and the log want to know of fresh rollouts."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mifo_callbacks.collectives import sum_ranks
from mifo_lightning.common.question import Question
from mifo_lightning.rollout.engine import Completion


@dataclass
class Graded:
    """This rank's questions with their graded responses.

    Attributes:
        questions: Q questions.
        completions: For each question its R responses.
        rewards: [Q, R] fp32, on the CPU; at most 0 where truncated.
        success_threshold: Reward from which a response is correct.
        judged: [Q, R] fp32, what `success_threshold` is compared with; None: `rewards`.
        components: [Q, R] fp32 scores by name, where the reward is a sum.
        texts: For each question its R responses as they were graded.
    """

    questions: list[Question]
    completions: list[list[Completion]]
    rewards: Tensor
    success_threshold: float
    judged: Tensor | None = None
    components: dict[str, Tensor] = field(default_factory=dict)
    texts: list[list[str]] = field(default_factory=list)

    @property
    def correct(self) -> Tensor:
        """[Q, R] bool."""
        return (self.rewards if self.judged is None else self.judged) >= self.success_threshold

    @property
    def finished(self) -> Tensor:
        """[Q, R] bool: the response ended by itself."""
        return torch.tensor([[c.finished for c in group] for group in self.completions])

    @property
    def differ(self) -> Tensor:
        """[Q] bool: the rewards of the group are not all equal, so that it has a signal."""
        return (self.rewards != self.rewards[:, :1]).any(-1)

    @property
    def undecided(self) -> Tensor:
        """[Q] bool: what dynamic sampling keeps; where a component judges, a group neither all right nor all wrong."""
        return self.differ if self.judged is None else (self.correct != self.correct[:, :1]).any(-1)

    def __add__(self, other: "Graded") -> "Graded":
        """Both, one after the other."""
        return Graded(
            self.questions + other.questions,
            self.completions + other.completions,
            torch.cat([self.rewards, other.rewards]),
            self.success_threshold,
            None if self.judged is None or other.judged is None else torch.cat([self.judged, other.judged]),
            {name: torch.cat([values, other.components[name]]) for name, values in self.components.items()},
            self.texts + other.texts,
        )

    def select(self, chosen: list[int]) -> "Graded":
        """The chosen questions."""
        return Graded(
            [self.questions[i] for i in chosen],
            [self.completions[i] for i in chosen],
            self.rewards[chosen],
            self.success_threshold,
            None if self.judged is None else self.judged[chosen],
            {name: values[chosen] for name, values in self.components.items()},
            [self.texts[i] for i in chosen] if self.texts else [],
        )

    @property
    def tokens(self) -> int:
        """Tokens that decoding ran through the model: each prompt once, and the responses."""
        prompts = sum(len(q.prompt) for q in self.questions)
        return prompts + sum(len(c.tokens) for group in self.completions for c in group)

    def groups(self, own: bool, pool: Container[int] | None = None) -> list[dict[str, Any]]:
        """What BufferPhaseSwitch wants to know of each question.

        Args:
            own: Whether the first correct response, not the data's solution, is the demonstration.
            pool: Ids of the questions that have a demonstration, where it is not the data's; None: it is.
        """
        lends = {q.id: bool(q.demonstration) if pool is None else q.id in pool for q in self.questions}
        entries = []
        for q, group, correct in zip(self.questions, self.completions, self.correct.tolist(), strict=True):
            entry = {
                "id": q.id,
                "n_correct": sum(correct),
                "size": len(group),
                "has_demonstration": any(correct) if own else lends[q.id],
            }
            if own and any(correct):
                entry["demonstration"] = group[correct.index(True)].tokens
            entries.append(entry)
        return entries

    def samples(self, question: int = 0) -> list[dict[str, Any]]:
        """One question's responses, as the text that was graded, with rewards to six digits and lengths in tokens."""
        q = self.questions[question]
        graded = zip(self.texts[question], self.rewards[question].tolist(), self.completions[question], strict=True)
        return [
            {
                "source": q.source,
                "prompt": q.text,
                "response": text,
                "truth": q.truth,
                "reward": round(reward, 6),
                "length": len(completion.tokens),
                "truncated": not completion.finished,
            }
            for text, reward, completion in graded
        ]

    def describe(self, device: torch.device) -> dict[str, float]:
        """Means over the responses of all ranks; collective."""
        flat = [c for group in self.completions for c in group]
        sums = {
            "reward": float(self.rewards.sum()),
            "correct": float(self.correct.sum()),
            "truncated": float(sum(not c.finished for c in flat)),
            "length": float(sum(len(c.tokens) for c in flat)),
            "entropy": -sum(sum(c.logp) for c in flat),
            "groups_without_signal": float((~self.differ).sum()),
            "responses": float(len(flat)),
            "groups": float(len(self.questions)),
        }
        parts = {f"reward/{name}": float(values.sum()) for name, values in self.components.items()}
        sums |= parts
        totals = dict(zip(sums, sum_ranks([torch.tensor(x, device=device) for x in sums.values()]), strict=True))
        # entropy: a Monte-Carlo estimate, the mean over all sampled tokens of all ranks
        counted = {"entropy": "length", "groups_without_signal": "groups"}
        names = ("reward", "correct", "truncated", "length", *parts, *counted)
        return {name: float(totals[name] / totals[counted.get(name, "responses")]) for name in names}


class Chosen(NamedTuple):
    """Which questions of a rank's draw train.

    Attributes:
        picked: Their positions in the draw.
        place: Place of each among all that train, of all ranks, where there is a choice, else of this rank; it decides
            the optimizer step.
        total: How many places there are.
    """

    picked: list[int]
    place: list[int]
    total: int
