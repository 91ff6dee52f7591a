"""Does a killed run go on to the same bits? Runs killed at random, resumed, and compared with an undisturbed one.

    python -m benchmarks.stress.kills                     # all: 60 on one process, 20 on DDP x 2, 20 on FSDP2 x 2
    python -m benchmarks.stress.kills --only mifo --points 4

A chain is one run that is killed several times and goes on from its `last.ckpt` each time (or from the start, where
there is none yet) until it ends. Moments are drawn with a seed over the time that training takes; every second one
waits for a checkpoint to be written and hits the process while it is. Signals are SIGKILL to the process group or to
one rank, and SIGTERM. At the end weights, history and samples must have the bits of an undisturbed run. A chain that
does not counts all its kills as lost.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.stress.killed_runs import (
    ONE_PROCESS,
    TWO_PROCESSES,
    Run,
    Variant,
    gone,
    results,
    signature,
)
from benchmarks.stress.table import finish, markdown

PER_CHAIN = 4
PATIENCE = 180.0  # seconds until a process that was hit, or that goes on, counts as hung


@dataclass
class Chain:
    """What came of one run that was killed several times.

    Attributes:
        kills: (signal, who was hit, whether a checkpoint was being written, return code).
        restarts: Times that no checkpoint was there yet.
        hung: Times that it had to be ended by force.
        problem: Why it was lost, if it was.
        same: Names of results, each with whether it has the bits of the undisturbed run.
    """

    kills: list[tuple[str, str, bool, int | None]] = field(default_factory=list)
    restarts: int = 0
    hung: int = 0
    problem: str = ""
    same: dict[str, bool] = field(default_factory=dict)


def undisturbed(variant: Variant) -> tuple[dict[str, str], float, float]:
    """Results, seconds until training begins, seconds that it takes."""
    with tempfile.TemporaryDirectory(prefix="whole-") as name:
        run, start = Run(variant, Path(name)), time.monotonic()
        checkpoints = run.out / "checkpoints"
        run.ended(PATIENCE, lambda: checkpoints.is_dir() and any(checkpoints.iterdir()))
        first = time.monotonic() - start
        done, code = run.ended(10 * PATIENCE)
        seconds = time.monotonic() - start
        run.end()
        if not done or code:
            raise SystemExit(f"{variant.name}: the undisturbed run ends with {code}: {_said(run.place)}")
        return results(run.out), first, seconds - first


def hit(run: Run, chance: random.Random, variant: Variant) -> tuple[str, str]:
    """Send a signal; which, and to whom."""
    name = "SIGTERM" if chance.random() < 0.35 else "SIGKILL"
    number = signal.Signals[name]
    if variant.ranks == 1:
        os.kill(run.pid, number)
        return name, "process"
    who = chance.choice(["group", "rank 0", "rank 1"])
    ranks = run.ranks()
    if who == "rank 1" and len(ranks) > 1:
        os.kill(ranks[1], number)
    elif who == "rank 0":
        os.kill(run.pid, number)
    else:
        who = "group"
        os.killpg(run.pid, number)
    return name, who


def chain(variant: Variant, whole: tuple[dict[str, str], float, float], kills: int, seed: int) -> Chain:
    """Kill a run so many times at moments drawn with `seed`, let it end, compare."""
    expected, begins, lasts = whole
    chance, found = random.Random(f"{variant.name} {seed}"), Chain()
    place = Path(tempfile.mkdtemp(prefix="chain-"))
    try:
        for number in range(kills):
            if not _kill_once(Run(variant, place), chance, variant, begins, lasts, number % 2 == 1, found):
                break
            if not (place / "out" / "checkpoints" / "last.ckpt").exists():
                found.restarts += 1
                shutil.rmtree(place / "out", ignore_errors=True)
        run = Run(variant, place)
        done, code = run.ended(PATIENCE * 3)
        run.end()
        found.hung += not done
        if code and "is there already" in _said(place):  # it had ended before it was hit
            code = 0
        if code or not done:
            found.problem = f"ended with {code}: {_said(place)}"
        else:
            made = results(place / "out")
            found.same = {name: made[name] == digest for name, digest in expected.items()}
    except OSError as error:
        found.problem = str(error)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return found


def _kill_once(
    run: Run, chance: random.Random, variant: Variant, begins: float, lasts: float, aimed: bool, found: Chain
) -> bool:
    """Hit the run at its next moment; False if it had ended by then."""
    checkpoints = run.out / "checkpoints"

    def written(seconds: float) -> bool:
        before = signature(checkpoints)
        return run.ended(seconds, lambda: signature(checkpoints) != before)[0]

    if chance.random() < 0.2:  # any moment, also while the program is being loaded
        done, _ = run.ended(begins * chance.uniform(0.3, 1.2))
    else:
        done = written(PATIENCE) or run.ended(chance.uniform(0, lasts / PER_CHAIN * 1.2))[0]
    if aimed and not done:
        done = written(3.0)
        time.sleep(chance.uniform(0, 0.01))
    if done:
        return False
    ranks = run.ranks()
    name, who = hit(run, chance, variant)
    ended, code = run.ended(PATIENCE)
    if name == "SIGKILL" and code == 0:  # it was faster
        return False
    if not (ended and gone(ranks, PATIENCE)):
        code = None
        found.hung += 1
    run.end()
    found.kills.append((name, who, aimed, code))
    return True


def _said(place: Path) -> str:
    lines = (place / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")[:200]


def survey(variant: Variant, points: int, jobs: int, seed: int) -> list[Chain]:
    """Chains until there are so many kills."""
    whole = undisturbed(variant)
    found: list[Chain] = []
    kills = min(points, PER_CHAIN)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(jobs) as pool:
        while (missing := points - sum(len(c.kills) for c in found)) > 0 and len(found) < 3 * points:
            seeds = [seed + len(found) + i for i in range(max(jobs, -(-missing // kills)))]
            found += pool.map(partial(chain, variant, whole, kills), seeds, chunksize=1)
    return found


def report(surveyed: dict[str, list[Chain]]) -> tuple[str, list[str]]:
    """The table by variant, and what went wrong."""
    rows, wrong = [], []
    for name, chains in surveyed.items():
        kills = [kill for c in chains for kill in c.kills]
        good = [c for c in chains if not c.problem and all(c.same[k] for k in ("weights", "history", "samples"))]
        same = sum(len(c.kills) for c in good)
        status = [code for name, _, _, code in kills if name == "SIGTERM" and code not in (143, -15, None)]
        rows.append(
            [
                name,
                len(kills),
                sum(kill[0] == "SIGTERM" for kill in kills),
                sum(kill[2] for kill in kills),
                sum(c.restarts for c in chains),
                same,
                len(kills) - same,
                sum(c.hung for c in chains),
                len(status),
            ]
        )
        wrong += [
            f"{name}: {c.problem or [k for k, v in c.same.items() if not v]} after {c.kills}"
            for c in chains
            if c not in good
        ]
        twice = sum(not c.same.get("samples.jsonl", True) for c in good)
        if twice:
            wrong.append(
                f"{name}: samples.jsonl of {twice} of {len(good)} runs holds rows twice, drawn again after a kill"
            )
        wrong += [f"{name}: hung after {k[0]} to {k[1]}" for k in kills if k[3] is None]
        if status:
            wrong.append(f"{name}: SIGTERM ended with status {sorted(set(status))}, should be 143")
    totals = [sum(row[i] for row in rows) for i in range(1, len(rows[0]))]  # type: ignore[misc]
    head = [
        "run",
        "kills",
        "SIGTERM",
        "aimed at a checkpoint being written",
        "begun again",
        "same bits",
        "lost",
        "hung",
        "SIGTERM: status not 143",
    ]
    return markdown(head, [*rows, ["all", *totals]]), wrong


def main() -> None:
    """Kill, resume, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--points", type=int, help="kills of each variant; 12 on one process, 20 on two")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Markdown file to keep the table in")
    given = parser.parse_args()
    import mifo_lightning.cli  # noqa: F401  once, before the forks

    surveyed = {}
    for variant in ONE_PROCESS + TWO_PROCESSES:
        if given.only in variant.name:
            points = given.points or (12 if variant.ranks == 1 else 20)
            start = time.monotonic()
            surveyed[variant.name] = survey(variant, points, given.jobs, given.seed)
            print(f"{variant.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    finish("kills", *report(surveyed), given.out)


if __name__ == "__main__":
    main()
