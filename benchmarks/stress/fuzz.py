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
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from benchmarks.stress.cases.case import MIFO, SMALL, TINY
from benchmarks.stress.table import finish, markdown
from mifo_lightning.cli.packaged import DEFAULTS
from mifo_lightning.common.terminal import quiet

SECONDS = 20  # until a try counts as hanging
SCALARS: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e308),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "x",
        "1",
        "1e-3",
        "nan",
        "null",
        "true",
        "~",
        "-",
        "0x1f",
        "1_000",
    ),
    *(
        "\n",
        "\t",
        "\r\n",
        "\0",
        "\x1b[2J",
        "\x1b]0;t\x07",
        "[/x]",
        "[bold]",
        "\u2028",
        "\u202e",
        "\U0001f986",
        "\ufeff",
        "\ud800",
    ),
    *(
        "${nowhere}",
        "${..x}",
        "${oc.env:NOWHERE}",
        "${",
        "$",
        "{{ x }}",
        "{% for",
        "../../x",
        "/dev/null",
        "os.system",
        "os.path",
    ),
    *("embedded", "top", "mean", "ddp", "x" * 5000, "9" * 4500, ">", "<think>", "user", "assistant", "system"),
]
COMPOUND: list[Any] = [[], {}, [None], [[]], [1, 2, 3], {"a": 1}, {"class_path": "os.path"}, {"class_path": None}]
COMPOUND += [{"init_args": {}}, {"class_path": "mifo_callbacks.GradientFreezing"}, [["x"] * 3] * 3, {"": ""}]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a nested value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate(value: Any, chance: random.Random) -> Any:
    """A copy with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        found = list(places(value))
        if not found:
            return copy.deepcopy(chance.choice(SCALARS + COMPOUND))
        container, key = chance.choice(found)
        old = container[key]
        kind = chance.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = [old]
        elif kind == 2:
            container[key] = copy.deepcopy(chance.choice(found)[0])
        elif kind == 3 and isinstance(container, dict):
            container[str(key) + chance.choice(["x", "", ".y", " ", "\n"])] = container.pop(key)
        elif kind == 4 and isinstance(container, dict):
            container[chance.choice([None, 7, "", "x.y", "class_path", "init_args", "dict_kwargs", "\x1b[2J"])] = old
        elif kind == 5 and isinstance(old, str | int | float) and not isinstance(old, bool):
            container[key] = chance.choice([str(old), str(old) * 2, old * 2, f" {old}"])
        else:
            container[key] = copy.deepcopy(chance.choice(SCALARS + COMPOUND))
    return value


def scramble(text: str, chance: random.Random) -> bytes:
    """The text with a few bytes changed."""
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        at, many = chance.randrange(len(raw) or 1), chance.choice([1, 1, 2, 20])
        kind = chance.randrange(5)
        if kind == 0:
            del raw[at : at + many]
        elif kind == 1:
            raw[at:at] = bytes(chance.randrange(256) for _ in range(many))
        elif kind == 2:
            raw[at:at] = chance.choice(
                [b"[", b"{", b"&a ", b"*a ", b"!!python/name:os.system ", b'"', b"\n", b"\t", b": ", b"- "]
            )
        elif kind == 3:
            raw[at:at] = raw[at : at + many]
        elif raw:
            raw[at % len(raw)] ^= 1 << chance.randrange(8)
    return bytes(raw)


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
