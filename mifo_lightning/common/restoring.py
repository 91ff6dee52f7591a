"""Restoring a run from a checkpoint: whatever does not fit this run is one line that names the part."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mifo_lightning.common.errors import InputError


@contextmanager
def restoring(part: str) -> Iterator[None]:
    """Around the restoring of one part of a checkpoint; also a decorator.

    Args:
        part: What it is called in the line.

    Raises:
        InputError: For what a state of another shape leads to.
    """
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"ckpt_path: {part} in the checkpoint does not fit this run ({what:.200})") from error


def check_moment(parameter: Tensor, name: str, value: object) -> None:
    """Raise a ValueError if a slot of an optimizer is neither of its parameter's shape nor a number."""
    if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameter.shape:
        raise ValueError(f"{name} is {list(value.shape)} for a parameter of {list(parameter.shape)}")
