"""The reward of the embedded skills: the answer must be the ground truth, character by character."""

from mifo_lightning.rewards.base import Reward, answer_text


class LastAnswerReward(Reward):
    """1 if what follows the last marker is the ground truth, else 0; white space around them is ignored.

    Args:
        answer_after: The marker; a response without it is compared as a whole.
    """

    def __init__(self, answer_after: str = ">") -> None:
        self.answer_after = answer_after

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [
            float(answer_text(response, self.answer_after).strip() == truth.strip())
            for response, truth in zip(responses, truths, strict=True)
        ]
