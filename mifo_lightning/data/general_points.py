"""GeneralPoints, the 24 game: four cards, + - * / and brackets, each card once, the value 24 (arXiv 2509.12235).

| rule | prompt | J, Q, K count | hands | meant for |
|---|---|---|---|---|
| ten | `t:K538=` | 10 each | all solvable ones | training; in distribution |
| literal | `l:K538=` | 11, 12, 13 | solvable ones with at least one J, Q or K | out of distribution |

Cards are A 2 3 4 5 6 7 8 9 T J Q K. A response is a chain of steps, `13-5=8,8*3=24,24*1=24` for K 5 3 A by the literal
rule: each takes numbers at hand, each once, and puts its value back; only 24 is left at the end. A value that is no
whole number is never written: its expression goes in brackets into the next step, as in `8/(3-(8/3))=24`.
A hand belongs to one split by a hash of its sorted values, so neither order nor rule leaks a solution.
"""

import zlib
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from itertools import combinations

import numpy as np

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.source import Row, RowSource, Split, check_generated

Number = int | Fraction
Step = tuple[Number, str, Number, Number]

TARGET, CARDS = 24, 4
RANKS = "A23456789TJQK"
FIRST_FACE = 10  # index of the jack
RULES: dict[str, str] = {"ten": "t:", "literal": "l:"}
SEEN = "-seen"  # after a rule: hands of the train split, whatever the split
BUCKETS: dict[str, tuple[int, ...]] = {"train": (0, 1, 2, 3, 4, 5), "val": (6, 7), "test": (8, 9)}


def values(ranks: tuple[int, ...], rule: str) -> tuple[int, ...]:
    """What cards count: indices into `RANKS` -> numbers 1 to 10 (ten) or 1 to 13 (literal), in the same order."""
    return tuple(min(rank + 1, 10) if rule == "ten" else rank + 1 for rank in ranks)


def prompt(ranks: tuple[int, ...], rule: str) -> str:
    """The question: the rule's letter, the cards in order, an equals sign."""
    return f"{RULES[rule]}{''.join(RANKS[rank] for rank in ranks)}="


@cache
def ways(numbers: tuple[Number, ...]) -> tuple[tuple[Step, ...], ...]:
    """All ways to merge the sorted `numbers`, two at a time, into 24; empty if there is none.

    Every difference is taken the way that is not negative; that loses no solution, as signs can move to the root.
    """
    if len(numbers) == 1:
        return ((),) if numbers[0] == TARGET else ()
    found = []
    for i, j in sorted({(numbers[i], numbers[j]): (i, j) for i, j in combinations(range(len(numbers)), 2)}.values()):
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for step in results(numbers[i], numbers[j]):
            later = ways(tuple(sorted((*rest, step[3]))))
            found += [(step, *steps) for steps in later]
    return tuple(found)


@cache
def solutions(numbers: tuple[int, ...]) -> tuple[str, ...]:
    """All solutions of the sorted `numbers` as responses; whole values and small ones first, then by text."""
    ranked = {}
    for steps in ways(numbers):
        made = [result for *_, result in steps]
        fractions = sum(isinstance(result, Fraction) for result in made)
        text = written(steps)
        ranked[text] = (fractions, max(made), text)
    return tuple(sorted(ranked, key=ranked.__getitem__))


def written(steps: tuple[Step, ...]) -> str:
    """A response with these steps; a step without a whole result is written inside the step that uses it."""
    pending: list[tuple[Number, str]] = []
    parts = []
    for left, operator, right, result in steps:
        text = f"{_operand(left, pending)}{operator}{_operand(right, pending)}"
        if isinstance(result, Fraction):
            pending.append((result, f"({text})"))
        else:
            parts.append(f"{text}={result}")
    return ",".join(parts)


def results(a: Number, b: Number) -> Iterator[Step]:
    """The steps that two numbers allow; differences are not negative, equal quotients and differences come once."""
    high, low = (a, b) if a >= b else (b, a)
    yield high, "+", low, _whole(high + low)
    yield high, "*", low, _whole(high * low)
    yield high, "-", low, _whole(high - low)
    if low:
        yield high, "/", low, _whole(Fraction(high) / low)
    if high != low:
        yield low, "/", high, _whole(Fraction(low) / high)


def belongs(numbers: tuple[int, ...], split: Split) -> bool:
    """Whether a hand with these sorted values falls, by a hash of them, in `split`."""
    return zlib.crc32(" ".join(map(str, numbers)).encode()) % 10 in BUCKETS[split]


def hands(rule: str, split: Split, seed: int) -> Iterator[tuple[int, ...]]:
    """All different solvable hands of the rule and split, as ordered ranks, in random order."""
    order = np.random.default_rng([seed, list(RULES).index(rule)]).permutation(len(RANKS) ** CARDS)
    cards = np.stack(np.unravel_index(order, (len(RANKS),) * CARDS), axis=1)
    for ranks in map(tuple, cards.tolist()):
        numbers = tuple(sorted(values(ranks, rule)))
        faced = rule == "ten" or max(ranks) >= FIRST_FACE
        if faced and belongs(numbers, split) and ways(numbers):
            yield ranks


class GeneralPoints(RowSource):
    """Rows of the 24 game in equal shares of the rules, interleaved: row i is played by `rules[i % len(rules)]`.

    Within a source no hand comes twice in the same order. The data source is `points-` and the rule's name, the ground
    truth the cards' values and the target, as in `10 5 3 8 > 24`, the demonstration the solver's first solution.

    Args:
        rules: Names from ten, literal, each at most once; literal asks only hands with a face card. `ten-seen` and
            `literal-seen` ask hands of the train split, in the order in which the same seed trains on them: what was
            only learned by heart is right there and wrong on other hands.
        count: Number of rows, at least 1.
        split: train (six tenths of the hands), val or test (two each).
        seed: Non-negative; which hands are drawn, and their order.

    Raises:
        InputError: An unknown or repeated rule, no rule, an unknown split, seen hands in the train split, count < 1,
            seed < 0, or, from `rows`, more hands than a rule has in this split.
    """

    def __init__(self, rules: list[str], count: int, split: Split = "train", seed: int = 0) -> None:
        check_generated("rules", rules, [*RULES, *(rule + SEEN for rule in RULES)], split, count, seed)
        if split == "train" and any(rule.endswith(SEEN) for rule in rules):
            raise InputError(f"rules: {rules} given, allowed in the train split are {', '.join(RULES)}")
        self.rules, self.count, self.split, self.seed = list(rules), count, split, seed

    def rows(self) -> list[Row]:
        """All rows, in the format of the parquet files, each with a correct demonstration as `target`."""
        splits: dict[str, Split] = {rule: "train" if rule.endswith(SEEN) else self.split for rule in self.rules}
        supplies = {rule: hands(rule.removesuffix(SEEN), splits[rule], self.seed) for rule in self.rules}
        drawn: Counter[str] = Counter()
        rows = []
        for index in range(self.count):
            rule = self.rules[index % len(self.rules)]
            ranks = next(supplies[rule], None)
            if ranks is None:
                share = len(range(self.rules.index(rule), self.count, len(self.rules)))
                asked = f"{share} {splits[rule]} hands of {rule!r}"
                raise InputError(f"points: {asked} asked for, there are {drawn[rule]}")
            drawn[rule] += 1
            rows.append(_row(ranks, rule, index, splits[rule]))
        return rows


def _row(ranks: tuple[int, ...], name: str, index: int, split: str) -> Row:
    rule = name.removesuffix(SEEN)
    numbers = values(ranks, rule)
    return {
        "data_source": f"points-{name}",
        "prompt": [{"role": "user", "content": prompt(ranks, rule)}],
        "target": [{"role": "assistant", "content": solutions(tuple(sorted(numbers)))[0]}],
        "ability": "points",
        "reward_model": {"style": "rule", "ground_truth": f"{' '.join(map(str, numbers))} > {TARGET}"},
        "extra_info": {"index": index, "split": split},
    }


def _whole(number: Number) -> Number:
    return number.numerator if number.denominator == 1 else number


def _operand(number: Number, pending: list[tuple[Number, str]]) -> str:
    """A whole number as it is, another one as the expression that made it."""
    if isinstance(number, int):
        return str(number)
    place = next(i for i, (value, _) in enumerate(pending) if value == number)
    return pending.pop(place)[1]
