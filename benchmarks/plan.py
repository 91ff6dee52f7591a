"""Is a plan right? Planned beside measured memory of real steps, moment by moment, each run in a process of its own.

    python -m benchmarks.plan --model DIR    # DIR: a Hugging Face directory, beside two random shapes

A run makes RL steps of 2 prompts of 75 tokens x 8 responses of exactly 32, graded by a coin, and SFT steps where its
configuration has them; `mifo plan` reads the same configuration. Measured is what the process holds at most in each
moment beyond what it held before there was a model (and after a run of almost none had loaded the libraries): on a CPU
the resident set, the kernel's peak being reset at every moment; with --accelerator gpu what CUDA's allocator gave out.
"""

import argparse
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from benchmarks import child
from benchmarks.shapes import TINY, embedded, random_model
from mifo_lightning.rewards.base import Reward

PROMPTS, TOKENS, GROUP, LENGTH, DEMONSTRATION = 2, 75, 8, 32, 48
STEPS = 4  # two phases of two: the second begins with a map
SHAPES: dict[str, dict[str, int | bool]] = {
    "random, 12 x 384, V = 8192": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "random, 4 x 768, V = 32768, own head": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32768,
        "tie_word_embeddings": False,
    },
}
MIFO = {
    "importance": {"alpha": 0.5},
    "freeze": {"fraction": 0.5},
    "entropy": {"fraction": 0.2},
    "buffer": {"size": 4, "max_accuracy": 1.0},
}
FSDP2 = {
    "devices": 2,
    "strategy": {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    },
}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "gradient checkpointing": {"model": {"loading": {"gradient_checkpointing": True}}},
    "every row with its own prompt": {"model": {"loading": {"share_prompts": False}}},
    "4 micro-batches, bf16-mixed": {
        "trainer": {"precision": "bf16-mixed"},
        "model": {"optimizer": {"micro_batches": 4}},
    },
    "old scores and a reference": {
        "model": {"loss": {"kl_coefficient": 0.1}},
        "data": {"schedule": {"epochs_per_rollout": 2}},
    },
    "MIFO": MIFO,
}


class Coin(Reward):
    """0 or -1 at random: what was cut off gets at most 0, and every response is."""

    isolate = False

    def __call__(self, responses: list[str], truths: list[str], *args: Any, **context: Any) -> list[float]:
        """A score for each response."""
        return [-float(zlib.crc32(f"{i} {text}".encode()) % 2) for i, text in enumerate(responses)]


def configuration(model: str, case: dict[str, Any], place: Path, accelerator: str, rows: int = PROMPTS * STEPS) -> Path:
    """A file that `mifo plan` and the run read alike, beside a file of `rows` questions."""
    file = place / "rows.jsonl"
    texts = [f"{i:0{TOKENS}d}" for i in range(rows)]
    answer = "1" * (DEMONSTRATION - 1)
    file.write_text("".join(json.dumps({"prompt": t, "truth": "1", "target": answer}) + "\n" for t in texts))
    base: dict[str, Any] = {
        "reward": {"class_path": "benchmarks.plan.Coin"},
        "trainer": {"accelerator": accelerator, "logger": False, "enable_progress_bar": False, "profiler": None},
        "model": {
            "model": model,
            "rollout": {"group_size": GROUP, "sampling": {"max_new_tokens": LENGTH}, "self_check": False},
        },
        "data": {
            "train": str(file),
            "columns": {"truth": "truth"},
            "prompts": {"max_tokens": TOKENS, "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"},
            "demonstrations": {"max_tokens": DEMONSTRATION, "verify": False},
            "schedule": {"rl_steps": STEPS, "prompts_per_step": PROMPTS, "sft_batch": 4, "sft_epochs": 2},
        },
        **dict.fromkeys(("seconds", "samples", "export", "checkpoint", "progress", "summary")),
    }
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(merged(base, case)))
    return path


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `over` says, group by group."""
    both = {k: merged(v, over[k]) for k, v in base.items() if isinstance(v, dict) and isinstance(over.get(k), dict)}
    return {**base, **over, **both}


class Meter:
    """The most memory since the last reset, in bytes."""

    def __init__(self, accelerator: str) -> None:
        self.cuda = accelerator == "gpu"

    def reset(self) -> None:
        """Begin anew from what is held now."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def most(self) -> int:
        """Since then."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])


def watching(meter: Meter, found: dict[str, int]) -> tuple[Any, Any]:
    """A profiler and a callback that put the peak of each moment into `found`, from the second step on."""
    import lightning
    from lightning.pytorch.profilers import Profiler

    ends = {"mifo.rollout": "generation", "mifo.score": "scoring"}
    state = {"batches": 0}

    def note(name: str) -> None:
        if state["batches"]:
            found[name] = max(found.get(name, 0), meter.most())
        meter.reset()

    class Moments(Profiler):
        def start(self, action_name: str) -> None:
            if action_name in ends:
                meter.reset()

        def stop(self, action_name: str) -> None:
            if action_name in ends:
                note(ends[action_name])

    class Steps(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.kind = "SFT" if batch["phase"] == "sft" else "RL"
            meter.reset()

        def on_before_optimizer_step(self, *_: Any) -> None:
            note(f"{self.kind} update")

        def on_train_batch_end(self, *_: Any) -> None:
            note(f"{self.kind} step")
            state["batches"] += 1

    return Moments(), Steps()


def run(path: str, accelerator: str, watched: tuple[Any, Any] | None) -> None:
    """Train as a configuration says; every response is of full length."""
    from benchmarks.endless import Endless
    from mifo_lightning.cli.command_line import make_cli

    cli: Any = make_cli(["--config", path], run=False)
    cli.trainer.callbacks.insert(0, Endless())
    if watched:
        cli.trainer.profiler = watched[0]
        cli.trainer.callbacks.insert(0, watched[1])
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)


def measure(path: str, accelerator: str) -> dict[str, int]:
    """Peak bytes of each moment in this process, beyond what a run of almost no weights leaves."""
    import gc

    import torch

    torch.set_num_threads(1)
    meter = Meter(accelerator)
    with tempfile.TemporaryDirectory() as place:
        case = yaml.safe_load(Path(path).read_text())
        small = written(Path(place) / "model", **TINY)
        small_path = Path(place) / "run.yaml"
        alone = {"devices": 1, "strategy": "auto"}
        small_path.write_text(yaml.safe_dump(merged(case, {"model": {"model": small}, "trainer": alone})))
        run(str(small_path), accelerator, None)
    gc.collect()
    meter.reset()
    before = meter.most()
    found: dict[str, int] = {}
    run(path, accelerator, watching(meter, found))
    return {name: most - before for name, most in found.items()}


def written(place: Path, **shape: Any) -> str:
    """Write a random model with the tokenizer of the embedded task; returns the directory."""
    tokenizer = embedded()
    random_model(tokenizer, shape).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def measured(path: Path, accelerator: str) -> dict[str, int]:
    """Measured in a process of its own; large tensors are mapped, so that what is freed is the system's again."""
    mapped = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    arguments = ("--measure", str(path), "--accelerator", accelerator)
    found: dict[str, int] = child.measured(str(path), "benchmarks.plan", *arguments, **mapped)
    return found


def compare(title: str, path: Path, accelerator: str, say: Callable[[str], None]) -> None:
    """Print a table of moments: planned by component, total, measured, and their ratio."""
    from mifo_lightning.cli.plan import planned
    from mifo_lightning.planning.memory import COMPONENTS

    plan = planned(["--config", str(path)])[0]
    found = measured(path, accelerator)
    columns = [c for c in COMPONENTS if any(moment.parts[c] for moment in plan.moments)]
    say(f"\n**{title}**\n\n| moment | {' | '.join(columns)} | planned | measured | planned / measured |")
    say("|---" * (len(columns) + 4) + "|")
    for moment in plan.moments:
        most = found[moment.name]
        cells = [f"{moment.parts[c] / 1e6:.0f}" for c in columns]
        say(
            f"| {moment.name} | {' | '.join(cells)} | {moment.total / 1e6:.0f} | {most / 1e6:.0f} "
            f"| {moment.total / most:.2f} |"
        )
    peak, most = plan.peak, max(found.values())
    say(f"\npeak: planned {peak.total / 1e6:.0f} MB ({peak.name}), measured {most / 1e6:.0f}: {peak.total / most:.3f}")


def main() -> None:
    """Plan and measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face directory; without it the random shapes alone")
    parser.add_argument("--case", choices=list(CASES), action="append", help="of the model; by default all")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        with redirect_stdout(sys.stderr):
            found = measure(given.measure, given.accelerator)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(json.dumps(found))
        return
    print("MB (10^6 bytes)")
    with tempfile.TemporaryDirectory() as root:
        runs = [(f"{Path(given.model).name}, {c}", given.model, CASES[c]) for c in given.case or CASES if given.model]
        if not given.case:
            shapes = {name: written(Path(root) / name, **shape) for name, shape in SHAPES.items()}
            runs += [(name, directory, MIFO) for name, directory in shapes.items()]
            for kind, trainer in {"DDP": {"devices": 2}, "FSDP2": FSDP2}.items():
                runs += [(f"{name}, {kind} x 2", shapes[name], {"trainer": trainer}) for name in list(shapes)[:1]]
        for number, (title, model, case) in enumerate(runs):
            place = Path(root) / str(number)
            place.mkdir()
            compare(title, configuration(model, case, place, given.accelerator), given.accelerator, print)


if __name__ == "__main__":
    main()
