"""The verifier of mathematical answers: math-verify in a child process that can be killed."""

from collections.abc import Sequence

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.answer_format import readings
from mifo_lightning.rewards.child import Child, ChildDied
from mifo_lightning.rewards.marker import MarkedReward, MissingMarker

GRADER = "mifo_lightning.rewards.math_grader"


class MathReward(MarkedReward):
    """1 if math-verify finds the response's final answer equal to the ground truth, else 0.

    One child process per object grades one answer at a time. It starts with the first check, is killed and
    replaced when a check takes too long, ends with its parent, and imports no torch. Calls are safe from any thread.

    Args:
        timeout: Wall-clock seconds allowed for one check; a longer one scores 0 and is added to `timeouts`.
        answer_after: Only the text after the last such marker is graded; all of it if this is None or absent.
        missing_marker: What a response is worth whose thought never ended, because the prompt or the response opens
            `<think>` and nothing closes it: zero, or whole, its whole text graded.
    """

    isolate = False  # it has a child of its own

    def __init__(
        self,
        timeout: float = 5.0,
        answer_after: str | None = "</think>",
        missing_marker: MissingMarker = "zero",
    ) -> None:
        super().__init__(answer_after, missing_marker)
        if not timeout > 0:
            raise InputError(f"MathReward: timeout is {timeout}, allowed is a number of seconds above 0")
        self.timeout = timeout
        self._child = Child(GRADER, str(timeout))

    def __call__(self, responses: list[str], truths: list[str], prompts: list[str] | None = None) -> list[float]:
        answers = self.answers(responses, prompts)
        asked: Sequence[str | None] = prompts or [None] * len(responses)
        return [
            0.0 if answer is None else self._check(answer, truth, prompt)
            for answer, truth, prompt in zip(answers, truths, asked, strict=True)
        ]

    def close(self) -> None:
        """End the child process; a later check starts a new one."""
        self._child.close()

    def _check(self, text: str, truth: str, prompt: str | None) -> float:
        texts, relations = readings(text, prompt)
        try:
            verdict: bool | str = self._child.ask((texts, truth, relations), self.timeout)
        except TimeoutError as error:
            return self.fail(f"math-verify {error}", text, timeout=True)
        except ChildDied as error:
            verdict = f"the grading process {error}"
        if isinstance(verdict, str):
            return self.fail(verdict, text)
        return float(verdict)
