"""Grades one mathematical answer with math-verify; run as a program, it is the child process of `MathReward`.

math-verify limits its own time with `signal.alarm`, which works in a main thread only, and with a Python
handler, which never runs while one long C call (a huge power, a regular expression) holds the interpreter.
Here its limits are off: `MathReward` kills the process instead. This file must not import torch, nor anything
that does.
"""

import logging
import re
import signal
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from typing import Any

from math_verify import parse, verify

from mifo_lightning.rewards.math_difference import apart, other_base

SCIENTIFIC = re.compile(r"\s*([-+]?\d+\.?\d*)[eE]([-+]?\d+)\s*")
ORPHAN_FACTOR = 2.0  # x the time limit: only a child whose parent is gone lives that long in one check


@lru_cache(maxsize=4096)
def parse_truth(truth: str) -> list[Any]:
    r"""All readings of a bare ground truth such as `72`, `$2n$` or `\left( 3, \frac{\pi}{2} \right)`.

    It is read as if boxed: in bare LaTeX math-verify would only look for the last number. It takes `4.5e33`
    for 4.5 * e * 33, with e the base of logarithms, so such a truth is also read as 4.5 x 10^33.

    Raises:
        ValueError: There is nothing to compare with.
    """
    readings: list[Any] = parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
    if scientific := SCIENTIFIC.fullmatch(truth):
        power = "\\boxed{{{} \\times 10^{{{}}}}}".format(*scientific.groups())
        readings = readings + parse(power, parsing_timeout=None)
    if not readings:
        raise ValueError(f"the ground truth {truth!r} cannot be read")
    return readings


def one_holds(checks: Iterable[Callable[[], bool]]) -> bool:
    """Whether one of several checks holds; if none does, the last exception of any is raised."""
    problem: Exception | None = None
    for check in checks:
        try:
            if check():
                return True
        except Exception as error:
            problem = error
    if problem is not None:
        raise problem
    return False


def grade(text: str, truth: str, relations: bool = False) -> bool:
    r"""Whether the final answer in `text` equals `truth`.

    math-verify takes any difference below 1e-15 for none, so what it accepts is looked at once more by `apart`.

    Args:
        text: Holds the answer.
        truth: A bare answer.
        relations: Whether a relation may stand for the set that it describes, `x < 3` for `(-\infty, 3)`.

    Raises:
        Exception: A comparison failed and none of the others succeeded.
    """
    answers = parse(text, parsing_timeout=None, raise_on_error=True)
    golds = parse_truth(truth)
    if other_base(truth, answers):
        return False
    options: dict[str, Any] = {"timeout_seconds": None, "raise_on_error": True, "allow_set_relation_comp": relations}

    def equal(gold: Any, answer: Any) -> bool:
        return verify(gold, answer, **options) and not apart(gold, answer)

    # One pair a call: `verify` on the lists would either hide an exception or stop at the first.
    return one_holds(partial(equal, gold, answer) for gold in golds for answer in answers)


def serve(connection: Connection, timeout: float) -> None:
    """Answer (texts, truth, relations) with True, False or the text of an error, until the other end is closed."""
    grade("\\boxed{1}", "1")  # builds the parser's tables, so that no check pays for them
    connection.send("ready")
    while True:
        try:
            texts, truth, relations = connection.recv()
        except EOFError:
            return
        # Should the parent die during this check: the kernel's alarm, without a handler, ends even a C call.
        signal.setitimer(signal.ITIMER_REAL, ORPHAN_FACTOR * timeout)
        try:
            verdict: bool | str = one_holds(partial(grade, text, truth, relations) for text in texts)
        except Exception as error:
            verdict = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(verdict)


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the parent's business: it still wants its answer
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
