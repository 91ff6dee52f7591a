"""Programs as answers: a response is right if the tests of its question pass in a child that is killed on any limit."""

import ast
import contextlib
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.marker import MarkedReward, MissingMarker

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
RUNNER = Path(__file__).with_name("code_runner.py")
TRIED: set[str] = set()
"""Limits under which a program has run in this process."""


class CodeReward(MarkedReward):
    """1 if the Python tests in the ground truth run through after the response's last code block, else 0.

    Each response runs in a process and session of its own, in an empty directory that is removed, without the
    parent's environment, with limits on time, memory, file size, open files and further processes; whatever is left of
    it is killed. **This is no sandbox**: the network and readable files are open to it, and as root the limit on
    processes does not hold. Run it as a user, or in a container, that may be lost.

    Args:
        timeout: Wall-clock seconds for one response; a longer one scores 0. That is a wrong answer, not a failed check.
        memory_mb: Address space of the process, MiB.
        file_mb: Largest file that it may write, MiB.
        workers: Responses run at once.
        answer_after: Only the text after the last such marker is graded; all of it if this is None or absent.
        missing_marker: zero or whole, for a thought that never ended.

    Raises:
        InputError: If a limit is not allowed; from a call, if a program that does nothing fails under the limits.
    """

    isolate = False  # each program has a process of its own

    def __init__(
        self,
        timeout: float = 5.0,
        memory_mb: int = 512,
        file_mb: int = 16,
        workers: int = 4,
        answer_after: str | None = "</think>",
        missing_marker: MissingMarker = "zero",
    ) -> None:
        super().__init__(answer_after, missing_marker)
        if not timeout > 0:
            raise InputError(f"CodeReward: timeout is {timeout}, allowed is a number above 0")
        for name, value in (("memory_mb", memory_mb), ("file_mb", file_mb), ("workers", workers)):
            if type(value) is not int or value < 1:
                raise InputError(f"CodeReward: {name} is {value}, allowed is a whole number above 0")
        self.timeout, self.workers = timeout, workers
        self.limits = {
            "RLIMIT_AS": memory_mb * 2**20,
            "RLIMIT_FSIZE": file_mb * 2**20,
            "RLIMIT_CPU": int(timeout) + 1,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": 0,
        }

    def check_truth(self, truth: str, columns: Mapping[str, Any]) -> None:
        """Raise an InputError where it is no Python, or tests nothing."""
        check_tests(truth)

    def __call__(self, responses: list[str], truths: list[str], prompts: list[str] | None = None) -> list[float]:
        self._try()
        answers = self.answers(responses, prompts)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._passes, answers, truths))

    def _try(self) -> None:
        """Run a program that does nothing, once: under limits that even it breaks every response would be wrong."""
        limits = f"timeout {self.timeout:g}, " + ", ".join(f"{name} {most}" for name, most in self.limits.items())
        if limits in TRIED:
            return
        if not any(self._passes("```python\npass\n```", "pass") for _ in range(3)):  # a busy machine may start one late
            raise InputError(f"CodeReward: a program that does nothing fails here under {limits}; raise them")
        TRIED.add(limits)

    def _passes(self, answer: str | None, tests: str) -> float:
        blocks = BLOCK.findall(answer or "")
        if not blocks:
            return 0.0
        password = secrets.token_hex(16)  # so that leaving early, or printing, is not passing
        task = {"code": blocks[-1], "tests": tests, "password": password, "limits": self.limits}
        read, write = os.pipe()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place, os.fdopen(read, "rb", 0) as verdict:
            child = subprocess.Popen(
                [sys.executable, "-I", str(RUNNER), str(write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=place,
                env={"PATH": os.defpath, "PYTHONHASHSEED": "0"},
                pass_fds=[write],
                start_new_session=True,
            )
            os.close(write)
            try:
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(json.dumps(task).encode())
                return float(_read(verdict.fileno(), time.monotonic() + self.timeout) == password.encode())
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


@cache
def check_tests(tests: str) -> None:
    """Raise InputError for a ground truth that no program passes, or that any does: `72`, a list of asserts as text."""
    try:
        statements = ast.parse(tests).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise InputError(f"CodeReward: ground truth is {tests!r:.80}, no Python: {error!s:.80}") from None
    if all(isinstance(each, ast.Expr) and _is_literal(each.value) for each in statements):
        raise InputError(
            f"CodeReward: ground truth is {tests!r:.80}, which tests nothing; allowed are statements that fail where "
            "the program is wrong, such as `assert f(1) == 2`"
        )


def _is_literal(expression: ast.expr) -> bool:
    try:
        ast.literal_eval(expression)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _read(descriptor: int, end: float) -> bytes:
    """At most 64 bytes, up to the end of the file or to the time `end`; nothing where that came first."""
    got = b""
    while len(got) < 64 and select.select([descriptor], [], [], max(end - time.monotonic(), 0.0))[0]:
        part = os.read(descriptor, 64)
        if not part:
            return got
        got += part
    return b""
