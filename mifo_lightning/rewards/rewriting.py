"""The reward of string rewriting: every step follows a rule, and the last word is that of the ground truth."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.base import Reward

SIGN = r"[^\s,>|]"  # of a word: the others part words and rules from each other
TRUTH = re.compile(rf"\s*({SIGN}+)\s*>\s*({SIGN}+)\s*\|((?:\s+{SIGN}+>{SIGN}*)+)\s*")
LIMIT = 200  # words of a response, and characters of a word

Rules = tuple[tuple[str, str], ...]


class RewritingReward(Reward):
    """1 if a response is a derivation of the goal from the word by the rules of the ground truth, else 0.

    The ground truth is word, goal and rules, as in `abba > bc | ab>b ba>c bb>`: each rule lets its left side, wherever
    it stands in a word, become its right side, which may be empty. No blank, comma, `>` or `|` is part of a word. A
    response is the words that follow the given one, `bba,bc`, with commas between; blanks around a word do not count.
    Each must come from the one before it by one rule at one place, and the last must be the goal. Any derivation is
    right, short or not, up to 200 words of 200 characters.

    Args:
        graded: Whether a wrong response gets a part: after n steps in a row that follow a rule, 0.5 n / (n + 1). Where
            rules do not make words shorter, going round in circles earns nearly 0.5.

    Raises:
        InputError: From a call, a ground truth that is not of this form.
    """

    best = 1.0
    isolate = False

    def __init__(self, graded: bool = False) -> None:
        self.graded = graded

    def check_truth(self, truth: str, columns: Mapping[str, Any]) -> None:
        """Raise an InputError where it is no word, goal and rules."""
        _read(truth)

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        grades = [grade(response, truth) for response, truth in zip(responses, truths, strict=True)]
        return grades if self.graded else [float(value == 1) for value in grades]


def grade(response: str, truth: str) -> float:
    """The graded reward of one response, in [0, 1]."""
    word, goal, rules = _read(truth)
    words = [text.strip() for text in response.split(",")]
    if len(words) > LIMIT or max(map(len, words)) > LIMIT:
        return 0.0
    steps = 0
    for made in words:
        if not follows(word, made, rules):
            return 0.5 * steps / (steps + 1)
        word, steps = made, steps + 1
    return 1.0 if word == goal else 0.5 * steps / (steps + 1)


def follows(word: str, made: str, rules: Rules) -> bool:
    """Whether one rule at one place of `word` makes `made` of it."""
    return any(
        word[:place] + right + word[place + len(left) :] == made
        for left, right in rules
        if len(word) - len(left) + len(right) == len(made)
        for place in range(len(word) - len(left) + 1)
        if word.startswith(left, place)
    )


@lru_cache(maxsize=4096)
def _read(truth: str) -> tuple[str, str, Rules]:
    match = TRUTH.fullmatch(truth)
    if match is None:
        raise InputError(
            f"RewritingReward: ground truth is {truth!r:.80}, allowed is for example 'abba > bc | ab>b ba>c bb>'"
        )
    rules = tuple(tuple(rule.split(">")) for rule in match[3].split())
    return match[1], match[2], rules
