"""One seed for a run: a part that is given none follows `seed_everything`, and a run that is resumed keeps its own."""

import os
import secrets

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from mifo_callbacks.collectives import from_first_rank

GLOBAL = "PL_GLOBAL_SEED"  # where `lightning.seed_everything` leaves its seed
LARGEST = 2**32 - 1  # NumPy's


class Seed:
    """The seed of one part of a run, settled at its first use.

    Args:
        given: The seed, in [0, 2^32); None follows `lightning.seed_everything`, or, where that was not called, a number
            that the first rank draws, prints and tells the others, and that the parts after it follow too.
        name: What messages call it.

    Raises:
        MisconfigurationException: If the given seed is out of range.
    """

    def __init__(self, given: int | None, name: str) -> None:
        if given is not None and not 0 <= given <= LARGEST:
            raise MisconfigurationException(f"{name} is {given}; allowed: 0 to {LARGEST}, or none")
        self.given, self.name = given, name
        self.settled = given  # for a checkpoint; None before the first use

    @property
    def value(self) -> int:
        """The seed; collective at the first use where nothing else says what it is."""
        if self.settled is None:
            self.settled = global_seed()
        return self.settled

    def restore(self, number: int | None) -> None:
        """Take the seed of a checkpoint's run, if it has one.

        Raises:
            MisconfigurationException: If another one was given.
        """
        if number is not None and self.given not in (None, number):
            raise MisconfigurationException(
                f"{self.name} is {self.given}, and {number} in the run of the checkpoint; allowed: the same, or none"
            )
        self.settled = self.settled if number is None else number


def global_seed() -> int:
    """That of `seed_everything`; drawn, printed and remembered in its place where that was not called; collective then.

    The random state of torch and other libraries is left alone.
    """
    if GLOBAL not in os.environ:
        drawn = from_first_rank(secrets.randbelow(LARGEST + 1))
        os.environ[GLOBAL] = str(drawn)
        rank_zero_info(f"seed: {drawn}, drawn at random; seed_everything({drawn}) repeats this run")
    return int(os.environ[GLOBAL])
