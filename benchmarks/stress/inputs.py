"""How does the command line take whatever it is given? Cases by kind: tried, clear, traceback, hang.

    python -m benchmarks.stress.inputs                                # all, four minutes on two cores
    python -m benchmarks.stress.inputs --kind checkpoint --only flip  # some, with what they print

Each case runs `mifo_lightning.cli.main` in a forked child of a process that has imported everything once, in an empty
directory, with one thread, limited memory and `y` on standard input. A refusal is clear if there is exactly one line
that begins with `error:`, no traceback, no control character, and status 2 (or 1 for training that broke down).
"""

import argparse
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stress.cases import KINDS, Case, Pantry
from benchmarks.stress.table import finish, markdown

GIB = 2**30
OUTCOMES = ("clear", "accepted", "let in", "turned away", "code ran", "traceback", "hang", "signal", "unclear")
MARKER = "ran"  # a file that foreign code would leave
RIGHT = ("clear", "accepted")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of transformers' own tables
BROKEN = 71


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        kind: Of input.
        case: The case.
        outcome: One of OUTCOMES: let in is accepted what should be refused, turned away the reverse; code ran that
            came with data, a model or a checkpoint.
        said: The error line, or the last lines of what it printed.
        seconds: It took.
    """

    kind: str
    case: Case
    outcome: str
    said: str
    seconds: float

    @property
    def right(self) -> bool:
        """Whether that should have come of it."""
        return self.outcome in RIGHT


def run_main(arguments: list[str]) -> int:
    """The status that a process of this command line ends with."""
    from mifo_lightning.cli import main

    try:
        main(arguments)
        status: object = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # an interpreter that ends waits for its threads
    if isinstance(status, int) or status is None:
        return status or 0
    print(status, file=sys.stderr)
    return 1


def child(case: Case, pantry: Pantry, place: Path, memory: float) -> None:
    """What the forked child does: writes the case's files, runs its command line, and never returns."""
    try:
        os.setsid()
        os.chdir(place)
        for number, name in enumerate(("in", "stdout", "stderr")):
            os.dup2(os.open(place.parent / name, os.O_RDWR | os.O_CREAT), number)
        status = BROKEN
        arguments = case.build(place, pantry)
        status = 70
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + int(memory * GIB),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if case.env:
            program = [sys.executable, "-m", "mifo_lightning", *arguments]
            os.execve(sys.executable, program, {**os.environ, **case.env})
        sys.path.insert(0, str(place))
        status = run_main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status & 255)


def classify(code: int | None, out: str, expect: str) -> tuple[str, str]:
    """Outcome and what was said."""
    errors = [line for line in out.splitlines() if line.startswith("error:")]
    said = errors[0] if errors else " / ".join(out.strip().splitlines()[-2:])
    raw = any(ord(letter) < 32 and letter not in "\n\r\t\b" for letter in COLOURS.sub("", out))
    if code is None:
        return "hang", said
    if code < 0:
        return "signal", f"signal {-code}; {said}"
    if "Traceback (most recent call last)" in out:
        return "traceback", out.strip().splitlines()[-1]
    if raw or (code and (code not in (1, 2) or len(errors) != 1)):
        return "unclear", f"status {code}, {len(errors)} error lines{', control characters' if raw else ''}: {said}"
    if code == 0:
        return ("let in" if expect == "refused" else "accepted"), said
    return ("turned away" if expect == "accepted" else "clear"), said


class Attempt:
    """A case that runs in a child of its own.

    Args:
        kind: Of input.
        case: To run.
        pantry: What it starts from.
        limit: Seconds until it counts as hanging.
        memory: GiB of address space beyond the imports.
    """

    def __init__(self, kind: str, case: Case, pantry: Pantry, limit: float, memory: float) -> None:
        self.kind, self.case, self.limit = kind, case, max(limit, case.limit)
        self.root = Path(tempfile.mkdtemp(prefix="stress-"))
        (self.root / "place").mkdir()
        (self.root / "in").write_text("y\n" * 9)
        self.start = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            child(case, pantry, self.root / "place", memory)

    def poll(self) -> Result | None:
        """The result, once there is one."""
        seconds = time.monotonic() - self.start
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if not done and seconds < self.limit:
            return None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # also what it has left behind
        if not done:
            os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status) if done else None
        self.out = "".join((self.root / part).read_bytes().decode("utf-8", "replace") for part in ("stdout", "stderr"))
        ran = any(self.root.rglob(MARKER)) or (Path.cwd() / MARKER).exists()
        harm = self.case.harm(self.root / "place") if self.case.harm else ""
        shutil.rmtree(self.root, ignore_errors=True)
        if code == BROKEN:
            raise RuntimeError(f"{self.case.name}: the case cannot be built: {self.out}")
        outcome, said = classify(code, self.out, self.case.expect)
        if ran or harm:
            outcome, said = "code ran" if ran else "let in", harm or said
        return Result(self.kind, self.case, outcome, said, seconds)


def result_of(attempt: Attempt) -> Result:
    """Wait for one."""
    while (result := attempt.poll()) is None:
        time.sleep(0.02)
    return result


def fill(root: Path, limit: float, memory: float) -> Pantry:
    """The pantry, its tiny run made."""
    pantry = Pantry(root)
    made = result_of(Attempt("pantry", Case("pantry", lambda place, p: p.fill(), "accepted"), pantry, limit, memory))
    if not made.right or not pantry.checkpoint.is_file():
        raise SystemExit(f"the tiny run that all cases start from fails: {made.said}")
    return pantry


def run_all(chosen: list[tuple[str, Case]], jobs: int, limit: float, memory: float, show: bool = False) -> list[Result]:
    """Run cases, `jobs` at a time."""
    import mifo_lightning.cli  # noqa: F401  once, before the forks

    with tempfile.TemporaryDirectory(prefix="pantry-") as root:
        pantry = fill(Path(root), limit, memory)
        waiting, running, results = chosen[::-1], list[Attempt](), list[Result]()
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Attempt(*waiting.pop(), pantry, limit, memory))
            for attempt in running[:]:
                if (result := attempt.poll()) is not None:
                    running.remove(attempt)
                    results.append(result)
                    if show:
                        print(f"== {result.case.name}: {result.outcome}\n{attempt.out}", flush=True)
            time.sleep(0.02)
    return results


def report(results: list[Result], seconds: float) -> tuple[str, list[str]]:
    """The table by kind, and what was not as expected."""
    rows: list[list[object]] = []
    for kind in [*dict.fromkeys(r.kind for r in results), "all"]:
        mine = [r for r in results if kind in (r.kind, "all")]
        counts = Counter(r.outcome for r in mine)
        rows.append([kind, len(mine), *(counts[o] for o in OUTCOMES), sum(not r.right for r in mine)])
    wrong = [
        f"{r.kind}: `{r.case.name:.80}`: {r.outcome}: {' '.join(r.said.split()):.200}" for r in results if not r.right
    ]
    table = markdown(["input", "tried", *OUTCOMES, "not as expected"], rows)
    return f"{table}\n\n{len(results)} cases in {seconds / 60:.1f} minutes.", wrong


def main() -> None:
    """Run cases and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(KINDS), help="one kind only")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--every", type=int, default=1, help="each so-manieth case only")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    parser.add_argument("--limit", type=float, default=60, help="seconds until a case counts as hanging")
    parser.add_argument("--memory", type=float, default=4, help="GiB of address space beyond the imports")
    parser.add_argument("--show", action="store_true", help="print what each case prints")
    parser.add_argument("--out", type=Path, help="Markdown file to keep the table in")
    given = parser.parse_args()
    kinds = {given.kind: KINDS[given.kind]} if given.kind else KINDS
    chosen = [(kind, case) for kind, cases in kinds.items() for case in cases if given.only in case.name][
        :: given.every
    ]
    chosen.sort(key=lambda pair: -pair[1].limit)  # those that take long first, beside the others
    start = time.monotonic()
    results = run_all(chosen, given.jobs, given.limit, given.memory, given.show)
    finish("inputs", *report(results, time.monotonic() - start), given.out)


if __name__ == "__main__":
    main()
