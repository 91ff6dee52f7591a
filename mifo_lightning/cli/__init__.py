"""The command line."""

import sys

from mifo_lightning.checkpoints import interruption


def main(args: list[str] | None = None) -> None:
    """Run a command line, by default this process's own; see `entry.main`."""
    from mifo_lightning.cli import entry  # it loads torch

    entry.main(args)


def program() -> None:
    """The program: `mifo`, or `python -m mifo_lightning`."""
    interruption.install()  # loading torch takes seconds; at the end it stays, for what runs at exit
    with interruption.handled(sys.argv[1:]):
        main()
