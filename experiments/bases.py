"""The twelve bases that all studies of a task share, as they are: training gives other weights on another CPU.

    python -m experiments.bases skills --out runs/bases             # writes runs/bases/seed0, runs/bases/seed1, ...
    python -m experiments.bases points --out runs/points_bases
    python -m experiments.bases rewriting --out runs/rewriting_bases
    python -m experiments.bases skills --pack runs/made --seeds 0 1 2       # keeps these of runs/made in their place

A file of `experiments/assets/` holds them in float16, to which `--pack` rounds what `make_base` has made; it prints the
accuracies of the rounded weights, which are those of every study.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2ForCausalLM

from experiments import make_base, make_points_base, make_rewriting_base
from experiments.base_training import build_model, build_tokenizer
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail, quiet
from mifo_lightning.data.general_points import RULES
from mifo_lightning.data.rewriting import SYSTEMS
from mifo_lightning.data.skills import SIZES

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Task:
    """A task with bases of its own: its vocabulary, and named accuracies of a model at temperature 1."""

    vocabulary: list[str]
    measures: dict[str, Callable[[Qwen2ForCausalLM], float]]


def _accuracy(skill: str) -> Callable[[Qwen2ForCausalLM], float]:
    return lambda model: make_base.accuracy(model, skill, questions=2048)


def _points(rule: str) -> Callable[[Qwen2ForCausalLM], float]:
    graded, samples = make_points_base.grades, make_points_base.SAMPLES
    return lambda model: float((graded(model, rule, 1024, samples) == 1).float().mean())


def _rewriting(system: str) -> Callable[[Qwen2ForCausalLM], float]:
    return lambda model: make_rewriting_base.accuracy(model, system, 1024)


TASKS = {
    "skills": Task(make_base.VOCABULARY, {skill: _accuracy(skill) for skill in SIZES}),
    "points": Task(make_points_base.VOCABULARY, {rule: _points(rule) for rule in RULES}),
    "rewriting": Task(make_rewriting_base.VOCABULARY, {system: _rewriting(system) for system in SYSTEMS}),
}


def pack(models: dict[str, Qwen2ForCausalLM], vocabulary: list[str], file: Path) -> None:
    """Write the weights of named models as float16 into one file, `<name>/<weight>` each: whole, or not at all.

    Raises:
        InputError: A model is not of the shape that `build_model` gives with this vocabulary.
    """
    shapes = {key: w.shape for key, w in build_model(vocabulary).state_dict().items()}
    for name, model in models.items():
        if {key: w.shape for key, w in model.state_dict().items()} != shapes:
            raise InputError(f"--pack: {name} is no base of this task: its weights have other names or shapes")
    weights = {f"{name}/{key}": w.half() for name, model in models.items() for key, w in model.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    save_file(weights, part)
    part.replace(file)


def unpack(file: Path, vocabulary: list[str]) -> dict[str, Qwen2ForCausalLM]:
    """The models of a file that `pack` wrote, by name in the order of their numbers; float32.

    Raises:
        InputError: There is no such file.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing: these bases have not been kept yet; `--pack` does")
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        name, _, weight = key.partition("/")
        weights.setdefault(name, {})[weight] = tensor.float()
    models = {}
    for name in sorted(weights, key=lambda name: (len(name), name)):
        models[name] = build_model(vocabulary)
        models[name].load_state_dict(weights[name])
    return models


def write(models: dict[str, Qwen2ForCausalLM], vocabulary: list[str], out: Path) -> None:
    """Write each model with its tokenizer as a Hugging Face directory `out/<name>`."""
    for name, model in models.items():
        model.save_pretrained(out / name)
        build_tokenizer(vocabulary).save_pretrained(out / name)


def table(models: dict[str, Qwen2ForCausalLM], task: Task) -> str:
    """Markdown: accuracies of each model on test questions."""
    lines = ["| base | " + " | ".join(task.measures) + " |", "|---" * (len(task.measures) + 1) + "|"]
    for name, model in models.items():
        lines.append(f"| {name} | " + " | ".join(f"{measure(model):.4f}" for measure in task.measures.values()) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Write the kept bases, or keep others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, help="write the kept bases into this directory")
    parser.add_argument("--pack", type=Path, help="keep bases of this directory, as make_base wrote them")
    parser.add_argument("--seeds", type=int, nargs="+", help="which of those of --pack; the first twelve by default")
    args = parser.parse_args(arguments)
    if (args.out is None) == (args.pack is None):
        parser.error("--out or --pack: one of the two is needed")
    if args.seeds and not args.pack:
        parser.error("--seeds: goes with --pack; --out writes all that are kept")
    quiet()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    task, file = TASKS[args.task], ASSETS / f"{args.task}_bases.safetensors"
    try:
        if args.pack:
            names = [f"seed{seed}" for seed in args.seeds or range(12)]
            if missing := [name for name in names if not (args.pack / name / "config.json").is_file()]:
                raise InputError(f"--pack {args.pack}: has no {missing[0]}")
            pack({name: Qwen2ForCausalLM.from_pretrained(args.pack / name) for name in names}, task.vocabulary, file)
            print(table(unpack(file, task.vocabulary), task))
        else:
            write(unpack(file, task.vocabulary), task.vocabulary, args.out)
            print(f"wrote {args.out}")
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
