"""Where rows come from: anything with `rows()`; files and hub names are read by `data.rows`."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, Literal, get_args

from mifo_lightning.common.errors import InputError

Row = dict[str, Any]
Split = Literal["train", "val", "test"]


class RowSource(ABC):
    """A generator of rows in the same format as the parquet files; give its `class_path` where a path could stand.

    A row has `data_source` (str), `prompt` (list of {role, content}), `reward_model` ({style, ground_truth}) and, if it
    has a demonstration, `target` (list with one {role: assistant, content}). Plain texts, a number
    as truth and no source are completed as those of files are.
    """

    @abstractmethod
    def rows(self) -> list[Row]:
        """All rows, in a fixed order that depends on the constructor's arguments only."""


def check_generated(key: str, names: list[str], allowed: Collection[str], split: str, count: int, seed: int) -> None:
    """Check the arguments of a generator of rows; raises InputError with the name of the first that is not allowed.

    Args:
        key: What `names` is called: the kinds of question to generate, each at most once.
        names: The given ones.
        allowed: All there are.
        split: train, val or test.
        count: Rows, at least 1.
        seed: Non-negative.
    """
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise InputError(f"{key}: {unknown or names} given, allowed are {', '.join(allowed)}")
    if len(set(names)) < len(names):
        raise InputError(f"{key}: {names} given, allowed is each once")
    if split not in get_args(Split):
        raise InputError(f"split: {split!r} given, allowed are {', '.join(get_args(Split))}")
    if count < 1:
        raise InputError(f"count: {count} given, allowed is 1 or more")
    if seed < 0:
        raise InputError(f"seed: {seed} given, allowed is 0 or more")
