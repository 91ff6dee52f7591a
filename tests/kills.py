"""A forked process that kills itself while it writes a checkpoint, and what it leaves."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_child(run: Callable[[], Any]) -> int:
    """How a forked process ends that runs this: the number of the signal that killed it, or minus its status."""
    pid = os.fork()
    if not pid:
        try:
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(event: int, before: Callable[[int], None] = lambda event: None) -> None:
    """Let this process kill itself before its `event`-th fsync or rename, or with half a file written if negative.

    `before` is called with the number of each fsync and rename before it happens.
    """
    seen = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen[0] += 1
            before(seen[0])
            if seen[0] == event:
                die()
            return real(*arguments)

        return call

    def half(value: Any, file: Any) -> None:
        save(value, file)
        seen[0] -= 1
        if seen[0] == event:
            file.flush()
            os.truncate(file.fileno(), file.tell() // 2)
            die()

    save = torch.save
    if event < 0:
        torch.save = half  # type: ignore[assignment]
    else:
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory by its name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
