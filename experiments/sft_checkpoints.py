"""Where is SFT alone at its best? Writes, of every base, the checkpoint of an SFT run that is best on validation.

    python -m experiments.sft_checkpoints --bases runs/bases/seed* --jobs 2 --out runs/sft_bases

One run a base (`methods/sft`) exports its model at the given steps; each is evaluated as `validate` does, on the
questions of the val split, and the one of highest `--metric` becomes `OUT/<base>`: what `from_sft.yaml` starts from.
Step 0, the base itself, is among them. Runs that are done are kept; the table says what was chosen, and
`OUT/chosen.json` all that was measured.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments.prune_update import make_evaluate, model_of, read_weights
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import quiet
from mifo_lightning.lab.cell import write_json
from mifo_lightning.lab.exit_status import exit_status
from mifo_lightning.lab.grid import Ablation, Arm, Cell, cells
from mifo_lightning.lab.runner import run_all

STEPS = [0, 5, 10, 20, 40, 80, 160, 297]
Scores = dict[int, dict[str, float]]


def sft_cells(config: list[str], bases: list[Path], steps: list[int], out: Path, metric: str) -> list[Cell]:
    """One SFT run a base, as cells of a grid; the first base has seed 0, the next 1, and so on."""
    arm = Arm(["methods/sft"], {"data.schedule.sft_before": max(steps), "export.steps": steps})
    return cells(
        Ablation(
            name="sft_checkpoints",
            question="",
            primary=metric,
            reference="sft",
            primary_contrast=[],
            config=config,
            bases={base.name: base for base in bases},
            seeds=[0],
            arms={"sft": arm},
            out=out,
            set={"export.dtype": "float32"},
        )
    )


def in_order(bases: Sequence[Path]) -> list[Path]:
    """The bases by the numbers in their names: `seed2` before `seed10`.

    Raises:
        InputError: Two have the same name.
    """
    names = [base.name for base in bases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--bases: {twice[0]} is the name of two; each needs one of its own, that of what is written")
    return sorted(bases, key=lambda base: ([int(n) for n in re.findall(r"\d+", base.name)], base.name))


def measure(cell: Cell, steps: list[int], evaluate: Callable[..., dict[str, float]]) -> Scores:
    """Metrics on validation of the model after each of the steps."""
    return {step: evaluate(read_weights(cell.directory / f"model-{step}")) for step in steps}


def best(scores: Scores, metric: str) -> int:
    """The step of highest metric; the earliest of several."""
    return max(scores, key=lambda step: (scores[step][metric], -step))


def record(path: Path, base: str, step: int, scores: Scores) -> None:
    """Note what was chosen of a base, and by what, beside what the file has of others."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, before | {base: {"chosen": step, "validation": scores}})


def table(chosen: dict[str, tuple[int, Scores]], metric: str) -> str:
    """Markdown: the metric at every step of every base, and the step that was chosen."""
    steps = list(next(iter(chosen.values()))[1])
    lines = [f"| base | {' | '.join(f'step {step}' for step in steps)} | chosen |", "|---" * (len(steps) + 2) + "|"]
    for base, (step, scores) in chosen.items():
        lines.append(f"| {base} | {' | '.join(f'{scores[s][metric]:.3f}' for s in steps)} | {step} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run, measure, choose, write, print; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sft_checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", nargs="+", default=["tiny"], help="configurations of the runs")
    parser.add_argument("--bases", type=model_of, nargs="+", required=True, help="model directories")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="SFT steps after which a model is kept")
    parser.add_argument("--metric", default="avg@1", help="of the evaluation, higher is better")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--out", type=Path, required=True, help="directory of the chosen models")
    args = parser.parse_args(arguments)
    if args.jobs < 1 or min(args.steps) < 0 or max(args.steps) < 1:
        parser.error("--jobs: allowed is 1 or more; --steps: 0 or more, one of them above 0")
    quiet()
    torch.set_num_threads(1)

    def work() -> int:
        bases, steps = in_order(args.bases), sorted(set(args.steps))
        grid = sft_cells(args.config, bases, steps, args.out / "runs", args.metric)
        run_all(grid, args.jobs)
        chosen = {}
        for cell, base in zip(grid, bases, strict=True):
            scores = measure(cell, steps, make_evaluate([Path(file) for file in args.config], base, []))
            step = best(scores, args.metric)
            chosen[base.name] = step, scores
            shutil.copytree(cell.directory / f"model-{step}", args.out / base.name, dirs_exist_ok=True)
            record(args.out / "chosen.json", base.name, step, scores)
        print(f"{args.metric} on validation\n\n{table(chosen, args.metric)}")
        return 0

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
