"""Grades responses to questions, in training and in evaluation alike: what a reward may see, and what cut-off costs."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from mifo_callbacks.collectives import gather_ranks
from mifo_lightning.checkpoints import interruption
from mifo_lightning.common.errors import InputError, Interrupted
from mifo_lightning.common.question import Question
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.scoring import score


class Scores(NamedTuple):
    """N graded responses.

    Attributes:
        rewards: What trains, N finite numbers.
        judged: What `success_threshold` is compared with: a component that the reward names, else `rewards` again.
        components: Scores by name, where the reward is a sum.
    """

    rewards: list[float]
    judged: list[float]
    components: dict[str, list[float]]


def grade_answers(
    reward: Reward,
    questions: Sequence[Question],
    texts: list[str],
    lengths: Sequence[int],
    finished: Sequence[bool] | None = None,
) -> Scores:
    """Grade one response to each question; one that did not end by itself gets at most `reward.failed`.

    Args:
        reward: Scores.
        questions: N questions.
        texts: N responses.
        lengths: Tokens of each.
        finished: Whether each ended by itself; None: all did.
    """
    ended = [True] * len(texts) if finished is None else list(finished)
    names = dict.fromkeys(name for question in questions for name in question.columns)
    context = {name: [question.columns.get(name) for question in questions] for name in names} | {
        "prompts": [question.text for question in questions],
        # what the rows call it, also for questions held out
        "sources": [question.columns.get("data_source", question.source) for question in questions],
        "lengths": list(lengths),
        "finished": ended,
        "columns": [question.columns for question in questions],
    }
    for name in ("responses", "truths", "self"):
        context.pop(name, None)  # a column of such a name is in `columns` only
    rewards = score(reward, texts, [question.truth for question in questions], **context)
    components = {name: list(values) if texts else [] for name, values in reward.components.items()}
    if texts and reward.solved_by is not None and reward.solved_by not in components:
        raise InputError(
            f"reward: {type(reward).__name__} is judged by {reward.solved_by!r} (solved_by), which is none of its "
            f"components: {', '.join(components) or 'it has none'}"
        )
    judged = rewards if reward.solved_by is None or not texts else components[reward.solved_by]
    return Scores(_cut_off(rewards, ended, reward), _cut_off(judged, ended, reward.judge), components)


def check_success_threshold(success_threshold: float, reward: Reward) -> None:
    """Raise an InputError where no response, or one that was cut off or not graded, would count as correct."""
    judge = reward.judge
    if not (judge.failed < success_threshold <= judge.best and math.isfinite(success_threshold)):
        raise InputError(
            f"model.rollout.success_threshold: {success_threshold} is not allowed; for {type(judge).__name__} it must "
            f"be in ({judge.failed:g}, {judge.best:g}]: what was cut off or could not be graded scores {judge.failed:g}"
        )


class FailureWatch:
    """Stops a run in which every check of a reward fails: zeros would look like a result.

    Args:
        reward: Its parts are watched one by one.
    """

    def __init__(self, reward: Reward) -> None:
        self.parts = reward.parts
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self.before = [part.errors + part.timeouts for part in self.parts]

    def end(self, checked: int, where: str) -> None:
        """Stop if all that was checked since `begin`, on all ranks, failed; collective.

        Args:
            checked: Responses graded on this rank.
            where: What they were, for the message.

        Raises:
            InputError: Nothing was graded; with the first cause that this rank knows.
            Interrupted: A rank is asked to stop.
        """
        failed = [part.errors + part.timeouts - before for part, before in zip(self.parts, self.before, strict=True)]
        everywhere = gather_ranks([interruption.pending() or 0, checked, *failed])
        if signum := max(signal for signal, *_ in everywhere):
            # who waits for a child then stops waiting: its scores mean nothing
            raise Interrupted(signum, together=interruption.speaks_for_all(len(everywhere)))
        totals = [sum(numbers) for numbers in zip(*everywhere, strict=True)][1:]
        for part, count in zip(self.parts, totals[1:], strict=True):
            if 0 < totals[0] <= count:
                raise InputError(
                    f"reward: every check of {type(part).__name__} failed, {totals[0]} of {where}; the first cause: "
                    f"{part.first_problem}"
                )


def sum_up(reward: Reward, stage: str) -> list[str]:
    """One line for each reward some of whose checks failed since the last such lines, on all ranks; collective.

    Args:
        reward: Its parts are listed one by one.
        stage: What is summed up.
    """
    everywhere = gather_ranks([(part.checks, dict(part.causes)) for part in reward.parts])
    lines = []
    for part, counts in zip(reward.parts, zip(*everywhere, strict=True), strict=True):
        causes: Counter[str] = Counter()
        for _, own in counts:
            causes.update(own)
        if causes:
            listed = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())
            lines.append(
                f"{stage}: {sum(causes.values())} of {sum(checks for checks, _ in counts)} checks of "
                f"{type(part).__name__} failed and scored {part.failed:g}: {listed}"
            )
        part.checks, part.causes = 0, {}
    return lines


def _cut_off(scores: list[float], ended: list[bool], reward: Reward) -> list[float]:
    return [value if end else min(value, reward.failed) for value, end in zip(scores, ended, strict=True)]
