"""The runs that `kills` kills: their configurations, each as a process, and what it leaves behind."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.stress.inputs import run_main

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL: dict[str, Any] = {
    "trainer": {"logger": False, "profiler": None, "enable_progress_bar": False},
    "progress": None,
    "history": {},
    "samples": {"every": 1},
    "checkpoint": {"every": 2},
    "model": {"rollout": {"group_size": 4, "self_check": False}},
    "data": {
        "train": {
            "class_path": "mifo_lightning.data.skills.Skills",
            "init_args": {"skills": ["addition", "mirrored"], "count": 64},
        },
        "val": None,
        "schedule": {"rl_steps": 30, "prompts_per_step": 8, "sft_batch": 8},
    },
}
SWITCH = {"buffer": {"size": 8, "max_accuracy": 0.5}}
TWO = {"accelerator": "cpu", "devices": 2}
FSDP2 = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}


@dataclass(frozen=True)
class Variant:
    """A run to kill: `over` is laid over configs/tiny.yaml, the files in `configs` and SMALL."""

    name: str
    over: list[dict[str, Any]]
    configs: tuple[str, ...] = ("methods/mifo.yaml",)
    ranks: int = 1


ONE_PROCESS = [
    Variant("mifo", [SWITCH]),
    Variant(
        "mifo, 2 micro-batches, 2 passes",
        [
            SWITCH,
            {
                "model": {"optimizer": {"micro_batches": 2}},
                "data": {"schedule": {"epochs_per_rollout": 2, "rl_steps": 15}},
            },
        ],
    ),
    Variant("luffy", [], ("methods/luffy.yaml",)),
    Variant("mifo, dynamic sampling", [SWITCH], ("methods/mifo.yaml", "losses/dapo.yaml")),
    Variant(
        "own demonstrations, SFT after",
        [SWITCH, {"data": {"schedule": {"sft_after": 6}}}],
        ("methods/own_rollouts.yaml",),
    ),
]
TWO_PROCESSES = [
    Variant("mifo, DDP x 2", [SWITCH, {"trainer": {**TWO, "strategy": "ddp"}}], ranks=2),
    Variant("mifo, FSDP2 x 2", [SWITCH, {"trainer": {**TWO, "strategy": FSDP2}}], ranks=2),
]


class Run:
    """One process of the command line in a session of its own, forked where one process is enough."""

    def __init__(self, variant: Variant, place: Path) -> None:
        self.place, self.out = place, place / "out"
        arguments = command(variant, place)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            with open(place / "log", "ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if variant.ranks > 1:  # Lightning starts the other rank by running the command line again
                os.execv(sys.executable, [sys.executable, "-m", "mifo_lightning", *arguments])
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            status = run_main(arguments)
            sys.stdout.flush()
            os._exit(status & 255)

    def ended(self, seconds: float, until: Callable[[], bool] = lambda: False) -> tuple[bool, int | None]:
        """Wait; whether it has ended, with its return code."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return True, os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return False, None

    def ranks(self) -> list[int]:
        """The processes of all ranks."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            children = []
        return [self.pid, *map(int, children)]

    def end(self) -> None:
        """Leave nothing behind."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def gone(processes: list[int], seconds: float) -> bool:
    """Whether none of them runs any more before this time is over."""
    end = time.monotonic() + seconds
    while any(_runs(pid) for pid in processes):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(variant: Variant, place: Path) -> list[str]:
    """The command line; it goes on from `last.ckpt` if that is there."""
    files = [CONFIGS / "tiny.yaml", *(CONFIGS / name for name in variant.configs)]
    for number, over in enumerate([SMALL, *variant.over]):
        path = place / f"{number}.yaml"
        path.write_text(yaml.safe_dump(over))
        files.append(path)
    words = ["fit", *(word for path in files for word in ("--config", str(path)))]
    words += ["--trainer.default_root_dir", str(place / "out")]
    last = place / "out" / "checkpoints" / "last.ckpt"
    return [*words, "--ckpt_path", str(last)] if last.exists() else words


def results(out: Path) -> dict[str, str]:
    """Digests of what a run leaves: weights, history, and samples with and without what was drawn twice."""
    samples = (out / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    once = "\n".join(dict.fromkeys(samples))
    history = (out / "history.jsonl").read_text(encoding="utf-8")
    raw = {
        "weights": (out / "model" / "model.safetensors").read_bytes(),
        "history": history.encode(),
        "samples": once.encode(),
        "samples.jsonl": "\n".join(samples).encode(),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in raw.items()}


def signature(directory: Path) -> object:
    """Changes as soon as something is written there."""
    with suppress(FileNotFoundError):
        return sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(directory))
    return None
