"""The reward of open answers: the ground truth must stand among the words of the response."""

import re

from mifo_lightning.rewards.marker import MarkedReward, MissingMarker


class ContainsReward(MarkedReward):
    """1 if the response has the ground truth as whole words, in whatever case, else 0.

    `It is Paris.` has `Paris`, and `Parisian` has not. A response that names several answers has each of them: it is a
    judge of what a model knows, and no reward to train on.

    Args:
        answer_after: Only the text after the last such marker is graded; all of it if this is None or absent.
        missing_marker: zero or whole, for a thought that never ended.
    """

    isolate = False

    def __init__(self, answer_after: str | None = "</think>", missing_marker: MissingMarker = "zero") -> None:
        super().__init__(answer_after, missing_marker)

    def __call__(self, responses: list[str], truths: list[str], prompts: list[str] | None = None) -> list[float]:
        answers = self.answers(responses, prompts)
        return [
            float(answer is not None and contains(answer, truth)) for answer, truth in zip(answers, truths, strict=True)
        ]


def contains(text: str, words: str) -> bool:
    """Whether `words` stand in `text` with no letter or digit against either end, in whatever case and white space."""
    whole = r"\s+".join(map(re.escape, words.casefold().split()))
    return bool(whole) and re.search(rf"(?<!\w){whole}(?!\w)", text.casefold()) is not None
