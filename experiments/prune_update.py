"""How much of a fine-tuning update is needed? Evaluates it with a growing share set to zero (MIFO, section 3.1).

    python -m mifo_lightning fit --config tiny --config methods/rl \\
        --trainer.logger false --trainer.default_root_dir runs/rl
    python -m mifo_lightning fit --config tiny --config methods/sft \\
        --trainer.logger false --trainer.default_root_dir runs/sft
    python -m experiments.prune_update --config tiny --base mifo_lightning/assets/base \\
        --tuned rl=runs/rl/model sft=runs/sft/model --by magnitude --out runs/prune

The weights are base + pruned (tuned - base): of all coordinates of the update the smallest, or random ones, are zero.
Share 0 is the tuned model, share 1 the base. Every evaluation is that of `validate` on `data.val` and draws with the
same randomness. Further arguments, e.g. `--data.val.init_args.count 512`, change the configuration.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from mifo_callbacks import top_mask
from mifo_callbacks.thresholds import floor_share, random_scores
from mifo_lightning.cli.command_line import MifoCLI, make_cli
from mifo_lightning.cli.parser import OneLineParser
from mifo_lightning.cli.parts import METHOD, MONITORS
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail, quiet
from mifo_lightning.policy.loading import load_policy

Weights = dict[str, Tensor]
By = Literal["magnitude", "random"]
SHARES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


class Point(NamedTuple):
    """One evaluation: `norm_kept` is the L2 norm of the pruned update over that of the whole one."""

    label: str
    share: float
    norm_kept: float
    metrics: dict[str, float]


def prune(base: Weights, tuned: Weights, share: float, by: By = "magnitude", seed: int = 0) -> tuple[Weights, float]:
    """The tuned weights with exactly floor(share * n) of all n coordinates back at the base, and the norm that is kept.

    Args:
        base: fp32 weights by name.
        tuned: The same after training.
        share: Share of the coordinates whose update is set to zero, in [0, 1].
        by: Those that moved least, over all tensors together ("magnitude"; ties by position), or "random" ones.
        seed: Seed of "random"; a larger share contains a smaller one of the same seed.

    Returns:
        The weights, and the L2 norm of what is left of the update, as a share of its norm before; 1 if that was 0.

    Raises:
        InputError: The two differ in names or shapes.
    """
    if {name: w.shape for name, w in base.items()} != {name: w.shape for name, w in tuned.items()}:
        raise InputError("--tuned: its weights have other names or shapes than those of --base")
    updates = [(tuned[name] - base[name]).abs() for name in base]
    scores = updates if by == "magnitude" else [random_scores(u.shape, seed, i) for i, u in enumerate(updates)]
    masks = top_mask(scores, floor_share(share, sum(u.numel() for u in updates)), order="smallest")
    kept = sum(float(u[~mask].double().square().sum()) for u, mask in zip(updates, masks, strict=True))
    whole = sum(float(u.double().square().sum()) for u in updates)
    pruned = {name: torch.where(mask, base[name], tuned[name]) for name, mask in zip(base, masks, strict=True)}
    return pruned, (kept / whole) ** 0.5 if whole else 1.0


def read_weights(directory: Path) -> Weights:
    """fp32 weights of a Hugging Face directory by name; tied ones appear once."""
    return {name: p.detach().clone() for name, p in load_policy(str(directory)).model.named_parameters()}


def make_run(configs: Sequence[Path | str], base: Path, changes: list[str]) -> MifoCLI:
    """Model, data and trainer of an evaluation of `base` on `data.val` by these configurations; it writes nothing."""
    arguments = [text for config in configs for text in ("--config", str(config))]
    arguments += ["--model.model", str(base), "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.enable_checkpointing", "false"]
    arguments += [text for group in (*METHOD, *MONITORS) for text in (f"--{group}", "null")]
    OneLineParser.arguments = changes
    cli = make_cli([*arguments, *changes], run=False)
    cli.model.policy = load_policy(str(base), trust_remote_code=cli.model.loading.trust_remote_code)
    return cli


def evaluate(run: MifoCLI, weights: Weights) -> dict[str, float]:
    """The metrics of `validate`, by name, with given weights in the model of a run."""
    with torch.no_grad():
        for name, p in run.model.policy.model.named_parameters():
            p.copy_(weights[name])
    (metrics,) = run.trainer.validate(run.model, run.datamodule, verbose=False)[:1]
    return {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}


def make_evaluate(
    configs: Sequence[Path | str], base: Path, changes: list[str]
) -> Callable[[Weights], dict[str, float]]:
    """A function that measures the metrics of `validate`, by name, with given weights in the model of `base`."""
    return partial(evaluate, make_run(configs, base, changes))


def accuracies(points: list[Point]) -> list[str]:
    """Names of the accuracies among the metrics, those over all questions last."""
    names = [name for name in points[0].metrics if "avg@" in name or name.endswith("greedy")]
    return sorted(names, key=lambda name: "/" not in name)


def table(points: list[Point]) -> str:
    """Markdown: one row per update and share."""
    columns = accuracies(points)
    head = ["update", "share set to zero", "norm kept", *columns]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label, share, norm_kept, metrics in points:
        cells = [f"{share:g}", f"{norm_kept:.3f}", *(f"{metrics[name]:.3f}" for name in columns)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(points: list[Point], by: str, out: Path) -> None:
    """One panel per accuracy over the share set to zero, one line per update."""
    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    names = accuracies(points)
    figure, panels = plt.subplots(1, len(names), figsize=(2.4 * len(names) + 1, 2.6), sharey=True, squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        for label in dict.fromkeys(point.label for point in points):
            line = sorted((p.share, p.metrics[name]) for p in points if p.label == label)
            axes.plot(*zip(*line, strict=True), marker="o", ms=3, lw=1.5, label=label)
        axes.set_title(name, fontsize=9)
        axes.set_ylim(-0.02, 1.02)
    panels[0][0].set_ylabel("accuracy")
    figure.supxlabel(f"share of the update set to zero, by {by}", fontsize=9)
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(out, facecolor="white", metadata={"Date": None}, bbox_inches="tight")


def share_of(text: str) -> float:
    """A share given on the command line."""
    value = float(text) if text.replace(".", "", 1).isdigit() else -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a number between 0 and 1")
    return value


def model_of(text: str) -> Path:
    """A model directory given on the command line."""
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no model directory; a run writes one as `model`")
    return Path(text)


def tuned_of(text: str) -> tuple[str, Path]:
    """LABEL=DIRECTORY, or a directory that is its own label."""
    label, _, directory = text.rpartition("=")
    return label or directory, model_of(directory)


def measure(args: argparse.Namespace, changes: list[str]) -> list[Point]:
    """Evaluate every update at every share."""
    measured = make_evaluate(args.config, args.base, changes)
    base = read_weights(args.base)
    points = []
    for label, directory in args.tuned:
        tuned = read_weights(directory)
        for share in args.shares:
            weights, norm_kept = prune(base, tuned, share, args.by, args.seed)
            points.append(Point(label, share, norm_kept, measured(weights)))
    return points


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write it as JSON and as a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="configurations of the evaluation")
    parser.add_argument("--base", type=model_of, required=True, help="model directory before training")
    parser.add_argument("--tuned", type=tuned_of, nargs="+", required=True, help="LABEL=DIRECTORY after training")
    parser.add_argument("--shares", type=share_of, nargs="+", default=SHARES, help="shares to set to zero")
    parser.add_argument("--by", choices=get_args(By), default="magnitude", help="which coordinates go first")
    parser.add_argument("--seed", type=int, default=0, help="seed of --by random")
    parser.add_argument("--out", type=Path, default=Path("runs/prune"), help="directory of prune.json and prune.svg")
    args, changes = parser.parse_known_args(arguments)
    quiet()
    try:
        points = measure(args, changes)
    except (InputError, MisconfigurationException) as error:
        fail(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"by": args.by, "seed": args.seed, "points": [point._asdict() for point in points]}
    (args.out / "prune.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(points, args.by, args.out / "prune.svg")
    print(table(points))
    print(f"\nwrote {args.out / 'prune.json'} and {args.out / 'prune.svg'}")


if __name__ == "__main__":
    main()
