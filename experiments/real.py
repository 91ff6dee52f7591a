"""Does the whole method run on a pretrained model and real questions, on a CPU thread? Model, rows, two fits, a table.

    make real                                     # downloads the model and the rows
    make real DATA=dir MODEL=dir                  # with words_{cold,rl,val}.parquet; a Hugging Face directory
    python -m experiments.real --out runs/real --data dir --model dir

1. The rows: word problems (`experiments.word_problems`), and of words_val a fixed sample that training never sees.
2. The model: SmolLM2-135M-Instruct (`experiments.smollm2`).
3. Cold start: SFT on questions of one operation (`configs/cold_start/smollm2.yaml`).
4. MIFO from there (`configs/smollm2.yaml`), with evaluation before and after.
5. The table, of the graded responses that both fits have written.

Each step is a command that is printed, runs in a process of its own, and is skipped when its result is there; a MIFO
run that was stopped goes on. `--out` keeps everything, costs.json among it.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.real_table import table
from experiments.word_sample import sample
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail


@dataclass
class Cost:
    """What a step took, and a try of it that was stopped too.

    Attributes:
        step: Its name.
        cpu: CPU seconds of all its processes.
        wall: Seconds by the clock.
        peak: Most memory of one of its processes, GiB.
    """

    step: str
    cpu: float
    wall: float
    peak: float


class Steps:
    """Runs the commands of a directory and keeps what they took."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "costs.json"

    def run(self, step: str, *arguments: object, **variables: str) -> None:
        """Run a module with this Python on one thread; a failure ends the program with its exit status."""
        words = [str(argument) for argument in arguments]
        given = "".join(f"{name}={value} " for name, value in variables.items())
        print(f"\n== {step}\n{given}{shlex.join(['python', '-m', *words])}", flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", *words], env={**os.environ, "OMP_NUM_THREADS": "1", **variables}
        )
        try:
            _, status, used = os.wait4(process.pid, 0)  # its own use, not that of the steps before it
        except KeyboardInterrupt:
            _, status, used = os.wait4(process.pid, 0)  # it was interrupted too, and saves its state
        process.returncode = os.waitstatus_to_exitcode(status)
        unit = 2**30 if sys.platform == "darwin" else 2**20
        cost = Cost(step, used.ru_utime + used.ru_stime, time.monotonic() - start, used.ru_maxrss / unit)
        self.out.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps([asdict(each) for each in [*self.costs(), cost]], indent=1), encoding="utf-8")
        if process.returncode:
            raise SystemExit(process.returncode if process.returncode > 0 else 128 - process.returncode)

    def costs(self) -> list[Cost]:
        """Of all steps so far."""
        return [Cost(**each) for each in json.loads(self.path.read_text())] if self.path.is_file() else []


def fit(steps: Steps, name: str, rows: Path, model: Path, *more: object) -> None:
    """A fit of `configs/smollm2.yaml` in a directory of that name, which goes on where it was stopped."""
    run = steps.out / name
    if (run / "summary.json").is_file():
        return
    resume = ["--resume"] if (run / "checkpoints" / "last.ckpt").exists() else []
    flags = ["--model.model", model, "--data.val", steps.out / "sample.parquet", "--trainer.default_root_dir", run]
    flags += ["--trainer.logger", "false", "--samples.per_evaluation", "100000"]
    command = ("mifo_lightning", "fit", "--config", "smollm2", *more, *flags, *resume)
    steps.run(name, *command, MIFO_DATA=str(rows))


def run(out: Path, data: Path | None, model: Path | None, questions: int, rl_steps: int | None) -> str:
    """All steps that are not done yet; the table."""
    steps = Steps(out)
    rows, start = data or out / "rows", model or out / "smollm2"
    if data is None and not (rows / "svamp.parquet").is_file():
        steps.run("rows", "experiments.word_problems", "--out", rows)
    if not (out / "sample.parquet").is_file():
        sample(rows, questions, out / "sample.parquet")
    if model is None and not (start / "config.json").is_file():
        steps.run("model", "experiments.smollm2", "--out", start)
    # before and after of the first 64 questions of each source will do for what learns a format
    cold = ("--config", "methods/sft", "--config", "cold_start/smollm2", "--trainer.limit_val_batches", "1")
    fit(steps, "cold", rows, start, *cold, "--trainer.enable_checkpointing", "false")
    length = () if rl_steps is None else ("--data.schedule.rl_steps", rl_steps)
    fit(steps, "mifo", rows, out / "cold" / "model", "--config", "methods/mifo", *length)
    return table(out, [vars(cost) for cost in steps.costs()])


def main() -> None:
    """Run the steps, print the table."""
    parser = argparse.ArgumentParser(description="A cold start and MIFO on a pretrained model and word problems.")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="directory of everything that is written")
    parser.add_argument("--data", type=Path, help="directory with words_{cold,rl,val}.parquet; else they are made")
    parser.add_argument("--model", type=Path, help="Hugging Face directory; without it SmolLM2-135M-Instruct is loaded")
    parser.add_argument("--questions", type=int, default=128, help="evaluated of each source before and after MIFO")
    parser.add_argument("--rl-steps", type=int, help="of MIFO; without it as configs/smollm2.yaml says")
    args = parser.parse_args()
    if args.questions < 2:
        parser.error(f"--questions: {args.questions} is not allowed; it must be at least 2")
    try:
        print(run(args.out, args.data, args.model, args.questions, args.rl_steps))
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
