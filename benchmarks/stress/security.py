"""Who gets in? Attacks by data, models, checkpoints, configurations and texts: tried, refused.

    python -m benchmarks.stress.security

Each attack runs as an input case does (`benchmarks.stress.inputs`); foreign code would leave a file named `ran`.
Refused means that no code ran, nothing was written over or read that should not be, and nothing but plain text was
printed. A class or function that the user's own configuration names is trusted, and so is a reward.
"""

import argparse
import functools
import http.server
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.stress.cases import Case, Pantry
from benchmarks.stress.cases.case import Expected, changed_model, overlay, prepared
from benchmarks.stress.cases.checkpoints import bomb, resume
from benchmarks.stress.cases.data import GOOD, class_in_data, dump, path_in_data
from benchmarks.stress.cases.models import custom_code, index_outside, pickled, settings, tokenizer, written
from benchmarks.stress.inputs import Result, run_all
from benchmarks.stress.table import finish, markdown

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m"
SECRET = "only for the environment"
REACH = [
    "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
    "{{ lipsum.__globals__['os'].system('touch ran') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(raise_exception) }}",
    "{% include '/etc/passwd' %}{{ messages }}",
    "{% import 'os' as os %}{{ os.system('touch ran') }}",
]


def rows(place: Path, **columns: object) -> str:
    """Good rows with some columns replaced, as data.train."""
    (place / "rows.jsonl").write_text(dump([{**row, **columns} for row in GOOD]))
    return "--data.train rows.jsonl"


def template(text: str) -> Callable[[Path], str]:
    """A chat template in a file of somebody else's."""

    def prepare(place: Path) -> str:
        (place / "chat.jinja").write_text(text)
        return "--data.prompts.chat_template chat.jinja"

    return prepare


def served(place: Path, pantry: Pantry) -> list[str]:
    """A checkpoint that a web server hands out, with a pickle inside."""
    directory = place.parent / "served"
    directory.mkdir()
    shutil.copy(pantry.checkpoint, directory / "last.ckpt")
    bomb(directory / "last.ckpt")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(directory))
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True).start()
    return pantry.fit(place, "--ckpt_path", f"http://127.0.0.1:{server.server_port}/last.ckpt")


def over_a_link(name: str, link: str, target: str) -> Case:
    """In the run's directory somebody has put a link to a file or directory that is not the run's."""

    def build(place: Path, pantry: Pantry) -> list[str]:
        victim = place / "victim" / target
        victim.parent.mkdir(parents=True)
        victim.write_text("precious")
        path = place / "out" / link
        path.parent.mkdir(parents=True)
        path.symlink_to(victim if Path(target).name == path.name else victim.parent)
        return pantry.fit(place)

    def harm(place: Path) -> str:
        victim = place / "victim" / target
        kept = victim.is_file() and victim.read_text() == "precious" and len(list(victim.parent.iterdir())) == 1
        return "" if kept else f"{target} outside the run was written over or joined by others"

    return replace(Case(name, build, "either"), harm=harm)


def elsewhere(place: Path) -> str:
    """Files outside `out` that the case has not put there."""
    own = {"rows.jsonl", "over.yaml", "chat.jinja", "model", "out"}
    return ", ".join(path.name for path in place.iterdir() if path.name not in own)


def leaks(place: Path) -> str:
    """Whether what only the environment holds has come into the files of the run."""
    os_files = [path for path in (place / "out").rglob("*") if path.suffix in (".jsonl", ".json", ".yaml")]
    return next((f"{path.name} holds it" for path in os_files if SECRET in path.read_text()), "")


def raw_in_files(place: Path) -> str:
    """Escape characters in files that a terminal shows."""
    texts = [path for path in (place / "out").rglob("*") if path.suffix in (".jsonl", ".json", ".yaml", ".md", ".csv")]
    return next((f"{path.name} holds them raw" for path in texts if "\x1b" in path.read_text()), "")


def hub(name: str) -> Case:
    """A hub name that is none."""
    return Case(f"hub name {name}", lambda place, pantry: pantry.fit(place, f"--model.model={name}"))


def auto_tokenizer(directory: Path) -> None:
    """A tokenizer that brings code of its own."""
    tokenizer(auto_map={"AutoTokenizer": ["mine.T", "mine.T"]}, tokenizer_class="T")(directory)
    (directory / "mine.py").write_text("open('ran', 'w').close()\nclass T: pass\n")


def unsaid_markup(name: str, expect: Expected = "accepted") -> Case:
    """A text that a table of the terminal would take for its own commands."""
    return prepared(f"markup in data_source: {name}", lambda place: rows(place, data_source=name), expect)


TAG = "!!python/object/apply:os.system ['touch ran']"
ATTACKS: dict[str, list[Case]] = {
    "code in a checkpoint": [
        resume("a pickle in last.ckpt", bomb),
        Case("a pickle behind http://", served),
    ],
    "code in a model directory": [
        changed_model("auto_map of the model, yes on standard input", custom_code),
        changed_model("auto_map of the tokenizer", auto_tokenizer, "either"),
        changed_model("weights as a pickle", pickled),
        changed_model("a shard index that names a file elsewhere", index_outside),
        changed_model(
            "quantization code", settings("config.json", quantization_config={"quant_method": "mine"}), "either"
        ),
    ],
    "code in data": [
        prepared("class_path in a jsonl file", class_in_data),
        prepared("a path in a jsonl file", path_in_data),
        prepared(
            "a YAML tag in a jsonl file", lambda p: ((p / "rows.jsonl").write_text(TAG), "--data.train rows.jsonl")[1]
        ),
        prepared(
            "a YAML tag in a json file", lambda p: ((p / "rows.json").write_text(TAG), "--data.train rows.json")[1]
        ),
        replace(
            prepared("an interpolation in a row", lambda p: rows(p, data_source="${oc.env:STRESS_SECRET}"), "accepted"),
            env={"STRESS_SECRET": SECRET},
            harm=leaks,
        ),
    ],
    "code in a configuration": [
        overlay("python/object/apply", f"data: {{system_prompt: {TAG}}}\n"),
        overlay("python/object/new", "data: {system_prompt: !!python/object/new:os.system ['touch ran']}\n"),
        overlay("python/name", "reward: !!python/name:os.system\n"),
        overlay(
            "a reward that is a function of the system",
            "reward: {class_path: os.system, init_args: {command: touch ran}}\n",
        ),
        overlay(
            "a logger that is one", "trainer: {logger: {class_path: os.system, init_args: {command: touch ran}}}\n"
        ),
        overlay("a resolver that runs", 'data: {system_prompt: \'${eval:__import__("os").system("touch ran")}\'}\n'),
    ],
    "chat templates that reach for Python": [
        *(prepared(f"file: {text}", template(text)) for text in REACH),
        *(changed_model(f"model: {text}", written("chat_template.jinja", text)) for text in REACH),
    ],
    "control characters": [
        replace(prepared("in data_source", lambda p: rows(p, data_source=ESCAPES), "either"), harm=raw_in_files),
        prepared("in the name of a column", lambda p: rows(p, **{"reward_model": None, ESCAPES: 1})),
        prepared("in a truth", lambda p: rows(p, reward_model={"ground_truth": ESCAPES}), "either"),
        prepared("in a role", lambda p: rows(p, prompt=[{"role": ESCAPES, "content": "1+1="}]), "either"),
        prepared("in a file name", lambda p: f"--data.train '{ESCAPES}.jsonl'"),
        prepared("in a model name", lambda p: f"--model.model './{ESCAPES}'"),
        overlay("in a key", json.dumps({ESCAPES: 3})),
        overlay("in a value", 'model: {moments: "\\e[2J"}\n'),
        changed_model("in the name of a weight's file", settings("config.json", model_type=ESCAPES)),
        changed_model(
            "in an exception of a chat template",
            written("chat_template.jinja", "{{ raise_exception('" + ESCAPES + "') }}"),
        ),
    ],
    "markup": [
        unsaid_markup("[/x]"),
        unsaid_markup("[bold]x[/bold]"),
        unsaid_markup("[link=file:///etc/passwd]x[/link]"),
        unsaid_markup("</td><script>alert(1)</script>"),
        unsaid_markup("| a | b |\n|---|---|"),
        unsaid_markup("$\\input{/etc/passwd}$"),
    ],
    "paths": [
        *(
            replace(prepared(f"data_source {name}", lambda p, n=name: rows(p, data_source=n), "either"), harm=elsewhere)  # type: ignore[misc]
            for name in ("../../escaped", "/tmp/stress-escaped/x", "a/b/c", "..", "con\0nul")
        ),
        over_a_link("a link in the place of model/", "model", "weights"),
        over_a_link("a link in the place of last.ckpt", "checkpoints/last.ckpt", "last.ckpt"),
        over_a_link("a link in the place of config.yaml", "config.yaml", "config.yaml"),
        over_a_link("a link in the place of samples.jsonl", "samples.jsonl", "samples.jsonl"),
    ],
    "hub names": [
        hub(name)
        for name in (
            "../../etc",
            "--help/x",
            "a/b/../../../etc",
            "http://127.0.0.1:9/x",
            "owner/$(touch ran)",
            "owner/x;touch ran",
        )
    ],
}


def report(results: list[Result], texts: dict[str, str], seconds: float) -> tuple[str, list[str]]:
    """The table by kind of attack, and what got in."""
    counts = {kind: [r.right for r in results if r.kind == kind] for kind in ATTACKS}
    counts["responses and report pages"] = [not harm for harm in texts.values()]
    counts["all"] = [right for part in counts.values() for right in part]
    table = [[kind, len(part), sum(part)] for kind, part in counts.items() if part]
    wrong = [
        f"{r.kind}: `{r.case.name!r:.90}`: {r.outcome}: {' '.join(r.said.split())!r:.200}"
        for r in results
        if not r.right
    ]
    wrong += [f"{name}: {harm}" for name, harm in texts.items() if harm]
    text = markdown(["attack by", "tried", "refused or harmless"], table)
    return f"{text}\n\n{seconds / 60:.1f} minutes.", wrong


def grade_hostile_texts() -> dict[str, str]:
    """Responses that try to be code for the graders, and pages for the report: name -> what went wrong."""
    from mifo_lightning.rewards.math_reward import MathReward

    with tempfile.TemporaryDirectory() as name:
        before = Path.cwd()
        os.chdir(name)
        try:
            texts = [
                "\\boxed{__import__('os').system('touch ran')}",
                "\\boxed{9**9**9**9**9}",
                "\\boxed{" + "{" * 20_000 + "}" * 20_001,
                "\\boxed{\\input{/etc/passwd}}",
                "\\boxed{1" + "0" * 100_000 + "}",
                "\\boxed{" + "\\frac{1}" * 5000 + "{2}}",
                "\x00\ud800".encode("utf-8", "replace").decode() + "\\boxed{1}",
            ]
            reward, found = MathReward(), {}
            for text in texts:
                start = time.monotonic()
                try:
                    scores = reward([text], ["2"])
                    harm = f"scores {scores}" if any(scores) else ""
                except Exception as error:
                    harm = f"{type(error).__name__}: {error}"
                late = time.monotonic() - start > 30
                ran = Path("ran").exists()
                found[f"MathReward: {text[:50]!r}"] = "code ran" if ran else "takes more than 30 s" if late else harm
            reward.close()
        finally:
            os.chdir(before)
    return {**found, **hostile_page()}


def hostile_page() -> dict[str, str]:
    """A table of the report, its cells hostile."""
    from markupsafe import escape

    from mifo_lightning.lab.report.page import _plain

    evil = "</td><script>alert(1)</script>"
    return {
        "report.html: a script": "epochs_per_rollout" if "<script" in str(escape(evil)) else "",
        "report.md: a script": "epochs_per_rollout" if "<script" in _plain(evil) else "",
        "report.md: control characters": "pass" if "\x1b" in _plain(ESCAPES) else "",
    }


def main() -> None:
    """Attack and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kinds of attack whose name holds this")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    parser.add_argument("--show", action="store_true", help="print what each attack prints")
    parser.add_argument("--out", type=Path, help="Markdown file to keep the table in")
    given = parser.parse_args()
    start = time.monotonic()
    chosen = [(kind, case) for kind, cases in ATTACKS.items() if given.only in kind for case in cases]
    results = run_all(chosen, given.jobs, 60.0, 4.0, given.show)
    texts = grade_hostile_texts() if not given.only else {}
    finish("security", *report(results, texts, time.monotonic() - start), given.out)


if __name__ == "__main__":
    main()
