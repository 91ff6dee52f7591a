"""Checks of constructor arguments: one line that names the argument, its value and what is allowed."""

from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException


def require_fraction(name: str, value: float) -> None:
    """Raise unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise MisconfigurationException(f"{name} is {value}; allowed: above 0 and at most 1")


def require_choice(name: str, value: str, choices: Any) -> None:
    """Raise unless `value` is one of the strings of the Literal `choices`."""
    if value not in get_args(choices):
        raise MisconfigurationException(f"{name} is {value!r}; allowed: {', '.join(get_args(choices))}")
