"""What ends a run: bad input (exit status 2), training that has broken down (1), a signal (128 + its number)."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from inspect import signature
from typing import Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Bad input: the message is one line that names the file, row or key, the value and what is allowed."""


def require(key: str, value: object, good: bool, what: str) -> None:
    """Raise an InputError that names the key, its value and what it must be, unless the value is good."""
    if not good:
        raise InputError(f"{key}: {value} is not allowed; it must be {what}")


def check_kinds(key: str, given: Mapping[str, object], constructor: type) -> None:
    """Raise an InputError for a group of settings that is none, such as a dict in the place of its dataclass.

    Args:
        key: Names what is constructed.
        given: The arguments by name.
        constructor: Its defaults say which class a group has.
    """
    for name, parameter in signature(constructor).parameters.items():
        kind = type(parameter.default)
        if is_dataclass(kind):
            require(f"{key}.{name}", repr(given[name])[:80], isinstance(given[name], kind), f"a {kind.__name__}")


def require_choices(key: str, settings: object) -> None:
    """Raise an InputError for a field of a dataclass whose type is a Literal that its value is none of."""
    try:
        hints = get_type_hints(type(settings))
    except NameError:  # a subclass of somebody's, with types that are imported for a type checker alone
        return
    for name, hint in hints.items():
        if get_origin(hint) is Literal:
            *others, last = get_args(hint)
            value, listed = getattr(settings, name), ", ".join(map(str, others))
            require(f"{key}.{name}", value, value in (*others, last), f"{listed} or {last}" if listed else f"{last}")


class TrainingError(RuntimeError):
    """Training has broken down: the message is one line that names phase, step and metric; what was saved stays."""


class Interrupted(BaseException):
    """A signal has asked for the end: no error, and nothing that handles errors may keep it.

    Args:
        signum: The signal.
        together: Whether all ranks raise it at the same safe point, so that they can still act together.

    Attributes:
        step: Optimizer steps that were done.
        checkpoint: The checkpoint that goes on from there; None: there is none.
    """

    def __init__(self, signum: int, together: bool = False) -> None:
        super().__init__(f"signal {signum}")
        self.signum, self.together = signum, together
        self.step = 0
        self.checkpoint: str | None = None


# what else than torch.OutOfMemoryError says that there is no memory left
NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory on any kind of device."""
    from torch import OutOfMemoryError  # here: what is above is needed before torch is loaded

    return isinstance(error, OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)
