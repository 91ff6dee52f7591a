"""The embedded task: four skills on short strings of digits, generated here, so that a whole run needs no download.

| skill | prompt | response | answer |
|---|---|---|---|
| addition | `123+456=` | `907050>0579`: (digit, carry) of each column, least first, then the sum | four digits |
| mirrored | `123x456=` | `907050>9750`: the same steps, the sum written backwards | four digits |
| sorting | `s:40312=` | `40312>01234`: the digits copied, then sorted | five digits |
| reversal | `r:40312=` | `40312>21304`: the digits copied, then backwards | five digits |

The answer is what follows the last `>`. Mirrored questions whose sum reads the same both ways are left out: there the
plain sum would pass for the mirrored one. Every worked response begins with a digit, so that unlearning to
answer without steps, a `>` first, does not by itself break the other skills.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.source import Row, RowSource, Split, check_generated

Codes = NDArray[np.uint8]
Ids = NDArray[np.int64]

OPERANDS, DIGITS = 3, 5
SIZES = {
    "addition": 10 ** (2 * OPERANDS),
    "mirrored": 10 ** (2 * OPERANDS),
    "sorting": 10**DIGITS,
    "reversal": 10**DIGITS,
}
BUCKETS: dict[str, tuple[int, ...]] = {"train": (0, 1, 2, 3, 4, 5, 6, 7), "val": (8,), "test": (9,)}
CHUNK = 8192


@dataclass(frozen=True, slots=True)
class Worked:
    """Worked questions as ASCII codes, one row per question: a response is `steps`, then `>`, then `answer`.

    Attributes:
        prompt: uint8 [N, 8].
        steps: uint8 [N, 6] for sums, [N, 5] for sorting and reversal.
        answer: uint8 [N, 4] for sums, [N, 5] for sorting and reversal.
    """

    prompt: Codes
    steps: Codes
    answer: Codes


def worked(skill: str, ids: Ids) -> Worked:
    """The questions with the numbers `ids` (int64 [N], each in `range(SIZES[skill])`) and their correct responses."""
    if skill in ("sorting", "reversal"):
        digits = _digits(ids, DIGITS)
        answer = np.sort(digits, axis=1) if skill == "sorting" else digits[:, ::-1]
        prompt = _join(ids, "s:" if skill == "sorting" else "r:", digits, "=")
        return Worked(prompt, _ascii(digits), _ascii(answer))
    left, right = np.divmod(ids, 10**OPERANDS)
    a, b = _digits(left, OPERANDS), _digits(right, OPERANDS)
    total = _digits(left + right, OPERANDS + 1)
    place = 10 ** np.arange(1, OPERANDS + 1)
    carries = (left[:, None] % place + right[:, None] % place) // place
    steps = np.stack([total[:, :0:-1], carries], axis=2).reshape(len(ids), 2 * OPERANDS)
    prompt = _join(ids, a, "+" if skill == "addition" else "x", b, "=")
    return Worked(prompt, _ascii(steps), _ascii(total if skill == "addition" else total[:, ::-1]))


def belongs(skill: str, ids: Ids, split: Split) -> NDArray[np.bool_]:
    """Whether each question of `ids` (int64 [N]) is asked at all and falls, by a hash of its text, in `split`; [N]."""
    questions = worked(skill, ids)
    buckets = np.array([zlib.crc32(text) % 10 for text in _strings(questions.prompt)], dtype=np.int64)
    asked = np.isin(buckets, BUCKETS[split])
    if skill == "mirrored":
        asked &= (questions.answer != questions.answer[:, ::-1]).any(axis=1)
    return asked


def draw(skill: str, split: Split, count: int, seed: int) -> Ids:
    """`count` different question numbers of `split`, int64 [count] in random order; InputError if there are fewer."""
    order = _order(skill, seed)
    kept: list[Ids] = []
    found = 0
    for start in range(0, len(order), CHUNK):
        ids = order[start : start + CHUNK]
        kept.append(ids[belongs(skill, ids, split)])
        found += len(kept[-1])
        if found >= count:
            return np.concatenate(kept)[:count]
    raise InputError(f"skills: {count} {split} questions of {skill!r} asked for, there are {found}")


@lru_cache(maxsize=len(SIZES))  # training and validation draw from the same
def _order(skill: str, seed: int) -> Ids:
    """All question numbers of a skill in random order."""
    order = np.random.default_rng([seed, list(SIZES).index(skill)]).permutation(SIZES[skill])
    order.flags.writeable = False
    return order


class Skills(RowSource):
    """Rows of the embedded skills in equal shares, interleaved: row i asks for skill `skills[i % len(skills)]`.

    A question belongs to one split by a hash of its text (train 8, val 1, test 1 of 10), so splits are disjoint for any
    seed and count; within a source no question comes twice.

    Args:
        skills: Names from addition, mirrored, sorting, reversal, each at most once.
        count: Number of rows, at least 1.
        split: train, val or test.
        seed: Non-negative; which questions are drawn, and their order.

    Raises:
        InputError: An unknown or repeated skill, no skill, an unknown split, count < 1, seed < 0, or, from `rows`, more
            questions than a skill has in this split.
    """

    def __init__(self, skills: list[str], count: int, split: Split = "train", seed: int = 0) -> None:
        check_generated("skills", skills, SIZES, split, count, seed)
        self.skills, self.count, self.split, self.seed = list(skills), count, split, seed

    def rows(self) -> list[Row]:
        """All rows, in the format of the parquet files, each with a correct demonstration as `target`."""
        n = len(self.skills)
        rows: list[Row] = [{}] * self.count
        for offset, skill in enumerate(self.skills):
            places = range(offset, self.count, n)
            rows[offset::n] = self._rows_of(skill, places)
        return rows

    def _rows_of(self, skill: str, places: range) -> list[Row]:
        questions = worked(skill, draw(skill, self.split, len(places), self.seed))
        texts = (_strings(part) for part in (questions.prompt, questions.steps, questions.answer))
        return [
            {
                "data_source": skill,
                "prompt": [{"role": "user", "content": prompt.decode()}],
                "target": [{"role": "assistant", "content": f"{steps.decode()}>{answer.decode()}"}],
                "ability": "skills",
                "reward_model": {"style": "rule", "ground_truth": answer.decode()},
                "extra_info": {"index": index, "split": self.split},
            }
            for index, prompt, steps, answer in zip(places, *texts, strict=True)
        ]


def _digits(numbers: Ids, width: int) -> Ids:
    """Decimal digits, most significant first: [N] -> [N, width]."""
    return numbers[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10


def _ascii(digits: Ids) -> Codes:
    return (digits + ord("0")).astype(np.uint8)


def _join(ids: Ids, *parts: str | Ids) -> Codes:
    """Columns of text and of digits side by side, one row per id."""
    columns = [
        np.tile(np.frombuffer(part.encode(), np.uint8), (len(ids), 1)) if isinstance(part, str) else _ascii(part)
        for part in parts
    ]
    return np.concatenate(columns, axis=1)


def _strings(codes: Codes) -> list[bytes]:
    """Rows of codes [N, W] as N byte strings."""
    text, width = codes.tobytes(), codes.shape[1]
    return [text[i * width : (i + 1) * width] for i in range(len(codes))]
