"""Programs in processes of their own, forked from one that has imported what all of them do: that takes 5 seconds.

They differ from `python program.py` in nothing else: arguments, directory, output and status are their own, and so are
all modules of this project.
"""

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

HEAVY = [
    *("lightning.pytorch.cli", "lightning.pytorch.loggers", "lightning.pytorch.strategies", "torch.distributed.fsdp"),
    *("transformers.models.auto.modeling_auto", "transformers.models.qwen2.modeling_qwen2", "datasets"),
]  # not wandb: its directory for media belongs to the process that imports it, and goes with the first that ends
CONTEXT = multiprocessing.get_context("forkserver")
_server: dict[str, int | None] = {}  # the one of this file
# what this process is to other processes
OWN = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_SERVICE")


def ready() -> None:
    """Let what is forked from now on in this process find everything imported, and nothing of this project."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    running = server._forkserver_pid
    if running != _server.get("pid"):  # a grid that ran in this process began one with its own modules
        if running is not None:
            os.kill(running, signal.SIGKILL)  # or its end would wait for that of all that it has forked
        server._stop()
    CONTEXT.set_forkserver_preload(HEAVY)
    forkserver.ensure_running()
    _server["pid"] = server._forkserver_pid


class Program:
    """A program that runs, in a session of its own.

    Args:
        words: What would follow `python`: a file or `-m` and a module, and its arguments.
        output: The file that gets all that it and its children print.
        directory: Where it runs.
        environment: Variables that it has besides those of this process.
    """

    def __init__(
        self,
        words: Sequence[str],
        output: Path,
        directory: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        given = {name: value for name, value in os.environ.items() if name not in OWN} | {"OMP_NUM_THREADS": "1"}
        arguments = (list(words), output, directory or Path.cwd(), given | (environment or {}))
        self.output = output
        ready()
        self.process: Any = CONTEXT.Process(target=_run, args=arguments)
        self.process.start()
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        """Its status, if it has ended."""
        status: int | None = self.process.exitcode
        return status

    def wait(self, seconds: float | None = None) -> int:
        """Its status, as soon as it has ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.said()[-2000:]}"
        return int(self.process.exitcode)

    def send_signal(self, signum: int) -> None:
        """Send it, and none of its children, a signal."""
        os.kill(self.pid, signum)

    def kill(self) -> None:
        """End it, and none of its children, at once."""
        self.send_signal(signal.SIGKILL)

    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""


def run(*words: object, output: Path, ranks: int = 1, directory: Path | None = None) -> str:
    """What a program prints that runs to its end; several ranks find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    programs = []
    for rank in range(ranks):
        environment = {**meet, "LOCAL_RANK": str(rank), "NODE_RANK": "0"} if ranks > 1 else None
        own = output.with_name(f"{output.name}.{rank}") if rank else output
        programs.append(Program([str(word) for word in words], own, directory, environment))
    try:
        for program in programs:
            assert program.wait(300) == 0, program.said()[-4000:]
    finally:
        for program in programs:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
    return programs[0].said()


def _run(words: list[str], output: Path, directory: Path, environment: dict[str, str]) -> None:
    os.setsid()
    with open(output, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()  # what libraries of compiled code do to a process shows where
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # whoever runs the tests may ignore them
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # what its own docstring says of a process that was forked so; else a grid would import everything once more
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    try:
        if words[0] == "-m":
            sys.path.insert(0, str(directory))
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(words[0]).parent))
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
