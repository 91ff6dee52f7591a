"""The reward of the embedded skills: the answer must be the ground truth, character by character."""

from mifo_lightning.rewards.marker import MarkedReward, MissingMarker


class LastAnswerReward(MarkedReward):
    """1 if what follows the last marker is the ground truth, else 0; white space around them is ignored.

    Args:
        answer_after: The marker; a response without it is compared as a whole.
        missing_marker: zero or whole, for a thought that never ended, where the marker is a closing tag.
    """

    isolate = False

    def __init__(self, answer_after: str = ">", missing_marker: MissingMarker = "zero") -> None:
        super().__init__(answer_after, missing_marker)

    def __call__(self, responses: list[str], truths: list[str], prompts: list[str] | None = None) -> list[float]:
        answers = self.answers(responses, prompts)
        return [
            float(answer is not None and answer.strip() == truth.strip())
            for answer, truth in zip(answers, truths, strict=True)
        ]
