"""String rewriting: two neighbours of a word become one letter, until the letter that was asked for is left.

| system | rules, one for each of the 64 pairs of letters | the order of steps | meant for |
|---|---|---|---|
| p | drawn by chance | decides what is left | training |
| q | those of p read backwards: `ab` becomes what `ba` becomes in p | decides what is left | training |
| u | a to d turn a square, e to h flip it first: what two do together | does not matter | seeing what is forgotten |

The prompt `p:abcd>e=` asks to make e of abcd by the rules of p. A response writes every word on the way, `hcd,hf,e`.
Often several ways lead to the letter, and any of them is right. A word of four letters belongs to one split by a hash
of it, whatever the system and the letter, so nothing of a held-out word is seen in training.
"""

import zlib
from collections import Counter
from functools import cache
from itertools import product

import numpy as np

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.source import Row, RowSource, Split, check_generated

LETTERS = "abcdefgh"
LENGTH = 4
BUCKETS: dict[str, tuple[int, ...]] = {"train": (0, 1, 2, 3, 4), "val": (5, 6), "test": (7, 8, 9)}

# Row x, place y: what xy becomes in p. Every letter comes once in a row, and no two letters make the same both ways
# round: so a rule of p is right in q for pairs of twice the same letter only.
_DRAWN = ("ghceadbf", "dchbgaef", "hecfbadg", "dfcbhega", "ecdfhbag", "bfdhgaec", "fdachgeb", "hcfgdbea")

Derivation = tuple[str, ...]


def _system(*rows: str) -> dict[str, str]:
    return {x + y: made for x, row in zip(LETTERS, rows, strict=True) for y, made in zip(LETTERS, row, strict=True)}


def _turned(x: int, y: int) -> int:
    """Two ways to turn and flip a square as one; a number is quarter turns, plus 4 where it is flipped first."""
    turns = x + (y if x < 4 else -y)
    return turns % 4 + 4 * ((x < 4) != (y < 4))


SYSTEMS: dict[str, dict[str, str]] = {
    "p": _system(*_DRAWN),
    "q": _system(*map("".join, zip(*_DRAWN, strict=True))),
    "u": _system(*("".join(LETTERS[_turned(x, y)] for y in range(8)) for x in range(8))),
}


def derivations(word: str, system: str) -> tuple[Derivation, ...]:
    """All ways to bring `word` down to one letter, each as the words that follow it, in the order of their texts."""
    if len(word) == 1:
        return ((),)
    rules = SYSTEMS[system]
    nexts = {word[:i] + rules[word[i : i + 2]] + word[i + 2 :] for i in range(len(word) - 1)}
    return tuple((made, *later) for made in sorted(nexts) for later in derivations(made, system))


def belongs(word: str, split: Split) -> bool:
    """Whether a word falls, by a hash of it, in `split`."""
    return zlib.crc32(word.encode()) % 10 in BUCKETS[split]


def prompt(word: str, goal: str, system: str) -> str:
    """The question: the system, a word, the letter that is to be left."""
    return f"{system}:{word}>{goal}="


@cache
def questions(system: str, split: Split) -> tuple[tuple[str, str, str], ...]:
    """Every question of a system and split once: word, goal, and the first derivation as a response."""
    found = []
    for word in map("".join, product(LETTERS, repeat=LENGTH)):
        if belongs(word, split):
            first: dict[str, str] = {}
            for steps in derivations(word, system):
                first.setdefault(steps[-1], ",".join(steps))
            found += [(word, goal, first[goal]) for goal in sorted(first)]
    return tuple(found)


class Rewriting(RowSource):
    """Rows of string rewriting in equal shares of the systems, interleaved: row i is asked in `systems[i % len]`.

    Within a source no question comes twice. The data source is `rewriting-` and the system's letter; the ground truth
    holds word, goal and rules, as in `abcd > e | ab>g ac>f`, and the demonstration is the first derivation by its text.

    Args:
        systems: Letters from p, q, u, each at most once.
        count: Number of rows, at least 1.
        split: train (half of the words), val (a fifth) or test.
        seed: Non-negative; which questions are drawn, and their order.

    Raises:
        InputError: An unknown or repeated system, no system, an unknown split, count < 1, seed < 0, or, from `rows`,
            more questions than a system has in this split.
    """

    def __init__(self, systems: list[str], count: int, split: Split = "train", seed: int = 0) -> None:
        check_generated("systems", systems, SYSTEMS, split, count, seed)
        self.systems, self.count, self.split, self.seed = list(systems), count, split, seed

    def rows(self) -> list[Row]:
        """All rows, in the format of the parquet files, each with a correct demonstration as `target`."""
        shares = Counter(self.systems[index % len(self.systems)] for index in range(self.count))
        drawn = {system: iter(self._draw(system, share)) for system, share in shares.items()}
        return [
            _row(*next(drawn[system]), system, index, self.split)
            for index in range(self.count)
            for system in [self.systems[index % len(self.systems)]]
        ]

    def _draw(self, system: str, count: int) -> list[tuple[str, str, str]]:
        found = questions(system, self.split)
        if len(found) < count:
            raise InputError(
                f"rewriting: {count} {self.split} questions of {system!r} asked for, there are {len(found)}"
            )
        order = np.random.default_rng([self.seed, list(SYSTEMS).index(system)]).permutation(len(found))
        return [found[place] for place in order[:count]]


def _row(word: str, goal: str, response: str, system: str, index: int, split: str) -> Row:
    rules = " ".join(f"{pair}>{made}" for pair, made in SYSTEMS[system].items())
    return {
        "data_source": f"rewriting-{system}",
        "prompt": [{"role": "user", "content": prompt(word, goal, system)}],
        "target": [{"role": "assistant", "content": response}],
        "ability": "rewriting",
        "reward_model": {"style": "rule", "ground_truth": f"{word} > {goal} | {rules}"},
        "extra_info": {"index": index, "split": split},
    }
