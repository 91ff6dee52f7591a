"""What does a run look like? Draws reward, skills and buffer over RL steps, with the SFT phases marked.

    python -m mifo_lightning fit --config tiny --config methods/mifo --config logger/csv \\
        --trainer.val_check_interval 15 --trainer.check_val_every_n_epoch null
    python -m experiments.plot_run runs/csv/version_0/metrics.csv --out docs/run.svg
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

Curve = list[tuple[float, float]]


def read_curves(path: Path) -> tuple[dict[str, Curve], list[float]]:
    """Every metric as (RL step, value) points, and the RL steps after which SFT phases came."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rl_step_of: dict[int, float] = {}
    is_sft: dict[int, bool] = {}
    for row in rows:
        if row.get("phase/is_sft"):
            is_sft[int(row["step"])] = float(row["phase/is_sft"]) > 0
        if row.get("phase/rl_step"):
            rl_step_of[int(row["step"])] = float(row["phase/rl_step"])
    done, phases, inside = 0.0, [], False
    for step in sorted(is_sft):
        done = rl_step_of.get(step, done)
        if is_sft[step] and not inside:
            phases.append(done)
        inside = is_sft[step]
        rl_step_of[step] = done
    curves: dict[str, Curve] = defaultdict(list)
    last = 0.0
    for row in rows:
        last = rl_step_of.get(int(row["step"]), last)
        for name, value in row.items():
            if value and "/" in name:
                curves[name].append((last, float(value)))
    return curves, phases


def draw(curves: dict[str, Curve], phases: list[float], out: Path) -> None:
    """Two panels over RL steps: accuracy by skill with the share of correct rollouts, and the buffer."""
    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, height_ratios=[3, 1])
    top.plot(*zip(*curves["rollout/correct"], strict=True), color="0.7", lw=1, label="correct rollouts")
    for name in sorted(n for n in curves if n.startswith("val/") and n.count("/") == 2 and "/avg@" in n):
        top.plot(*zip(*curves[name], strict=True), marker="o", ms=3, lw=1.5, label=name.split("/")[1])
    bottom.plot(*zip(*curves["buffer/size"], strict=True), color="0.3", lw=1, drawstyle="steps-post")
    for axes in (top, bottom):
        for i, step in enumerate(phases):
            axes.axvline(step, color="tab:orange", alpha=0.5, lw=2, label="SFT phase" if i == 0 else None)
    top.set_ylabel("accuracy, T = 1")
    top.set_ylim(-0.02, 1.02)
    bottom.set_ylabel("buffer")
    bottom.set_xlabel("RL step")
    top.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor="white", metadata={"Date": None})


def main() -> None:
    """Read the CSV, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="metrics.csv of a run")
    parser.add_argument("--out", type=Path, required=True, help="picture to write (.svg or .png)")
    args = parser.parse_args()
    if not args.metrics.is_file():
        parser.error(f"{args.metrics} is not a file; give the metrics.csv that a run with the CSV logger wrote")
    draw(*read_curves(args.metrics), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
