"""The argument parser of the command line: every error is one line that says which argument is meant."""

import difflib
import re
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from mifo_lightning.config_files import with_place
from mifo_lightning.terminal import fail


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line that says which argument is meant."""

    arguments: list[str] = []  # what the command line gave
    empty: dict[str, str] = {}  # where its configuration files leave a key empty

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit with status 2."""
        text = " ".join(message.split())
        quoted = re.findall(r"['\"]([\w.]+)['\"]", text)
        for argument in self.arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and name[2:] not in text and any(name.endswith(word) for word in quoted):
                text = f"{name}: {text}"
        unknown = re.search(r"unrecognized arguments: (--[\w.]+)", text)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=3)
            text += f"; did you mean {' or '.join(near)}?" if near else "; `--help` lists all"
        fail(with_place(text, self.empty))
