"""W&B through Lightning's logger: begun in one place, survived when its service dies, ended in one place."""

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from mifo_lightning.common.errors import InputError


class SurvivingRun:
    """A W&B run whose end a training survives: its first failure is one warning, nothing is sent after it.

    Args:
        run: What `wandb.init` returned; all else is asked of it.

    Attributes:
        lost: Whether it has failed.
    """

    def __init__(self, run: Any) -> None:
        self._run, self.lost = run, False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # a copy has no run yet
        found = getattr(self._run, name)
        return partial(self._call, found) if callable(found) else found

    def _call(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if self.lost:
            return None
        try:
            return method(*arguments, **named)
        except Exception as error:  # W&B raises those of its sockets, its own and others
            self.lost = True
            rank_zero_warn(
                f"trainer.logger: W&B has failed ({_one_line(error)}); the run goes on without it, its other files are "
                "whole, and what W&B wrote before can still be synced"
            )
            return None


def prepare_runs(loggers: Iterable[Logger]) -> None:
    """Have W&B say where it writes and nothing else: it warns of what nobody set, and the table at the end is ours."""
    for logger in _wandb(loggers):
        if logger._wandb_init.get("settings") is None:
            logger._wandb_init["settings"] = {"quiet": True}
        if logger._wandb_init.get("anonymous") is None:
            logger._wandb_init.pop("anonymous", None)  # Lightning names it, unset; W&B warns of the name alone


@rank_zero_only
def begin_runs(loggers: Iterable[Logger]) -> None:
    """Begin the W&B runs, once nothing is left to refuse.

    Raises:
        InputError: W&B cannot begin one.
    """
    for logger in _wandb(loggers):
        if logger.save_dir:
            Path(logger.save_dir).mkdir(parents=True, exist_ok=True)  # "git root does not exist"
        try:
            run = logger.experiment
        except Exception as error:
            raise InputError(
                f"trainer.logger: W&B cannot begin a run ({_one_line(error)}); set trainer.logger.init_args.mode "
                "offline, or trainer.logger false"
            ) from error
        if not isinstance(run, SurvivingRun):
            logger._experiment = SurvivingRun(run)  # type: ignore[assignment]


def end_runs(loggers: Iterable[Logger], status: int = 0) -> None:
    """End the W&B runs that have begun; W&B would do it at the end of the process, in colours whatever listens."""
    for logger in _wandb(loggers):
        run = logger._experiment
        if isinstance(run, SurvivingRun):
            run.finish(exit_code=status)
            if run.lost:
                _forget_service()


def _wandb(loggers: Iterable[Logger]) -> list[WandbLogger]:
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _forget_service() -> None:
    """W&B speaks to its service once more at the end of the process: a service that is gone is a traceback then."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
