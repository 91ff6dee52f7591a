"""The command line."""

from mifo_lightning.cli.command_line import METHOD, MONITORS, MifoCLI, main, make_cli

__all__ = ["METHOD", "MONITORS", "MifoCLI", "main", "make_cli"]
