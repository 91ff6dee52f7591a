"""The command line."""

from mifo_lightning.cli.command_line import MifoCLI, make_cli
from mifo_lightning.cli.entry import main
from mifo_lightning.cli.parts import METHOD, MONITORS

__all__ = ["METHOD", "MONITORS", "MifoCLI", "main", "make_cli"]
