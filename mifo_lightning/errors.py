"""The two exceptions that a user reads: bad input (exit status 2), and training that has broken down (1)."""


class InputError(ValueError):
    """Bad input: the message is one line that names the file, row or key, the value and what is allowed."""


class TrainingError(RuntimeError):
    """Training has broken down: the message is one line that names phase, step and metric; what was saved stays."""
