"""Choices that have a short name, or are an object of one's own."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from mifo_lightning.common.errors import InputError

T = TypeVar("T")


def named(choice: "str | T", table: Mapping[str, Callable[[], T]], kind: type[T], key: str) -> T:
    """The object that a name in `table` stands for; an object of `kind` is itself.

    Raises:
        InputError: It is neither; the line names `key` and what is allowed.
    """
    if isinstance(choice, kind):
        return choice
    if isinstance(choice, str) and choice in table:
        return table[choice]()
    raise InputError(
        f"{key}: {choice!r:.80} is not allowed; it must be one of {', '.join(table)}, or the class_path of a "
        f"{kind.__name__}"
    )
