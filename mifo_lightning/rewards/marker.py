"""Rewards that grade only what follows a marker, such as `</think>`, and what a response without it is worth."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.base import Reward

MissingMarker = Literal["zero", "whole"]


class MarkedReward(Reward):
    """Grades the text after the last marker.

    A response without the marker is graded as a whole, unless it was thinking: the marker is a closing tag such as
    `</think>`, and the prompt ends in the opening tag or the response holds it. Then the thought never ended.

    Args:
        answer_after: The marker; None grades every response as a whole.
        missing_marker: What a response is worth whose thought never ended: zero, or whole, its whole text graded.
    """

    best = 1.0

    def __init__(self, answer_after: str | None, missing_marker: MissingMarker = "zero") -> None:
        if missing_marker not in ("zero", "whole"):
            raise InputError(f"reward: missing_marker is {missing_marker!r}, allowed are zero and whole")
        self.answer_after, self.missing_marker = answer_after, missing_marker

    @property
    def opener(self) -> str | None:
        """The tag that the marker closes; None if the marker is no closing tag."""
        marker = self.answer_after or ""
        return f"<{marker[2:]}" if marker.startswith("</") and marker.endswith(">") else None

    def unended(self, responses: Sequence[str], prompts: Sequence[str] | None) -> list[bool]:
        """Whether each response opened a thought, itself or by its prompt, and never closed one."""
        opener, marker = self.opener, self.answer_after
        if opener is None or marker is None:
            return [False] * len(responses)
        begun = [prompt.rstrip().endswith(opener) for prompt in prompts] if prompts else [False] * len(responses)
        return [marker not in text and (opener in text or open_) for text, open_ in zip(responses, begun, strict=True)]

    @contextmanager
    def grading_as(self, missing_marker: MissingMarker) -> Iterator[None]:
        """Inside, a thought that never ended is worth this."""
        before, self.missing_marker = self.missing_marker, missing_marker
        try:
            yield
        finally:
            self.missing_marker = before

    def answers(self, responses: Sequence[str], prompts: Sequence[str] | None) -> list[str | None]:
        """The text to grade of each response; None scores 0."""
        unended = self.unended(responses, prompts) if self.missing_marker == "zero" else [False] * len(responses)
        return [
            None if no_end else answer_text(text, self.answer_after)
            for text, no_end in zip(responses, unended, strict=True)
        ]


def answer_text(response: str, answer_after: str | None) -> str:
    """What follows the last `answer_after` in `response`; all of it if the marker is None or absent."""
    return response.rpartition(answer_after)[2] if answer_after else response
