"""A program of this package in a process of its own, which answers one question at a time and can be killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from mifo_lightning.checkpoints import interruption
from mifo_lightning.common.errors import InputError

START_SECONDS = 120.0  # importing math-verify takes 0.4 s on an idle machine
LOOK_SECONDS = 0.2  # how often a waiting parent looks whether the child is alive, and whether the run is to stop
LEFT = "was left, since the run is asked to stop"


class ChildDied(RuntimeError):
    """The process ended before it answered, or was left alone; the message says how."""


class Child:
    """Starts with the first question, is replaced after its death, and ends with this object.

    It is a new program (neither a fork nor `multiprocessing`'s spawn, which imports the parent's main module again), so
    the parent's threads and CUDA do not matter. It has a session of its own: Ctrl-C in a terminal does not reach it,
    and whatever it started is killed with it. Safe from any thread: questions take turns.

    Args:
        module: Run as `python -m`; its first argument is the descriptor of a `multiprocessing` connection, on which it
            says that it is ready, and then answers each question with one message.
        arguments: Further arguments.
        grace: Seconds that it gets to end by itself when it is idle and closed.
    """

    def __init__(self, module: str, *arguments: str, grace: float = 0.0) -> None:
        self.module, self.arguments, self.grace = module, arguments, grace
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._stop: weakref.finalize[..., Child] | None = None

    @property
    def running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self._process is not None and self._process.poll() is None

    def ask(self, question: Any, timeout: float | None) -> Any:
        """The answer to one question; a process that does not give one is killed.

        Args:
            question: Anything that pickles.
            timeout: Seconds; None waits for ever.

        Raises:
            TimeoutError: It took longer.
            ChildDied: The process ended instead, or the run is asked to stop and it did not answer at once.
            InputError: It does not start.
        """
        with self._lock:
            if not self.running:
                if interruption.pending() is not None:
                    raise ChildDied(LEFT)
                self.close()
                self._start()
            assert self._connection is not None
            try:
                self._connection.send(question)
                return self._receive(timeout)
            except TimeoutError:
                self._kill()
                raise
            except InterruptedError:
                self._kill()
                raise ChildDied(LEFT) from None
            except Exception as error:
                raise ChildDied(self._kill(wait=1.0)) from error
            except BaseException:  # Ctrl-C: the answer still to come must not be taken for the next question's
                self._kill()
                raise

    def close(self) -> None:
        """End the process; may be called twice, and a later question starts a new one."""
        if self._stop is not None:
            self._stop()

    def _start(self) -> None:
        ours, theirs = Pipe()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONHASHSEED": "0",  # what goes by the order of a set gives the same answer every time
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", self.module, str(theirs.fileno()), *self.arguments],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._connection = ours
        # Runs at most once: on close(), when this object is collected, or when the interpreter exits.
        self._stop = weakref.finalize(self, _stop, self._process, ours, self.grace)
        try:
            self._receive(START_SECONDS)
        except Exception as error:
            how = self._kill(wait=1.0)
            raise InputError(
                f"reward: `{sys.executable} -m {self.module}` does not start, it {how}; is all that it imports "
                "installed?"
            ) from error

    def _receive(self, timeout: float | None) -> Any:
        """What the child sends; its death is seen even where a child of its own keeps the connection open."""
        assert self._connection is not None
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            alive = self.running  # before the look: what a dying process has sent still counts
            left = LOOK_SECONDS if end is None else min(max(end - time.monotonic(), 0.0), LOOK_SECONDS)
            if self._connection.poll(left):
                return self._connection.recv()
            if not alive:
                raise EOFError
            if interruption.pending() is not None:
                raise InterruptedError
            if end is not None and time.monotonic() >= end and self.running:
                raise TimeoutError(f"took more than {timeout:g} s")

    def _kill(self, wait: float = 0.0) -> str:
        """End the process, at the latest after `wait` seconds; how it had ended, if it had."""
        assert self._process is not None
        assert self._connection is not None
        assert self._stop is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait)
        status = self._process.returncode
        self._stop.detach()
        _stop(self._process, self._connection, 0.0)
        if status is None:
            return "no longer answered"
        if status < 0:
            return f"was killed by signal {-status} ({signal.strsignal(-status)})"
        return f"ended with status {status}"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has no process: neither that nor a lock can be copied."""
        return partial(type(self), self.module, *self.arguments, grace=self.grace), ()


def _stop(process: subprocess.Popen[bytes], connection: Connection, grace: float) -> None:
    connection.close()
    if grace:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # a session of its own: the group's number is the process's
    process.wait()
