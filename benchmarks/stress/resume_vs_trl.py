"""Killed and resumed: does the run end as if nothing had happened? This framework and TRL 1.16, the same script.

    python -m venv trl-env && trl-env/bin/pip install torch==2.13.0 trl==1.16.0
    python -m benchmarks.stress.resume_vs_trl --trl trl-env/bin/python     # without --trl: this framework alone

GRPO on the embedded model and addition: 8 questions x 4 rollouts a step, 12 optimizer steps, a checkpoint after each,
fp32, one thread of a CPU. A run ends itself with SIGKILL; the same script goes on from the last checkpoint, with TRL by
`trainer.train(resume_from_checkpoint=True)`, which restores model, optimizer, scheduler and random states, and with
`full_determinism`. Compared with an undisturbed run: final weights, loss and gradient norm of every step, prompts and
responses.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.stress.table import finish, markdown

ROOT = Path(__file__).parents[2]
BASE = ROOT / "mifo_lightning" / "assets" / "base"
STEPS, QUESTIONS, GROUP, TOKENS, RATE = 12, 8, 4, 14, 5e-4
RECORDS = "STRESS_RECORDS"  # environment variable: the file to note prompts and responses in

# name -> (updates of each rollout: passes x minibatches, optimizer steps before the kill)
CASES = {
    "between two rollouts": (1, 1, 5),
    "between two passes over a rollout": (2, 1, 5),
    "between two minibatches of a rollout": (1, 2, 5),
    "while a checkpoint is written": (1, 1, None),
}


def grade(responses: list[str], truths: list[str], prompts: list[str]) -> list[float]:
    """1 for what ends in the truth; notes what it has seen."""
    with open(os.environ[RECORDS], "a", encoding="utf-8") as file:
        file.write(json.dumps([prompts, responses]) + "\n")
    return [float(text.endswith(truth)) for text, truth in zip(responses, truths, strict=True)]


def rows() -> list[dict[str, Any]]:
    """64 questions."""
    from mifo_lightning.data.skills import Skills

    return Skills(["addition"], 64).rows()


def die() -> None:
    """Without a last word."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_ours(place: Path, passes: int, minibatches: int, dies_at: int | None, resume: bool) -> None:
    """One process of this framework."""
    from lightning import Callback

    from mifo_lightning.cli import command_line as cli
    from mifo_lightning.common.terminal import quiet

    class Die(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == dies_at and not resume:
                die()

    settings = {
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": place,
        "trainer.profiler": "null",
        "data.train.init_args.skills": "[addition]",
        "data.train.init_args.count": 64,
        "data.val": "null",
        "data.schedule.rl_steps": STEPS // (passes * minibatches),
        "data.schedule.prompts_per_step": QUESTIONS,
        "data.schedule.epochs_per_rollout": passes,
        "data.schedule.minibatches": minibatches,
        "model.rollout.group_size": GROUP,
        "model.optimizer.rl.lr": RATE,
        "checkpoint.every": 1,
        "history": "{}",
        "reward": "mifo_lightning.rewards.function.FunctionReward",
        "reward.function": "benchmarks.stress.resume_vs_trl.grade",
    }
    quiet()
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    configs = [ROOT / "configs" / name for name in ("tiny.yaml", "methods/rl.yaml")]
    built = cli.make_cli([*(str(w) for c in configs for w in ("--config", c)), *words], run=False)
    built.trainer.callbacks.insert(0, Die())  # type: ignore[attr-defined]
    last = place / "checkpoints" / "last.ckpt"
    built.trainer.fit(built.model, built.datamodule, ckpt_path=last if resume else None)


def run_trl(place: Path, passes: int, minibatches: int, dies_at: int | None, resume: bool) -> None:
    """One process of TRL."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Die(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == dies_at and not resume:
                die()

    settings = GRPOConfig(
        output_dir=str(place / "checkpoints"),
        per_device_train_batch_size=QUESTIONS * GROUP // minibatches,
        steps_per_generation=minibatches,
        num_iterations=passes,
        num_generations=GROUP,
        max_completion_length=TOKENS,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        full_determinism=True,
        seed=0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"prompt": r["prompt"][0]["content"], "truth": r["reward_model"]["ground_truth"]} for r in rows()]
    trainer = GRPOTrainer(
        model=str(BASE),
        reward_funcs=lambda prompts, completions, truth, **_: grade(completions, truth, prompts),
        args=settings,
        train_dataset=Dataset.from_list(data),
        callbacks=[Die()],
    )
    trainer.train(resume_from_checkpoint=True if resume else None)
    trainer.save_model(str(place / "model"))
    (place / "log.json").write_text(json.dumps(trainer.state.log_history))


def losses(place: Path) -> list[tuple[Any, ...]]:
    """Loss, gradient norm and reward of every optimizer step."""
    if (place / "log.json").exists():
        log = [line for line in json.loads((place / "log.json").read_text()) if "loss" in line]
        return [tuple(line.get(key) for key in ("step", "loss", "grad_norm", "reward")) for line in log]
    lines = [json.loads(line) for line in (place / "history.jsonl").read_text().splitlines()]
    keys = ("step", "rl/policy_loss", "rl/grad_norm", "rollout/reward")
    return [tuple(line.get(key) for key in keys) for line in lines]


def results(place: Path) -> dict[str, Any]:
    """What is compared; records that were drawn twice count once."""
    lines = dict.fromkeys((place / "records").read_text(encoding="utf-8").splitlines())
    records = [json.loads(line) for line in lines]
    return {
        "final weights": hashlib.sha256((place / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "loss, gradient norm and reward of every step": losses(place),
        "order of the questions": [prompts for prompts, _ in records],
        "responses": [responses for _, responses in records],
    }


def process(python: str, library: str, place: Path, case: str, dies: bool, resume: bool) -> int:
    """Start one, end it while it writes its fifth checkpoint if that is the case; its return code."""
    dies_at = CASES[case][2]
    worker = [
        python,
        "-m",
        "benchmarks.stress.resume_vs_trl",
        "--worker",
        library,
        "--case",
        case,
        "--place",
        str(place),
    ]
    worker += ["--dies"] * dies + ["--resume"] * resume
    environment = {**os.environ, RECORDS: str(place / "records"), "OMP_NUM_THREADS": "1"}
    place.mkdir(exist_ok=True)
    with open(place / "log", "ab") as log:
        running = subprocess.Popen(worker, stdout=log, stderr=log, env=environment, cwd=ROOT)
        if dies and dies_at is None:
            wait_for_writing(place / "checkpoints", running)
            running.kill()
        return running.wait(600)


def wait_for_writing(directory: Path, running: "subprocess.Popen[bytes]", times: int = 5) -> None:
    """Until the checkpoint of this number begins to be written."""
    seen: set[Any] = set()
    while running.poll() is None:
        if directory.is_dir():
            for entry in os.scandir(directory):
                name = entry.name if entry.is_dir() else (entry.name, entry.stat().st_ino)
                seen.add(name)
        if len(seen) >= times:
            time.sleep(0.002)
            return
        time.sleep(0.0005)


def compare(python: str, library: str) -> dict[str, dict[str, str]]:
    """For each case what is equal, and what is not."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="resume-") as name:
        for case in CASES:
            whole, killed = Path(name) / "whole", Path(name) / "killed"
            for place in (whole, killed):
                shutil.rmtree(place, ignore_errors=True)
            if process(python, library, whole, case, dies=False, resume=False):
                raise SystemExit(f"{library}: {(whole / 'log').read_text()[-1500:]}")
            if process(python, library, killed, case, dies=True, resume=False) != -signal.SIGKILL:
                raise SystemExit(f"{library}: was not killed: {(killed / 'log').read_text()[-1500:]}")
            if code := process(python, library, killed, case, dies=False, resume=True):
                said = (killed / "log").read_text().strip().splitlines()[-1]
                found[case] = {"goes on": f"no: {said.replace(name, '…')[:90]} ({code})"}
                continue
            expected, made = results(whole), results(killed)
            equal = {
                name: "equal" if made[name] == value else difference(value, made[name])
                for name, value in expected.items()
            }
            found[case] = {"goes on": "yes", **equal}
    return found


def difference(expected: Any, made: Any) -> str:
    """How two lists differ."""
    if isinstance(expected, str):
        return "differ"
    pairs = list(zip(expected, made, strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return (
        f"differ from number {same + 1} on ({len(made)}, not {len(expected)})"
        if len(expected) != len(made)
        else f"differ from number {same + 1} of {len(expected)} on"
    )


def report(found: dict[str, dict[str, dict[str, str]]]) -> str:
    """The table: killed when, what is compared, each library."""
    table = []
    for case in CASES:
        compared = dict.fromkeys(what for library in found.values() for what in library[case])
        table += [[case, what, *(library[case].get(what, "") for library in found.values())] for what in compared]
    return markdown(["killed", "compared with an undisturbed run", *found], table)


def main() -> None:
    """Compare and print; or be one of the processes that are compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--out", type=Path, help="Markdown file to keep the table in")
    parser.add_argument("--worker", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dies", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        passes, minibatches, dies_at = CASES[given.case]
        run = run_ours if given.worker == "ours" else run_trl
        run(given.place, passes, minibatches, dies_at if given.dies else None, given.resume)
        return
    found = {"mifo_lightning": compare(sys.executable, "ours")}
    if given.trl:
        found["TRL 1.16"] = compare(given.trl, "trl")
    ours = found["mifo_lightning"]
    wrong = [
        f"{case}: {what}: {said}" for case in ours for what, said in ours[case].items() if said not in ("yes", "equal")
    ]
    finish("resume_vs_trl", report(found), wrong, given.out)


if __name__ == "__main__":
    main()
