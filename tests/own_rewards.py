"""Rewards as a user writes them, in a module of their own that the child process imports; it imports nothing heavy."""

import asyncio
import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.base import Reward


class Mute(Exception):
    """One that cannot say what it is."""

    def __str__(self) -> str:
        raise ValueError("no")


def obey(responses: list[str]) -> list[float]:
    """Does to its process what a response says; other responses are numbers."""
    return [act(text) for text in responses]


def act(text: str) -> float:
    match text.split():
        case ["hang"]:
            time.sleep(600)
        case ["spin"]:  # one C call that never lets go of the interpreter
            re.fullmatch("(a|a)*b", "a" * 40)
        case ["exit", status]:
            sys.exit(int(status))
        case ["vanish", status]:
            os._exit(int(status))
        case ["leave"]:
            raise GeneratorExit
        case ["mute"]:
            raise Mute
        case ["interrupt"]:
            raise KeyboardInterrupt
        case ["crash"]:
            ctypes.string_at(0)
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["raise", kind]:
            raise {"value": ValueError, "key": KeyError}[kind](f"bad number {time.monotonic()}")
        case ["print"]:
            print("x" * 2**20)
            print("y" * 2**20, file=sys.stderr)
            os.write(1, b"z" * 2**20)
        case ["close"]:
            os.closerange(3, 256)
        case ["orphan"]:  # holds the connection open after its parent's death
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            os._exit(7)
        case ["refuse"]:
            raise InputError("the server's address is not set")
        case ["who"]:
            return float(os.getpid())
        case _:
            return float(text)
    return 1.0


async def obey_later(responses: list[str]) -> float:
    """As `obey`, one response at a time, and `sleep`, which lets others go on."""
    if responses[0] == "sleep":
        await asyncio.sleep(600)
    return act(responses[0])


async def echo_late(responses: list[str], truths: list[str]) -> list[float]:
    """Sleeps as many hundredths as the response says; what is no number fails."""
    await asyncio.sleep(int(responses[0]) / 100)
    return [float(truths[0])]


def always_fails(responses: list[str]) -> list[float]:
    raise RuntimeError("no server at port 80")


def meddle(responses: list[str], truths: list[str], columns: list[dict[str, Any]]) -> list[float]:
    """Right, and changes all that it got."""
    scores = [float(text == truth) for text, truth in zip(responses, truths, strict=True)]
    for row in columns:
        row.clear()
    for given in (responses, truths, columns):
        given.clear()
    return scores


class Remembering(Reward):
    """Counts its calls, fails by itself, has parts, and leaves a file where it is closed."""

    failed = -1.0
    best = 1.0

    def __init__(self, place: str) -> None:
        self.calls, self.bonus, self.place = 0, 0.0, place
        self.components = {"calls": [], "bonus": []}

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        self.calls += 1
        self.components = {"calls": [float(self.calls)] * len(responses), "bonus": [self.bonus] * len(responses)}
        if "all" in responses:
            raise ValueError("not all at once")
        return [self.fail("Own: by itself", text) if text == "own" else act(text) for text in responses]

    def close(self) -> None:
        Path(self.place, str(os.getpid())).touch()
