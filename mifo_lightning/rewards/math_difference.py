"""What math-verify takes for equal although it is not: tiny numbers, and numbers in different bases."""

import re
from typing import Any

from sympy import Add, Basic, Eq, Expr, FiniteSet, Float, Interval, Tuple, UnevaluatedExpr

EXACT = 1e-12  # relative: what numbers without a decimal point may differ by, for rounding while they are compared
ROUNDED = 1e-2  # the same for decimal fractions, which math-verify compares to six places
BASED = re.compile(r"\\?\(?([0-9A-Za-z]+)\\?\)?_\{?(?:\\text\{)?(\d+)\}?\}?")


def apart(gold: Any, answer: Any) -> bool:
    """Whether two expressions that math-verify finds equal are different numbers, compared by their ratio.

    Looks into pairs of equations with the same left side, tuples, intervals and finite sets; says no where it cannot
    tell, so that math-verify's verdict stands.
    """
    try:
        if isinstance(gold, Eq) and isinstance(answer, Eq):
            return bool(gold.lhs == answer.lhs) and apart(gold.rhs, answer.rhs)
        if isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet):
            return any(all(apart(g, a) for a in answer.args) for g in gold.args)
        if isinstance(gold, Tuple | Interval) and isinstance(answer, Tuple | Interval):
            return any(apart(g, a) for g, a in zip(_entries(gold), _entries(answer), strict=True))
        return isinstance(gold, Expr) and isinstance(answer, Expr) and _numbers_apart(gold, answer)
    except Exception:  # sympy raises what it likes on expressions that models invent
        return False


def other_base(truth: str, answers: list[Any]) -> bool:
    """Whether truth and answer name bases, as in `1011_2`, in which they are not the same number."""
    texts = [answer for answer in answers if isinstance(answer, str)]
    gold, given = BASED.fullmatch(truth.strip("$ ")), BASED.fullmatch(texts[-1].strip("$ ")) if texts else None
    return bool(gold and given and _value(gold) != _value(given))


def _value(number: re.Match[str]) -> int | tuple[str | Any, ...]:
    try:
        return int(number[1], int(number[2]))
    except ValueError:  # no such base, or no such digit
        return number.groups()


def _entries(several: Basic) -> tuple[Basic, ...]:
    return (several.start, several.end) if isinstance(several, Interval) else several.args


def _numbers_apart(gold: Expr, answer: Expr) -> bool:
    """Compared by the size of the terms that remain of their difference."""
    if gold == answer or gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr):  # 9 % passes for 9
        return False
    difference = gold - answer
    if difference.free_symbols:
        return False
    rounded = gold.has(Float) or answer.has(Float)
    terms = (gold, answer) if rounded and not gold.free_symbols else Add.make_args(difference)
    size = max(abs(term.evalf(30)) for term in terms)
    return bool(abs(difference.evalf(30)) > (ROUNDED if rounded else EXACT) * size)
