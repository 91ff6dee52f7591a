"""Does any configuration or row end in a traceback? Random mutations of valid ones, each reproducible by its number.

    python -m benchmarks.stress.fuzz                                   # 3,000 configurations, 17,000 files of rows
    python -m benchmarks.stress.fuzz --kind configuration --number 12  # one of them again, shown

A configuration goes through `mifo_lightning.cli.main` up to the point where reward, model, data and Trainer are built:
only the making of the parser, the same for all, is not repeated. Rows go through `read_rows` and `build_questions`.
Allowed are acceptance, an InputError, and for a configuration one line and status 2.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import multiprocessing
import random
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from benchmarks.stress.cases.case import MIFO, SMALL, TINY
from benchmarks.stress.mutations import mutate, scramble
from benchmarks.stress.table import finish, markdown
from mifo_lightning.cli.packaged import DEFAULTS
from mifo_lightning.common.terminal import quiet

SECONDS = 20  # until a try counts as hanging


@cache
def configuration() -> dict[str, Any]:
    """A valid one: the small run of the input cases, every key written out."""
    whole = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))

    def lay(over: dict[str, Any], under: dict[str, Any]) -> None:
        for key, value in over.items():
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                lay(value, under[key])
            else:
                under[key] = value

    for path in (TINY, MIFO):
        lay(yaml.safe_load(path.read_text(encoding="utf-8")), whole)
    lay(SMALL, whole)
    return dict(whole)


@cache
def prebuilt() -> Any:
    """A command line whose parser is made."""
    cli: Any = import_module("mifo_lightning.cli.entry")

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "valid.yaml"
        path.write_text(yaml.safe_dump(configuration()))
        return cli.make_cli(["--config", str(path)], run=False)


def parse_and_build(args: list[str] | None, run: bool = True) -> None:
    """What `make_cli` does after its parser is made and before anything runs."""
    cli = prebuilt()
    cli.parse_arguments(cli.parser, args)
    cli._set_seed()
    cli.instantiate_classes()


def try_configuration(chance: random.Random, place: Path) -> str:
    """One mutated configuration through `main`."""
    cli: Any = import_module("mifo_lightning.cli.entry")

    valid = configuration()
    if chance.random() < 0.35:
        content = scramble(yaml.safe_dump(valid), chance)
    else:
        content = yaml.dump(mutate(valid, chance), allow_unicode=True).encode("utf-8", "surrogatepass")
    path = place / "mutated.yaml"
    path.write_bytes(content)
    prebuilt()
    original, cli.make_cli = cli.make_cli, parse_and_build
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            cli.main(["--config", str(path)])
    except SystemExit as end:
        errors = [line for line in said.getvalue().splitlines() if line.startswith("error:")]
        if end.code != 2 or len(errors) != 1:
            raise AssertionError(f"status {end.code} with {len(errors)} error lines") from end
        return "refused"
    finally:
        cli.make_cli = original
    return "accepted"


@cache
def tokenizer() -> Any:
    """Of the embedded model."""
    from mifo_lightning.policy.loading import load_tokenizer

    return load_tokenizer("embedded")


@cache
def valid_rows() -> list[Any]:
    """Of the embedded task."""
    from mifo_lightning.data.skills import Skills

    return Skills(["addition", "mirrored", "sorting", "reversal"], 64).rows()


def try_rows(chance: random.Random, place: Path) -> str:
    """One file of four rows, mutated."""
    from mifo_lightning.common.errors import InputError
    from mifo_lightning.data.questions import build_questions
    from mifo_lightning.data.rows import read_rows
    from mifo_lightning.data.settings import Demonstrations, Prompts
    from mifo_lightning.policy.template import ChatTemplate
    from mifo_lightning.rewards.last_answer import LastAnswerReward

    rows = copy.deepcopy(chance.sample(valid_rows(), 4))
    text = chance.random() < 0.25
    if not text:
        at = chance.randrange(4)
        rows[at] = mutate(rows[at], chance)
    lines = "".join(json.dumps(row, ensure_ascii=chance.random() < 0.5) + "\n" for row in rows)
    path = place / "rows.jsonl"
    path.write_bytes(scramble(lines, chance) if text else lines.encode("utf-8", "surrogatepass"))
    try:
        build_questions(
            read_rows(path, "data.train"),
            ChatTemplate(tokenizer(), None, date.today()),
            Prompts(max_tokens=16),
            Demonstrations(answer_after=">", max_tokens=14),
            reward=LastAnswerReward(answer_after=">"),
            where="data.train",
        )
    except InputError:
        return "refused"
    return "accepted"


TRIES: dict[str, tuple[Callable[[random.Random, Path], str], int]] = {
    "configuration": (try_configuration, 3000),
    "rows": (try_rows, 17000),
}


def attempt(kind: str, seed: int, number: int, keep: Path | None = None) -> tuple[int, str, str]:
    """One try: its number, what came of it, and the last line of its traceback."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        signal.alarm(SECONDS)
        try:
            return number, TRIES[kind][0](random.Random(f"{seed} {kind} {number}"), keep or Path(name)), ""
        except TimeoutError as error:
            return number, "hang", str(error)
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            line = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            return number, "traceback", " ".join(line.split())
        finally:
            signal.alarm(0)


def survey(kind: str, seed: int, tries: int, jobs: int) -> tuple[list[tuple[int, str, str]], float]:
    """So many tries, and the seconds that they took."""
    logging.disable(logging.WARNING)  # Lightning's lines on every Trainer
    quiet()
    prebuilt(), tokenizer(), valid_rows()  # once, before the forks
    start = time.monotonic()
    with multiprocessing.get_context("fork").Pool(jobs, _limit) as pool:
        found = pool.map(partial(attempt, kind, seed), range(tries), chunksize=25)
    return found, time.monotonic() - start


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30,) * 2)


def report(surveyed: dict[str, tuple[list[tuple[int, str, str]], float]]) -> tuple[str, list[str]]:
    """The table by kind, and each kind of failure with the numbers of its first tries."""
    rows, wrong = [], []
    for kind, (found, seconds) in surveyed.items():
        counts = Counter(outcome for _, outcome, _ in found)
        outcomes = [counts[name] for name in ("refused", "accepted", "traceback", "hang")]
        rows.append([kind, len(found), *outcomes, f"{len(found) / seconds:.0f}"])
        failures: dict[str, list[int]] = {}
        for number, outcome, line in found:
            if outcome in ("traceback", "hang"):
                failures.setdefault(line[:160], []).append(number)
        wrong += [f"{kind} {numbers[:3]}, {len(numbers)} in all: {line}" for line, numbers in failures.items()]
    head = ["mutated", "tries", "refused in one line", "accepted", "traceback", "hang", "tries per second"]
    return markdown(head, rows), wrong


def main() -> None:
    """Try and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(TRIES), help="one kind only")
    parser.add_argument("--tries", type=int, help="of each kind")
    parser.add_argument("--number", type=int, help="one try again; its files stay in the present directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    parser.add_argument("--out", type=Path, help="Markdown file to keep the table in")
    given = parser.parse_args()
    if given.number is not None:
        print(*attempt(given.kind or "rows", given.seed, given.number, Path()), sep="\n")
        return
    kinds = [given.kind] if given.kind else list(TRIES)
    surveyed = {kind: survey(kind, given.seed, given.tries or TRIES[kind][1], given.jobs) for kind in kinds}
    finish("fuzz", *report(surveyed), given.out)


if __name__ == "__main__":
    main()
