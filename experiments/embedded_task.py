"""What do RL, interleaving and MIFO do to the four skills, and would a simpler control have done the same?

    python -m experiments.make_base --seeds 0 1 2 --jobs 2 --out runs/bases
    python -m experiments.embedded_task --bases runs/bases/seed0 runs/bases/seed1 runs/bases/seed2 --jobs 2

Every arm runs from every base with every seed for the same number of RL steps; accuracy is measured at T = 1 on 2048
test questions per skill, the same for all. A run that has ended is not repeated. Nothing is chosen after seeing the
results: the arms, seeds and settings are those of this file and of configs/tiny.yaml.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

SKILLS = ("addition", "mirrored", "sorting", "reversal")
ARMS: dict[str, list[str]] = {
    "rl": ["--config", "configs/methods/rl.yaml"],
    "interleave": ["--config", "configs/methods/interleave.yaml"],
    "mifo": ["--config", "configs/methods/mifo.yaml"],
    # controls: the same token selection with a random half frozen, and interleaving at half the SFT learning rate
    "mifo, random freeze": ["--config", "configs/methods/mifo.yaml", "--freeze.selector", "random"],
    "interleave, half lr": ["--config", "configs/methods/interleave.yaml", "--model.sft.lr", "5e-4"],
}
Result = dict[str, float]


def run(arm: str, base: Path, seed: int, rl_steps: int, root: Path) -> dict[str, Result]:
    """One fit in a process of its own; its metrics before and after, and its SFT phases."""
    directory = root / f"{arm.replace(', ', '-').replace(' ', '_')}--{base.name}--{seed}--{rl_steps}"
    summary = directory / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "-m", "mifo_lightning", "fit", "--config", "configs/tiny.yaml", *ARMS[arm]]
        changes = {
            "seed_everything": seed,
            "model.model": base,
            "data.schedule.rl_steps": rl_steps,
            "data.val.init_args.split": "test",
            "data.val.init_args.count": 2048 * len(SKILLS),
            "trainer.default_root_dir": directory,
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "checkpoint": "null",
            "updates": "null",
            "export": "null",
            "samples": "null",
        }
        command += [text for key, value in changes.items() for text in (f"--{key}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode:
            raise SystemExit(f"{arm}, {base}, seed {seed} failed:\n{ended.stderr[-2000:]}")
    record = json.loads(summary.read_text(encoding="utf-8"))
    return {
        "before": {skill: record["before"][f"{skill}/avg@1"] for skill in SKILLS},
        "after": {
            **{skill: record["after"][f"{skill}/avg@1"] for skill in SKILLS},
            "SFT phases": record["sft_phases"],
        },
    }


def table(results: dict[tuple[str, str, int], dict[str, Result]], bases: list[str]) -> str:
    """Markdown: the bases, then every run, then mean and standard deviation by arm."""
    columns = [*SKILLS, "SFT phases"]
    lines = ["| arm | base | seed | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for base in bases:
        before = next(r["before"] for (_, b, _), r in results.items() if b == base)
        lines.append(f"| *base model* | {base} | | " + " | ".join(f"{before[s]:.3f}" for s in SKILLS) + " | |")
    for (arm, base, seed), result in results.items():
        after = result["after"]
        cells = [f"{after[s]:.3f}" for s in SKILLS] + [f"{after['SFT phases']:.0f}"]
        lines.append(f"| {arm} | {base} | {seed} | " + " | ".join(cells) + " |")
    for arm in dict.fromkeys(arm for arm, _, _ in results):
        rows = [r["after"] for (a, _, _), r in results.items() if a == arm]
        spread = [stdev([row[c] for row in rows]) if len(rows) > 1 else 0.0 for c in columns]
        cells = [f"{mean(row[c] for row in rows):.3f} ± {s:.3f}" for c, s in zip(columns, spread, strict=True)]
        lines.append(f"| **{arm}** | all {len(rows)} | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what has not been run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path, nargs="+", required=True, help="base models, e.g. of make_base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of every arm on every base")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="which arms")
    parser.add_argument("--rl-steps", type=int, default=120, help="RL steps of every run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--root", type=Path, default=Path("runs/embedded_task"), help="where runs are kept")
    args = parser.parse_args()
    for base in args.bases:
        if not (base / "config.json").is_file():
            parser.error(f"--bases {base} is no model directory; make one with `python -m experiments.make_base`")
    grid = [(arm, base, seed) for arm in args.arms for base in args.bases for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        ended = list(pool.map(lambda x: run(x[0], x[1], x[2], args.rl_steps, args.root), grid))
    results = {(arm, base.name, seed): result for (arm, base, seed), result in zip(grid, ended, strict=True)}
    print(table(results, [base.name for base in args.bases]))


if __name__ == "__main__":
    main()
