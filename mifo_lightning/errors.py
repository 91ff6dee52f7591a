"""What ends a run: bad input (exit status 2), training that has broken down (1), a signal (128 + its number)."""


class InputError(ValueError):
    """Bad input: the message is one line that names the file, row or key, the value and what is allowed."""


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
