"""The one exception that means "the user's input is wrong"; the command line prints it as one line and exits with 2."""


class InputError(ValueError):
    """Bad input: the message is one line that names the file, row or key, the value and what is allowed."""
