"""The reward of GeneralPoints: steps of exact arithmetic that use every card once and end in the target."""

import ast
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.base import Reward

TRUTH = re.compile(r"\s*(\d{1,6}(?:\s+\d{1,6})*)\s*>\s*(\d{1,6})\s*", re.ASCII)
STEP = re.compile(r"([0-9+\-*/() ]+)(?:=\s*(\d+))?", re.ASCII)
LIMIT = 200  # characters of a response; a solution of four cards has about thirty

READABLE, AT_HAND, EVERY_CARD = 0.1, 0.2, 0.3


class PointsReward(Reward):
    """1 if a response makes the target from the numbers of the ground truth, each used exactly once, else 0.

    A response is steps with commas between, each an expression of + - * / and brackets with, if it likes, `=` and its
    value. A step takes its numbers from those at hand and puts its value back; at the end only the target is at hand.
    So both `13-5=8,8*3=24,24*1=24` and `(13-5)*3*1` solve `13 5 3 1 > 24`. Arithmetic is exact. More than 200
    characters cannot be read.

    Args:
        graded: Whether a wrong response gets a part: 0.1 if it can be read, 0.2 if besides every step takes numbers at
            hand and states no wrong value, 0.3 + 0.4 / (1 + distance to the target) if besides one number is left.

    Raises:
        InputError: From a call, a ground truth that is not of the form `13 5 3 1 > 24`.
    """

    best = 1.0
    isolate = False

    def __init__(self, graded: bool = False) -> None:
        self.graded = graded

    def check_truth(self, truth: str, columns: Mapping[str, Any]) -> None:
        """Raise an InputError where it names no cards and target."""
        read_truth(truth)

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        grades = [grade(response, truth) for response, truth in zip(responses, truths, strict=True)]
        return grades if self.graded else [float(value == 1) for value in grades]


def read_truth(truth: str) -> tuple[list[Fraction], Fraction]:
    """Cards and target; raises an InputError where they are none."""
    match = TRUTH.fullmatch(truth)
    if match is None:
        raise InputError(f"PointsReward: ground truth is {truth!r:.80}, allowed is for example '13 5 3 1 > 24'")
    return [Fraction(number) for number in match[1].split()], Fraction(match[2])


def grade(response: str, truth: str) -> float:
    """The graded reward of one response, in [0, 1]."""
    hand, target = read_truth(truth)
    steps = [_read(text) for text in response.split(",")] if len(response) <= LIMIT else [None]
    if None in steps:
        return 0.0
    for tree, stated in filter(None, steps):
        for number in _numbers(tree):
            if number not in hand:
                return READABLE
            hand.remove(number)
        try:
            value = _evaluate(tree)
        except ZeroDivisionError:
            return READABLE
        if stated is not None and stated != value:
            return READABLE
        hand.append(value)
    if len(hand) > 1:
        return AT_HAND
    return 1.0 if hand[0] == target else EVERY_CARD + 0.4 / (1 + float(abs(hand[0] - target)))


def _read(step: str) -> tuple[ast.expr, int | None] | None:
    """Syntax tree and stated value of a step; None if it is not one."""
    match = STEP.fullmatch(step.strip())
    if match is None:
        return None
    try:
        tree = ast.parse(match[1].strip(), mode="eval").body  # only parsed, never run
    except (SyntaxError, MemoryError, RecursionError):  # the last two for brackets nested too deep
        return None
    allowed = (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Constant)
    return (tree, int(match[2]) if match[2] else None) if all(isinstance(n, allowed) for n in ast.walk(tree)) else None


def _numbers(tree: ast.expr) -> list[Fraction]:
    """The numbers that occur in an expression."""
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [Fraction(value) for value in constants if isinstance(value, int)]


def _evaluate(tree: ast.expr) -> Fraction:
    if not isinstance(tree, ast.BinOp):
        return _numbers(tree)[0]
    left, right = _evaluate(tree.left), _evaluate(tree.right)
    match tree.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case _:
            return left / right
