"""What steps that are timed are made of: sizes, prompts, rewards, a clock."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS, TOKENS, GROUP, LENGTH = 4, 75, 8, 32  # of a step on a pretrained model
Model = str | tuple[Any, Any]  # a Hugging Face directory, or a loaded model with its tokenizer


@dataclass(frozen=True)
class Size:
    """A step.

    Attributes:
        prompts: Different prompts.
        tokens: Of each prompt.
        group: Responses to each prompt.
        length: Tokens of each response, or the most if `ends`.
        steps: Steps of a measurement, the first of which does not count.
        ends: Whether responses end by themselves.
        chunk: Most tokens of a chunk; None: the step is not cut.
    """

    prompts: int
    tokens: int
    group: int
    length: int
    steps: int = 3
    ends: bool = False
    chunk: int | None = None

    @property
    def rows(self) -> int:
        """Responses."""
        return self.prompts * self.group

    @property
    def room(self) -> int:
        """Tokens of a chunk at most."""
        return self.rows * (self.tokens + self.length) if self.chunk is None else self.chunk


class Clock:
    """Seconds of each step, CPU seconds unless `now` tells others, and its tokens."""

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self.now = now
        self.took: list[float] = []
        self.tokens: list[int] = []

    def begin(self) -> None:
        """A step begins."""
        self.start = self.now()
        self.tokens.append(0)

    def end(self) -> None:
        """It is done."""
        self.took.append(self.now() - self.start)

    def coin(self, texts: Sequence[str]) -> list[float]:
        """Rewards by `coin`; counts the words of `texts`, each of which is a token of a tiny model's, and an end."""
        if self.tokens:
            self.tokens[-1] += sum(len(text.split()) + 1 for text in texts)
        return coin(texts)


def coin(texts: Sequence[str]) -> list[float]:
    """0 and -1 in turn: both in every group, so that all are trained, and what was cut off gets at most 0 here."""
    return [-float(i % 2) for i, _ in enumerate(texts)]


def prompts(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Different texts of exactly `tokens` tokens each."""
    words = tokenizer.encode(4 * Path(__file__).read_text(encoding="utf-8"), add_special_tokens=False)
    found: list[str] = []
    start = 0
    while len(found) < count:
        text = tokenizer.decode(words[start % 300 : start % 300 + tokens])
        start += 7
        if len(tokenizer.encode(text, add_special_tokens=False)) == tokens and text not in found:
            found.append(text)
    return found
