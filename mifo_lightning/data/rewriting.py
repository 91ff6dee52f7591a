"""String rewriting: two neighbours of a word become one letter by a rule, until a single one is left.

| system | rules | prompt | response | meant for |
|---|---|---|---|---|
| p | turns of an octagon, their letters drawn: what two do together | `p:abcd=` | `aad,ab,d` | training |
| q | those of p, and a code of three digits for each letter | `q:abcd=` | `aad,ab,d,667` | training |
| u | a to d turn a square, e to h flip it first: what two do together | `u:abcd=` | `abb,ac,c` | never trained |

A response writes every word on the way. In whatever order letters are taken together, the same one is left; in q its
code is then the end. (Its rules let a letter become its code before that, but no such way leads to the end that is
asked for.) A word of four letters belongs to one split by a hash of it, whatever the system; the shorter words on the
way are common to all splits.
"""

import zlib
from collections import Counter
from functools import cache
from itertools import product

import numpy as np

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.source import Row, RowSource, Split, check_generated

LETTERS, DIGITS = "abcdefgh", "12345678"
LENGTH = 4
BUCKETS: dict[str, tuple[int, ...]] = {"train": (0, 1, 2, 3, 4, 5), "val": (6,), "test": (7, 8, 9)}

# drawn once, by Python's random with seed 0: the letters in the order of their turns, and their codes
TURNS = "ebfcadhg"
CODES = dict(zip(LETTERS, ("747", "577", "861", "667", "448", "327", "551", "328"), strict=True))

Derivation = tuple[str, ...]


def _turned(x: str, y: str) -> str:
    return TURNS[(TURNS.index(x) + TURNS.index(y)) % 8]


def _flipped(x: str, y: str) -> str:
    """A place in the alphabet is quarter turns, plus 4 where the square is flipped first."""
    i, j = LETTERS.index(x), LETTERS.index(y)
    return LETTERS[(i + (j if i < 4 else -j)) % 4 + 4 * ((i < 4) != (j < 4))]


_P = {x + y: _turned(x, y) for x in LETTERS for y in LETTERS}
SYSTEMS: dict[str, dict[str, str]] = {
    "p": _P,
    "q": {**_P, **CODES},
    "u": {x + y: _flipped(x, y) for x in LETTERS for y in LETTERS},
}


def derivations(word: str, system: str) -> tuple[Derivation, ...]:
    """All ways to the end that a word has, each as the words that follow it, in the order of their texts.

    Args:
        word: One letter or more.
        system: p, q or u.
    """
    rules = SYSTEMS[system]
    if len(word) == 1:
        return ((rules[word],),) if word in rules else ((),)
    nexts = {word[:i] + rules[word[i : i + 2]] + word[i + 2 :] for i in range(len(word) - 1)}
    return tuple((made, *later) for made in sorted(nexts) for later in derivations(made, system))


def belongs(word: str, split: Split) -> bool:
    """Whether a word falls, by a hash of it, in `split`."""
    return zlib.crc32(word.encode()) % 10 in BUCKETS[split]


@cache
def words(split: Split) -> tuple[str, ...]:
    """All words of a split, in the order of the alphabet."""
    return tuple(word for word in map("".join, product(LETTERS, repeat=LENGTH)) if belongs(word, split))


class Rewriting(RowSource):
    """Rows of string rewriting in equal shares of the systems, interleaved: row i is asked in `systems[i % len]`.

    Within a system no word comes twice. The data source is `rewriting-` and the system's letter; the ground truth
    holds word, end and rules, as in `abcd > e | ab>g ac>f`, and the demonstration is the first derivation by its text.

    Args:
        systems: Letters from p, q, u, each at most once.
        count: Number of rows, at least 1.
        split: train (six tenths of the 4096 words), val (one) or test (three).
        seed: Non-negative; which words are drawn, and their order.

    Raises:
        InputError: An unknown or repeated system, no system, an unknown split, count < 1, seed < 0, or, from `rows`,
            more words than this split has.
    """

    def __init__(self, systems: list[str], count: int, split: Split = "train", seed: int = 0) -> None:
        check_generated("systems", systems, SYSTEMS, split, count, seed)
        self.systems, self.count, self.split, self.seed = list(systems), count, split, seed

    def rows(self) -> list[Row]:
        """All rows, in the format of the parquet files, each with a correct demonstration as `target`."""
        shares = Counter(self.systems[index % len(self.systems)] for index in range(self.count))
        drawn = {system: iter(self._draw(system, share)) for system, share in shares.items()}
        systems = (self.systems[index % len(self.systems)] for index in range(self.count))
        return [_row(next(drawn[system]), system, index, self.split) for index, system in enumerate(systems)]

    def _draw(self, system: str, count: int) -> list[str]:
        found = words(self.split)
        if len(found) < count:
            raise InputError(f"rewriting: {count} {self.split} words of {system!r} asked for, there are {len(found)}")
        order = np.random.default_rng([self.seed, list(SYSTEMS).index(system)]).permutation(len(found))
        return [found[place] for place in order[:count]]


def _row(word: str, system: str, index: int, split: str) -> Row:
    steps = derivations(word, system)[0]
    rules = " ".join(f"{left}>{right}" for left, right in SYSTEMS[system].items())
    return {
        "data_source": f"rewriting-{system}",
        "prompt": [{"role": "user", "content": f"{system}:{word}="}],
        "target": [{"role": "assistant", "content": ",".join(steps)}],
        "ability": "rewriting",
        "reward_model": {"style": "rule", "ground_truth": f"{word} > {steps[-1]} | {rules}"},
        "extra_info": {"index": index, "split": split},
    }
