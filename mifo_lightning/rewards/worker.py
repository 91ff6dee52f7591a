"""The child process of user code: holds one reward and calls it; run as a program by `rewards.isolation`.

It imports nothing heavy by itself. Standard output and error are the parent's; answers go by a connection of their own.
"""

import contextlib
import faulthandler
import io
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from mifo_lightning.checkpoints.blocked import end_without
from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards import isolation
from mifo_lightning.rewards.attempt import Failure, Outcome, attempt, failure
from mifo_lightning.rewards.base import Reward

ORPHAN_FACTOR = 2.0  # x the time limit: only a child whose parent is gone lives that long in one call
CLOSE_SECONDS = 5.0


class _Unpickler(pickle.Unpickler):
    """Refuses what the parent's program itself defines: this process has another main module."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__":
            raise AttributeError(f"{name} is defined in the program that was started, or in a notebook")
        return super().find_class(module, name)


def load(data: bytes) -> Reward | str:
    """The pickled reward, or why it cannot be had."""
    try:
        reward: Reward = _Unpickler(io.BytesIO(data)).load()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return reward


def call(reward: Reward, question: bytes) -> tuple[Outcome | Failure | InputError, list[tuple[Any, ...]]]:
    """The outcome of one call, and the failures that the reward, or part number so and so of it, counted by itself."""
    changed, responses, truths, wanted = pickle.loads(question)
    vars(reward).update(changed)
    noted: list[tuple[Any, ...]] = []
    for place, part in enumerate(reward.parts):

        def note(
            problem: str, response: str, timeout: bool = False, place: int = place, failed: float = part.failed
        ) -> float:
            noted.append((place, problem, response, timeout))
            return failed

        part.fail = note  # type: ignore[method-assign]
    try:
        return attempt(reward, responses, truths, wanted), noted
    except InputError as error:
        return InputError(str(error)), noted
    except BaseException as error:  # nothing of this process's own is raised here
        return failure(error), noted


@contextlib.contextmanager
def no_longer_than(seconds: float | None) -> Iterator[None]:
    """End the process if it takes longer, even inside one C call: a thread without Python code keeps the time."""
    if seconds is None:
        yield
        return
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        yield
        faulthandler.cancel_dump_traceback_later()


def serve(connection: Connection) -> None:
    """Answer ("load", reward, _) with None or a problem and ("call", question, seconds), until the other end closes."""
    reward: Reward | str | None = None
    connection.send("ready")
    while True:
        try:
            what, data, limit = connection.recv()
        except EOFError:
            break
        if what == "load":
            with no_longer_than(600.0):
                reward = load(data)
            connection.send(reward if isinstance(reward, str) else None)
        elif isinstance(reward, Reward):
            with no_longer_than(None if limit is None else ORPHAN_FACTOR * limit + 1.0):
                answer = call(reward, data)
            connection.send(answer)
    if isinstance(reward, Reward):
        with no_longer_than(CLOSE_SECONDS), contextlib.suppress(BaseException):
            reward.close()  # after the last answer: nothing is lost


def leave_signals_to_the_parent() -> None:
    """A scheduler signals all processes of a job, and the parent still wants its answer; what is started here obeys."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    for number in numbers:
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, not inherited by other programs
    os.register_at_fork(after_in_child=lambda: [signal.signal(number, signal.SIG_DFL) for number in numbers])


if __name__ == "__main__":
    isolation.inside = True
    leave_signals_to_the_parent()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory runs out, the kernel ends this process and not the run
    os.set_inheritable(int(sys.argv[1]), False)
    end_without(os.getppid(), 0.0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    serve(Connection(int(sys.argv[1])))
