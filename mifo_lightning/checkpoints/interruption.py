"""Signals that end a run: noted at once, obeyed where nothing is lost. Imports nothing heavy: it comes first."""

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any

from mifo_lightning.checkpoints.blocked import PATIENCE, SignalWatch, end_without
from mifo_lightning.common.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
# `timeout`, schedulers and a terminal with forwarding parents send one request twice
ONE_REQUEST = 1.0  # seconds in which further signals are the first one again
SOON = 2.0  # seconds that they have to fail too, if this one fails
LAST_WORDS = 10.0  # seconds that processes of an interrupted run have to end after the first rank
STARTED_BY = os.getppid()  # the first rank, where Lightning has started this one


def _started_by_lightning() -> bool:
    """Whether this is a further rank of a process that started it: it stops together with that one."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


def speaks_for_all(met: int) -> bool:
    """Whether what so many ranks agree on holds for all: one that Lightning has started may not have met the others."""
    return met > 1 or not _started_by_lightning()


@dataclass
class _Request:
    """What has been asked of this process.

    Attributes:
        signum: The signal; None: nothing.
        when: When it came, monotonic seconds.
        deferred: Whether it waits for a safe point (`safe_points`); else it is raised where it arrives.
        launcher: Lightning's, whose attribute `procs` holds the processes that this one has started, if it started any.
    """

    signum: int | None = None
    when: float = 0.0
    deferred: bool = field(default_factory=_started_by_lightning)
    launcher: Any = None


_request = _Request()
_noted = -math.inf  # when a handler last ran


def request(signum: int) -> None:
    """Ask for the end of the run at the next safe point, as the first signal does."""
    if _request.signum is None:
        _request.signum, _request.when = signum, time.monotonic()


def pending() -> int | None:
    """The signal that has arrived, if one has."""
    return _request.signum


def defer() -> None:
    """From here on signals wait for a safe point: work has begun that must not be cut anywhere."""
    _request.deferred = True


def forget() -> None:
    """Begin anew: nothing has been asked, and nothing has begun."""
    global _request
    _request = _Request()


def follow(launcher: Any) -> None:
    """Remember Lightning's launcher: the ranks that it starts end with this process."""
    _request.launcher = launcher


def _arrived(signum: int, frame: FrameType | None) -> None:
    global _noted
    _noted = time.monotonic()
    if _request.signum is None:
        request(signum)
        if not _request.deferred:
            raise Interrupted(signum)
    elif time.monotonic() - _request.when > ONE_REQUEST:  # asked again
        end_others(0.0)
        os._exit(128 + signum)


def _end_blocked(signum: int) -> None:
    print(
        f"interrupted by {signal.Signals(signum).name}: nothing has come back for {_watch.patience:g} s, as where "
        "another rank is gone; what was written before is kept, and --resume goes on",
        file=sys.stderr,
        flush=True,
    )
    end_others(0.0)
    os._exit(128 + signum)


def _end_orphaned() -> None:
    print("error: the first rank is gone; this one ends too", file=sys.stderr, flush=True)
    os._exit(1)


@cache
def _end_with_the_first() -> None:
    if _started_by_lightning():
        end_without(STARTED_BY, PATIENCE, _end_orphaned)


_watch = SignalWatch(SIGNALS, lambda: _noted, _end_blocked)


def install() -> dict[int, Any]:
    """Take the signals over, but those that whoever started this process has it ignore (`nohup`).

    Returns:
        The handlers that were there before.
    """
    before: dict[int, Any] = {}
    with suppress(ValueError):  # not in the main thread
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, _arrived)
        _watch.begin()
    _end_with_the_first()
    return before


@contextmanager
def noted() -> Iterator[None]:
    """Take the signals over; give them back at the end, and forget, unless this is within another one."""
    if _arrived not in map(signal.getsignal, SIGNALS):
        forget()  # what a fit of this process that nobody took signals over for has left
    before = install()
    try:
        yield
    finally:
        if _arrived not in before.values():
            for signum, handler in before.items():
                signal.signal(signum, handler)
            if before:
                _watch.give_back()
            forget()


@contextmanager
def handled(arguments: Sequence[str]) -> Iterator[None]:
    """Run the program: an interruption is one line and status 128 + the signal's number.

    Args:
        arguments: Of the command line.
    """
    with noted():
        try:
            yield
        except Interrupted as stop:
            end_others(LAST_WORDS if stop.together else 0.0)
            if _started_by_lightning():
                if not stop.together:
                    _tell_first(stop.signum)
                raise SystemExit(0) from None  # Lightning kills the first rank, at its last words, for any other status
            if is_first():
                print(last_line(stop, arguments), file=sys.stderr, flush=True)
            raise SystemExit(128 + stop.signum) from None
        except Exception:
            end_others(SOON)  # a rank that fails alone is waited for in a collective
            raise


def _tell_first(signum: int) -> None:
    """Send it on to the rank that has started this one, which else would wait for it for ever."""
    with suppress(OSError):
        if os.getppid() == STARTED_BY:
            os.kill(STARTED_BY, signum)


def is_first() -> bool:
    """Whether this is the first rank, by what the environment says."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def last_line(stop: Interrupted, arguments: Sequence[str]) -> str:
    """What a user reads: what arrived, what is kept, and the command that goes on.

    Args:
        stop: What ended the run.
        arguments: Of its command line.
    """
    kept, flag = [], ""
    for argument in arguments:  # without the checkpoint that this run began from
        if flag != "--ckpt_path" and argument.partition("=")[0] not in ("--ckpt_path", "--resume"):
            kept.append(argument)
        flag = argument
    begun = f"interrupted by {signal.Signals(stop.signum).name}"
    if stop.checkpoint is None:
        state = "nothing was trained" if not stop.step else f"no checkpoint was written of its {stop.step} steps"
        command = shlex.join(["python", "-m", "mifo_lightning", *arguments])
        return f"{begun}: {state}; begin again with: {command}"
    command = shlex.join(["python", "-m", "mifo_lightning", *kept, "--ckpt_path", stop.checkpoint])
    return f"{begun} after optimizer step {stop.step}, kept in {stop.checkpoint}; go on with: {command}"


def end_others(seconds: float) -> None:
    """Wait so long for the processes that Lightning has started from this one, then kill them."""
    for process in getattr(_request.launcher, "procs", []):
        with suppress(Exception):
            process.wait(seconds)
        with suppress(OSError):
            process.kill()
