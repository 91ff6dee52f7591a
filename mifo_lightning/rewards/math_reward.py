"""The verifier of mathematical answers: math-verify in a child process that can be killed."""

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from mifo_lightning.errors import InputError
from mifo_lightning.rewards.answer_format import readings
from mifo_lightning.rewards.marker import MarkedReward, MissingMarker

GRADER = "mifo_lightning.rewards.math_grader"
START_SECONDS = 120.0  # importing math-verify takes 0.4 s on an idle machine


class MathReward(MarkedReward):
    """1 if math-verify finds the response's final answer equal to the ground truth, else 0.

    One child process per object grades one answer at a time. It starts with the first check, is killed and
    replaced when a check takes too long, and ends with its parent. It is a new program (neither a fork nor
    `multiprocessing`'s spawn, which imports the parent's main module again), so the parent's threads and CUDA
    do not matter and the child imports no torch. Calls are safe from any thread and take turns.

    Args:
        timeout: Wall-clock seconds allowed for one check; a longer one scores 0 and is added to `timeouts`.
        answer_after: Only the text after the last such marker is graded; all of it if this is None or absent.
        missing_marker: What a response is worth whose thought never ended, because the prompt or the response opens
            `<think>` and nothing closes it: zero, or whole, its whole text graded.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        answer_after: str | None = "</think>",
        missing_marker: MissingMarker = "zero",
    ) -> None:
        super().__init__(answer_after, missing_marker)
        if not timeout > 0:
            raise InputError(f"MathReward: timeout is {timeout}, allowed is a number of seconds above 0")
        self.timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._stop: weakref.finalize[..., MathReward] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has no child and no counts: neither a process nor a lock can be copied."""
        return type(self), (self.timeout, self.answer_after, self.missing_marker)

    def __call__(self, responses: list[str], truths: list[str], prompts: list[str] | None = None) -> list[float]:
        answers = self.answers(responses, prompts)
        asked: Sequence[str | None] = prompts or [None] * len(responses)
        with self._lock:
            return [
                0.0 if answer is None else self._check(answer, truth, prompt)
                for answer, truth, prompt in zip(answers, truths, asked, strict=True)
            ]

    def close(self) -> None:
        """End the child process; a later check starts a new one."""
        if self._stop is not None:
            self._stop()

    def _check(self, text: str, truth: str, prompt: str | None) -> float:
        connection = self._connect()
        texts, relations = readings(text, prompt)
        try:
            connection.send((texts, truth, relations))
            if not connection.poll(self.timeout):
                self.close()
                return self.fail(f"math-verify took more than {self.timeout:g} s", text, timeout=True)
            verdict = connection.recv()
        except (EOFError, OSError):
            self.close()
            verdict = "the grading process died"
        except BaseException:  # Ctrl-C: the answer still to come must not be taken for the next check's
            self.close()
            raise
        if isinstance(verdict, str):
            return self.fail(f"math-verify: {verdict}", text)
        return float(verdict)

    def _connect(self) -> Connection:
        if self._connection is None or self._process is None or self._process.poll() is not None:
            self.close()
            self._process, self._connection = _start(self.timeout)
            # Runs at most once: on close(), when this object is collected, or when the interpreter exits.
            self._stop = weakref.finalize(self, _stop, self._process, self._connection)
        return self._connection


def _start(timeout: float) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONHASHSEED": "0",  # sympy orders some sets by hash: the same answer, the same verdict
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", GRADER, str(theirs.fileno()), str(timeout)],
        stdin=subprocess.DEVNULL,
        env=environment,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    try:
        if ours.poll(START_SECONDS):
            ours.recv()
            return process, ours
    except EOFError:
        pass
    _stop(process, ours)
    raise InputError(f"MathReward: `{sys.executable} -m {GRADER}` does not start; is math-verify installed?")


def _stop(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()
