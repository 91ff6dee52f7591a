"""Does a change of structure keep every number? Each method runs at a commit and in this tree, on one machine.

    python -m benchmarks.same_numbers --before 223b403                 # this tree against that commit
    python -m benchmarks.same_numbers --before 223b403 --only luffy    # cases whose name holds this

Cases are every method x every policy loss with one and with two micro-batches, a run that is stopped inside a rollout
and goes on, and two ranks (DDP, FSDP2). Compared are the exported weights, by checksum, and all that a run logs
(`history.jsonl`) but times; where numbers differ, the largest relative difference is shown; a case that both refuse is
the same. Seconds are those of whole runs in forks of a process that has imported everything, one after another.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLOCKS = re.compile(r"seconds|_per_s|memory|bytes")  # what no two runs share
SMALL: dict[str, Any] = {
    "model.model": str(ROOT / "mifo_lightning" / "assets" / "base"),  # for both trees
    "trainer.logger": "false",
    "trainer.profiler": "null",
    "progress": "null",
    "history": "{}",
    "model.rollout.group_size": 4,
    "model.rollout.self_check": "false",
    "data.train.init_args.count": 64,
    "data.val": "null",
    "data.schedule.rl_steps": 5,
    "data.schedule.prompts_per_step": 8,
    "data.schedule.sft_batch": 16,
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "sft": {"data.schedule.rl_steps": 0, "data.schedule.sft_before": 4},
    "sft_then_rl": {"data.schedule.sft_before": 2},
    "rl_then_sft": {"data.schedule.sft_after": 2},
}
FSDP2 = {
    "trainer.strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
    "trainer.strategy.init_args.data_parallel_size": 2,
    "trainer.strategy.init_args.tensor_parallel_size": 1,
    "trainer.strategy.init_args.save_distributed_checkpoint": "false",
}


@dataclass(frozen=True)
class Case:
    """A run: overlays on configs/tiny.yaml, options, and the step at which it is stopped and gone on with, if any."""

    name: str
    configs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    stop: int | None = None
    ranks: int = 1


@dataclass
class Record:
    """What a case left: checksum of the weights, what it logged, seconds, or why it failed."""

    weights: str = ""
    logged: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def cases(configs: Path) -> list[Case]:
    """All of them, by what this tree has."""
    found = []
    losses = [None, *sorted(path.stem for path in (configs / "losses").glob("*.yaml"))]
    for method in sorted(path.stem for path in (configs / "methods").glob("*.yaml")):
        text = (configs / "methods" / f"{method}.yaml").read_text(encoding="utf-8")
        buffered = "\nbuffer:" in text
        options = SCHEDULES.get(method, {}) | ({"buffer.size": 16, "buffer.max_accuracy": 0.5} if buffered else {})
        for loss in losses if method != "sft" else [None]:
            files = (f"methods/{method}.yaml", *([f"losses/{loss}.yaml"] if loss else []))
            name = f"{method} {loss}" if loss else method
            found.append(Case(name, files, options))
            found.append(Case(f"{name}, 2 micro-batches", files, {**options, "model.optimizer.micro_batches": 2}))
        found.append(Case(f"{method}, 2 passes", files[:1], {**options, "data.schedule.epochs_per_rollout": 2}))
    mifo: dict[str, Any] = {"buffer.size": 16, "buffer.max_accuracy": 0.5, "data.schedule.epochs_per_rollout": 2}
    found.append(Case("mifo, stopped inside a rollout", ("methods/mifo.yaml",), mifo, stop=3))
    two = {**mifo, "trainer.devices": 2}
    found.append(Case("mifo, DDP x 2", ("methods/mifo.yaml",), {**two, "trainer.strategy": "ddp"}, ranks=2))
    found.append(Case("mifo, FSDP2 x 2", ("methods/mifo.yaml",), {**two, **FSDP2}, ranks=2))
    return found


def arguments(case: Case, place: Path, more: dict[str, Any], renamed: dict[str, str]) -> list[str]:
    """The command line of a case; `renamed`: what the tree calls a key or group otherwise, by its name here."""
    files = ["configs/tiny.yaml", *(f"configs/{name}" for name in case.configs)]
    options = {**SMALL, **case.options, "trainer.default_root_dir": str(place), **more}
    named = {_name(key, renamed): value for key, value in options.items()}
    return [
        "fit",
        *(word for path in files for word in ("--config", path)),
        *(word for key, value in named.items() for word in (f"--{key}", str(value))),
    ]


def _name(key: str, renamed: dict[str, str]) -> str:
    for here in sorted(renamed, key=len, reverse=True):
        if key == here or key.startswith(f"{here}."):
            return renamed[here] + key.removeprefix(here)
    return key


def run(case: Case, place: Path, renamed: dict[str, str]) -> Record:
    """Run a case in this directory's tree."""
    start = time.monotonic()
    parts: list[dict[str, Any]] = [{}]
    if case.stop is not None:
        last = str(place / "checkpoints" / "last.ckpt")
        parts = [{"trainer.max_steps": case.stop, "export": "null"}, {"ckpt_path": last}]
    for more in parts:
        words = arguments(case, place, more, renamed)
        status = _process(words, place / "log") if case.ranks > 1 else _fork(words, place / "log")
        if status:
            said = (place / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return Record(error=f"{status}: {said[-1] if said else ''}"[:200])
    seconds = time.monotonic() - start
    lines = (place / "history.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [{k: v for k, v in json.loads(line).items() if not CLOCKS.search(k)} for line in lines]
    weights = hashlib.sha256((place / "model" / "model.safetensors").read_bytes()).hexdigest()[:16]
    return Record(weights, logged, round(seconds, 2))


def _process(words: list[str], log: Path) -> int:
    with open(log, "ab") as file:
        return subprocess.call([sys.executable, "-m", "mifo_lightning", *words], stdout=file, stderr=file)


def _fork(words: list[str], log: Path) -> int:
    """By itself: the commit before need not have the tools of `benchmarks.stress`."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status: Any = 1
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        from mifo_lightning.cli import main

        main(words)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def record(names: list[str], out: Path, renamed: dict[str, str]) -> None:
    """Run the named cases in the tree that this process was started in, and write what they left."""
    import mifo_lightning.cli.command_line  # noqa: F401  once, before the forks

    found = {}
    for case in cases(ROOT / "configs"):
        if case.name in names:
            with tempfile.TemporaryDirectory() as place:
                found[case.name] = asdict(run(case, Path(place), renamed))
    out.write_text(json.dumps(found), encoding="utf-8")


def recorded(tree: Path, names: list[str]) -> dict[str, Record]:
    """What the cases leave in a tree: one with the names of today, or of version 0.4."""
    from mifo_lightning.cli.renamed import RENAMED  # not where a commit that lacks it is recorded

    today = (tree / "configs" / "defaults.yaml").exists()
    renamed = {} if today else {new: old for old, new in RENAMED.items()}
    path = os.pathsep.join([str(tree), str(tree / "callbacks")])
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--record", str(out), "--cases", json.dumps(names)]
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--renamed", json.dumps(renamed)], cwd=tree, env=environment, check=True)
        return {name: Record(**found) for name, found in json.loads(out.read_text(encoding="utf-8")).items()}


def difference(before: Record, after: Record) -> float | str:
    """0 where all is equal; else the largest relative difference of what was logged, or what else is not the same."""
    if before.error or after.error:
        alike = before.error and after.error  # both refuse: what they say may name keys otherwise
        return 0 if alike else f"fails: {before.error or '-'} / {after.error or '-'}"
    if len(before.logged) != len(after.logged):
        return f"{len(before.logged)} / {len(after.logged)} lines"
    largest = 0.0
    for a, b in zip(before.logged, after.logged, strict=True):
        for key in a.keys() & b.keys():
            if a[key] != b[key]:
                if not isinstance(a[key], (int, float)) or not isinstance(b[key], (int, float)):
                    return f"{key}: {a[key]} / {b[key]}"
                largest = max(largest, abs(a[key] - b[key]) / max(abs(a[key]), abs(b[key])))
    if largest == 0 and before.weights != after.weights:
        return "weights"
    return largest


def report(before: dict[str, Record], after: dict[str, Record]) -> tuple[str, int]:
    """The table, and how many cases are not the same."""
    unlike = {name: d for name in before if (d := difference(before[name], after[name])) != 0}
    fewer = sorted({key for n in before for line in before[n].logged for key in line} - _keys(after))
    seconds = [statistics.median(r.seconds for r in side.values()) for side in (before, after)]
    from benchmarks.stress.table import markdown  # not where a commit that lacks it is recorded

    head = ["cases", "the same bits", "not", "median seconds before", "after"]
    row = [len(before), len(before) - len(unlike), len(unlike), *(f"{value:.2f}" for value in seconds)]
    lines = [
        markdown(head, [row]),
        "",
        *(f"- {name}: {value}" for name, value in unlike.items()),
        *([f"- no longer logged: {', '.join(fewer)}"] if fewer else []),
    ]
    return "\n".join(lines), len(unlike)


def _keys(records: dict[str, Record]) -> set[str]:
    return {key for found in records.values() for line in found.logged for key in line}


def main() -> None:
    """Run both sides and print the table; status 1 unless all is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="the commit to compare with")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--every", type=int, default=1, help="each n-th case alone")
    for internal in ("--record", "--cases", "--renamed"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.record:
        return record(json.loads(given.cases), Path(given.record), json.loads(given.renamed))
    names = [case.name for case in cases(ROOT / "configs") if given.only in case.name][:: given.every]
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), given.before], cwd=ROOT, check=True)
        try:
            before = recorded(tree, names)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    table, unlike = report(before, recorded(ROOT, names))
    print(table)
    raise SystemExit(bool(unlike))


if __name__ == "__main__":
    main()
