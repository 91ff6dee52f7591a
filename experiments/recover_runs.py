"""Question: what did each run of an old page score? Reads it off the page's pictures, exactly, and remakes the page.

    git show 1dca096:experiments/ablations/controls.yaml > controls.yaml
    python -m experiments.recover_runs docs/results/controls --config controls.yaml

Pages made before `runs.csv` was kept show every run as a mark, whose place is written to a millionth of a pixel: a
score to about 1e-8. Every score is a share of a known number of questions, so it is rounded to a whole number of
correct answers, and refused if it is not within a thousandth of one; the score over all skills must have as many
correct answers as its skills. The old page stays beside the new one as `before_fix`, marked.
"""

import argparse
import json
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.report import write_report
from experiments.report.drawing import short
from experiments.report.results import PLAN, RUNS, Ablation, Arm, Cell, write_runs
from mifo_lightning.errors import InputError
from mifo_lightning.terminal import printable

QUESTIONS = 4096
"""Of the final evaluation; on each of its skills 1024."""
NEAR = 1e-3
"""How far from a whole number of correct answers a mark may be."""
OLD = (
    "This page predates the mending of its statistics: its intervals, p and what it calls significant are not to be "
    "used. Runs on one base were taken for independent. With no true difference, 13 arms and 3 bases x 5 seeds, some "
    "arm was called significant in 47 to 80 % of simulated grids in which arms differ by base, and 95 % intervals of "
    "differences had the truth in them in 79 to 88 %. Scores, differences and their intervals are recomputed in "
    "report.md. Costs and pictures of single runs are as they were recorded."
)
NEW = (
    "These runs predate the mending of the report's statistics and of faults of the framework (CHANGELOG, 0.3.0), and "
    "will be made again on other bases. Their final scores were read exactly off the pictures of the page first made, "
    "before_fix.md, which also has what else the runs recorded; all statistics here are recomputed from them. No "
    "primary contrast had been named."
)


def read_marks(picture: str, arms: list[str], bases: int, seeds: int) -> np.ndarray:
    """The value of every mark of a dot plot, float64 [arms, bases, seeds], for arms in the order of the plot.

    Raises:
        InputError: The picture has other labels or another number of marks.
    """
    text = r'<text [^>]*text-anchor: {}[^>]* x="([\d.]+)"[^>]*>([^<]*)</text>'
    labels = [unescape(label) for _, label in re.findall(text.format("end"), picture)]
    ticks = [(float(x), float(label.replace("\u2212", "-"))) for x, label in re.findall(text.format("middle"), picture)
             if re.fullmatch(r"[\u2212\d.]+", label)]  # fmt: skip
    marks = re.findall(r'<use [^>]*x="([\d.]+)"[^>]*fill-opacity: 0\.6', picture)
    if labels != [short(arm) for arm in arms] or len(marks) != len(arms) * bases * seeds or len(ticks) < 2:
        raise InputError(f"a picture has {len(ticks)} ticks, {len(marks)} marks and the arms {labels}, not {arms}")
    (x0, low), (x1, high) = ticks[0], ticks[-1]
    values = low + (np.array(marks, dtype=np.float64) - x0) / (x1 - x0) * (high - low)
    return values.reshape(len(arms), bases, seeds)


def correct_answers(values: np.ndarray, questions: int, metric: str) -> np.ndarray:
    """Scores as whole numbers of correct answers; raises InputError where one is none."""
    counts = values * questions
    off = np.abs(counts - counts.round()).max()
    if off > NEAR:
        raise InputError(f"{metric}: a mark is {off:.3g} answers of {questions} off a whole number")
    return counts.round().astype(int)


def scores_of(page: str, order: list[str], plan: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every metric's scores [arms, bases, seeds] in the order of the page, each a whole number of questions."""
    pictures = {
        unescape(label): svg for svg, label in re.findall(r'(<svg [^>]*aria-label="([^"]*)".*?</svg>)', page, re.S)
    }
    found = {}
    for metric in dict.fromkeys([plan["primary"], *plan["metrics"]]):
        questions = QUESTIONS // 4 if "/" in metric else QUESTIONS
        marks = read_marks(pictures[metric], order, len(plan["bases"]), len(plan["seeds"]))
        found[metric] = correct_answers(marks, questions, metric) / questions
    skills = [metric for metric in found if metric != "avg@1"]
    if "avg@1" in found and not np.array_equal(found["avg@1"], np.mean([found[skill] for skill in skills], axis=0)):
        raise InputError(f"avg@1 is not the mean of {', '.join(skills)}")
    return found


def recover(directory: Path, plan: dict[str, Any]) -> Ablation:
    """The ablation of an old page with the final scores of its runs."""
    table = re.sub(r"\\(.)", r"\1", unescape((directory / "before_fix.md").read_text(encoding="utf-8")))
    rows = re.search(r"highest first.*?\n\| --- .*?\n(.*?)\n\| before training", table, re.S)
    made = re.search(r"Made by: (.*?), at commit (.*?)\. Bases", table)
    if not rows or not made or plan["question"] not in table:
        raise InputError(f"{directory}: the page is not one of this configuration, or not one of before the fix")
    order = [line.split(" | ")[0].removeprefix("| ").removesuffix(" (reference)") for line in rows[1].splitlines()]
    scores = scores_of((directory / "before_fix.html").read_text(encoding="utf-8"), order, plan)
    cells = [
        Cell(arm, base, seed, directory, "done", None, float("nan"),
             {"after": {metric: float(values[order.index(arm), b, s]) for metric, values in scores.items()}})
        for arm in plan["arms"] for b, base in enumerate(plan["bases"]) for s, seed in enumerate(plan["seeds"])
    ]  # fmt: skip
    arms = [Arm(name, arm.get("configs", []), arm.get("set", {})) for name, arm in plan["arms"].items()]
    keys = ("name", "question", "primary", "metrics", "reference", "design", "trade_off", "setting")
    return Ablation(
        **{key: plan[key] for key in keys}, contrasts=plan.get("contrasts", []), command=made[1], commit=made[2],
        arms=arms, bases=list(plan["bases"]), seeds=dict.fromkeys(plan["bases"], plan["seeds"]), cells=cells, note=NEW,
    )  # fmt: skip


def set_aside(directory: Path) -> None:
    """Keep the old page as `before_fix`, marked."""
    for kind, head, mark in (
        ("md", "\n\n", f"> **{OLD}**\n\n"),
        ("html", "</h1>\n", f'<p class="verdict">{OLD}</p>\n'),
    ):
        old = directory / f"report.{kind}"
        text = old.read_text(encoding="utf-8").replace(
            "[report.html](report.html)", "[before_fix.html](before_fix.html)"
        )
        at = text.index(head) + len(head)
        old.with_name(f"before_fix.{kind}").write_text(text[:at] + mark + text[at:], encoding="utf-8")


def main() -> None:
    """Set the old page aside, write `runs.csv` and `ablation.json`, make the page again from these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the page is")
    parser.add_argument("--config", type=Path, required=True, help="the ablation file that the page was made with")
    args = parser.parse_args()
    plan = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    try:
        if not (args.directory / "before_fix.md").is_file():
            set_aside(args.directory)
        ablation = recover(args.directory, plan)
        record = {key: value for key, value in vars(ablation).items() if key not in ("cells", "scores_only")}
        record["arms"] = [vars(arm) for arm in ablation.arms]
        (args.directory / PLAN).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_runs(ablation, args.directory / RUNS)
        print(f"{len(ablation.cells)} runs; wrote {write_report(args.directory)}")
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
