"""Where in a response the final mathematical answer stands, given what the prompt asks for."""

import re
from typing import NamedTuple

ANSWER_LINE = re.compile(r"\banswer(?:\s+is)?\W*:\W*?(?=[\w\\$({\[-])(.+)$", re.IGNORECASE)
ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


class Readings(NamedTuple):
    r"""What math-verify is to read.

    Attributes:
        texts: The answer is right if one of these is: the response, and its answer line as if it were boxed.
        relations: Whether `x < 3` counts as the interval `(-\infty, 3)`.
    """

    texts: list[str]
    relations: bool = False


def readings(response: str, prompt: str | None) -> Readings:
    r"""How to read a response.

    - `\fbox{73}` is `\boxed{73}`.
    - Where the prompt asks for `<answer>`, only what stands in the last such tag is the answer.
    - Where it asks for no `\boxed`, a last line `Answer: \sqrt{51}` is read as if its end were boxed, too.
    - Unless it asks for interval notation, a relation is the set of numbers that fulfil it.

    Args:
        response: What follows the thought.
        prompt: The question as the model saw it; None, where it is unknown, asks for nothing.
    """
    text = response.replace("\\fbox{", "\\boxed{")
    if prompt is None:
        return Readings([text])
    relations = "interval notation" not in prompt.lower()
    if "<answer>" in prompt and (tagged := ANSWER_TAG.findall(text)):
        return Readings([_boxed(tagged[-1])], relations)
    lines = text.rstrip().splitlines()
    line = ANSWER_LINE.search(lines[-1][-400:]) if lines and "\\boxed" not in prompt and "\\boxed" not in text else None
    return Readings([text, _boxed(line[1])] if line else [text], relations)


def _boxed(answer: str) -> str:
    return answer if "\\boxed" in answer else f"\\boxed{{{answer.strip().rstrip('.*').strip()}}}"
