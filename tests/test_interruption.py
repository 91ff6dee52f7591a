"""Signals: one line, status 128 + n, a checkpoint of the last step, and the same bits after going on from any point."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from interruptions import CASES, compare
from small_grid import GRID, ROOT, write

from mifo_lightning.checkpoints import interruption
from mifo_lightning.cli import main
from mifo_lightning.common.errors import Interrupted
from mifo_lightning.lab.cell import outcome, prepare
from mifo_lightning.lab.grid import cells
from mifo_lightning.lab.reading import read_ablation
from mifo_lightning.monitors.export import ExportModel

SMALL = [
    *(
        "--config",
        "tiny",
        "--config",
        "methods/mifo",
        "--model.rollout.self_check",
        "false",
        "--progress.lines",
        "100000",
    ),
    *("--data.train.init_args.count", "64", "--data.schedule.prompts_per_step", "8", "--data.schedule.sft_batch", "8"),
    *("--data.val.init_args.count", "16", "--buffer_size", "8", "--buffer.max_accuracy", "0.75"),
]
ENDLESS = ["--data.schedule.rl_steps", "100000"]


class Program:
    """A run as a process of its own, whose output is looked at while it comes.

    Args:
        directory: Where it writes.
        arguments: Further ones of the command line.
        cold: Whether it is the program as a shell starts it, which imports everything for itself.
    """

    def __init__(self, directory: Path, *arguments: str, cold: bool = False) -> None:
        words = ["-m", "mifo_lightning", *arguments, "--trainer.default_root_dir", str(directory)]
        environment = {"PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
        self.output = directory / "printed.txt"
        self.process: warm.Program | subprocess.Popen[bytes]
        if not cold:
            self.process = warm.Program(words, self.output, ROOT, environment)
            return
        with open(self.output, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heard,
            )

    @property
    def lines(self) -> list[str]:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8").splitlines() if self.output.exists() else []

    def until(self, pattern: str) -> None:
        """Wait until a line matches."""
        while not any(re.search(pattern, line) for line in self.lines):
            assert self.process.poll() is None, f"{pattern} never came: {self.lines[-30:]}"
            time.sleep(0.02)

    def end(self) -> tuple[int, str, float]:
        """Wait for the end; exit status, the last line, and how long it took."""
        began = time.monotonic()
        status = self.process.wait(120)
        assert not any("Traceback" in line for line in self.lines), self.lines
        said = [line for line in self.lines if line.startswith("interrupted by ")]
        assert len(said) <= 1, said
        return status, said[0].strip() if said else "", time.monotonic() - began


def heard() -> None:
    """Let a new process have the signals that whoever runs these tests ignores, as a shell's background does."""
    for signum in interruption.SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts programs, and leaves none behind."""
    programs: list[Program] = []

    def begin(*arguments: str, **named: Any) -> Program:
        programs.append(Program(tmp_path, *arguments, **named))
        return programs[-1]

    yield begin
    for program in programs:
        if program.process.poll() is None:
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.wait()


CSV = ["--config", "configs/logger/csv.yaml", "--trainer.logger.init_args.save_dir"]


def fit(start: Callable[..., Program], tmp_path: Path, *arguments: str, **named: Any) -> Program:
    return start("fit", *SMALL, *CSV, str(tmp_path), *arguments, **named)


WANDB = "--trainer.logger.save_dir"


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "hit"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)], ids=["one", "all"])
def test_a_signal_in_training_leaves_a_checkpoint_and_says_how_to_go_on(
    start: Callable[..., Program], tmp_path: Path, signum: signal.Signals, hit: Callable[[int, int], None]
) -> None:
    """Control-C reaches the whole group, W&B's child too: it does not die before."""
    logger = CSV if hit is os.kill else [WANDB]
    program = start("fit", *SMALL, *logger, str(tmp_path), *ENDLESS)
    program.until(r"RL step 3")
    hit(program.process.pid, signum)
    status, line, seconds = program.end()
    assert (status, seconds < 20) == (128 + signum, True)
    found = re.fullmatch(
        rf"interrupted by {signum.name} after optimizer step (\d+), kept in (\S+); go on with: (.*)", line
    )
    assert found, line
    step, path, command = found.groups()
    assert torch.load(path, weights_only=True)["global_step"] == int(step) >= 3
    assert command.startswith("python -m mifo_lightning fit --config tiny --config methods/mifo ")
    assert command.endswith(f"--ckpt_path {path}")
    assert not list(tmp_path.rglob("model.safetensors"))
    assert not list(tmp_path.rglob("summary.json"))
    assert bool(list(tmp_path.rglob("*.wandb"))) == (WANDB in logger)


@pytest.mark.parametrize("signum", interruption.SIGNALS)
def test_every_signal_is_taken_alike(signum: signal.Signals) -> None:
    """What is deferred, as in training, waits for the point where it is asked for."""
    program = (
        "import os\nfrom mifo_lightning.checkpoints import interruption\nfrom mifo_lightning.common.errors import "
        "Interrupted\ninterruption.install()\nwith interruption.handled(['fit']):\n    interruption.defer()\n"
        f"    os.kill(os.getpid(), {signum:d})\n    print('goes on', flush=True)\n"
        "    raise Interrupted(interruption.pending(), together=True)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, preexec_fn=heard, check=False
    )
    assert (ended.returncode, ended.stdout) == (128 + signum, "goes on\n"), ended.stderr
    assert ended.stderr.startswith(f"interrupted by {signum.name}")


def test_a_signal_while_the_program_is_imported_is_one_line(start: Callable[..., Program], tmp_path: Path) -> None:
    program = fit(start, tmp_path, *ENDLESS, cold=True)
    while "torch" not in Path(f"/proc/{program.process.pid}/maps").read_text():
        assert program.process.poll() is None, program.end()
        time.sleep(0.02)
    program.process.send_signal(signal.SIGTERM)
    status, line, seconds = program.end()
    assert (status, seconds < 10) == (143, True)
    assert line.startswith(
        "interrupted by SIGTERM: nothing was trained; begin again with: python -m mifo_lightning fit "
    )
    assert len(program.lines) == 1


def test_a_signal_in_the_first_evaluation_ends_it(start: Callable[..., Program], tmp_path: Path) -> None:
    long = ["--data.val.init_args.count", "2048", "--data.eval_batch", "64", "--progress.seconds", "0.01"]
    program = fit(start, tmp_path, *ENDLESS, *long)
    program.until(r"evaluation: batch 2 ")
    program.process.send_signal(signal.SIGTERM)
    status, line, seconds = program.end()
    assert (status, seconds < 20) == (143, True)
    assert "nothing was trained" in line
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "to"), [("ddp", "group"), ("fsdp2", "second")])
def test_two_ranks_stop_together(start: Callable[..., Program], tmp_path: Path, strategy: str, to: str) -> None:
    chosen = {
        "ddp": ["--trainer.strategy", "ddp"],
        "fsdp2": [
            *("--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"),
            *("--trainer.strategy.init_args.data_parallel_size", "2"),
            *("--trainer.strategy.init_args.tensor_parallel_size", "1"),
        ],
    }[strategy]
    program = fit(start, tmp_path, *ENDLESS, "--trainer.devices", "2", *chosen)  # the second one is cold
    program.until(r"RL step 3")
    pid = program.process.pid
    if to == "group":
        os.killpg(pid, signal.SIGTERM)
    else:
        os.kill(second_rank(pid), signal.SIGTERM)
    status, line, seconds = program.end()
    assert (status, seconds < 60) == (143, True)
    assert "after optimizer step" in line
    assert left(pid) == {}


def left(group: int) -> dict[str, str]:
    """What still runs of a process group after a while: an interpreter's own helpers outlive it by a moment."""
    running: dict[str, str] = {}
    for _ in range(100):
        running = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                state, _, of = (process / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(of) == group and state != "Z":  # who has ended may wait long for its new parent
                    running[process.name] = (process / "cmdline").read_text()
        if not running:
            break
        time.sleep(0.1)
    return running


def second_rank(first: int) -> int:
    """The process of the other rank."""
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return next(int(c) for c in children if b"LOCAL_RANK=1" in Path(f"/proc/{c}/environ").read_bytes())


def test_what_is_stopped_after_the_last_step_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ["--trainer.logger", "false", "--trainer.max_steps", "2", "--history", "History"]

    def run(name: str, *more: str) -> dict[str, Any]:
        place = tmp_path / name
        main(
            ["fit", *SMALL, *quick, "--data.val.init_args.count", "4", "--trainer.default_root_dir", str(place), *more]
        )
        metrics = json.loads((place / "summary.json").read_text())["after"]
        return {name: (place / name).read_bytes() for name in ("history.jsonl", "model/model.safetensors")} | metrics

    whole = run("whole")
    stopped = Interrupted(signal.SIGTERM, together=True)

    def stop(*_: Any) -> None:
        found = {signal.getsignal(signum) for signum in interruption.SIGNALS}
        assert found - {signal.SIG_IGN} == {interruption._arrived}  # whoever runs these tests may ignore some
        raise stopped

    with monkeypatch.context() as patch:
        patch.setattr(ExportModel, "on_train_end", stop)
        with pytest.raises(SystemExit) as ended:
            run("cut")
    assert ended.value.code == 143
    assert stopped.step > 0
    assert stopped.checkpoint
    assert not (tmp_path / "cut" / "model").exists()
    assert run("cut", "--ckpt_path", stopped.checkpoint) == whole


# --- the lab --------------------------------------------------------------------------------------------------------


def test_a_signal_to_the_runner_cuts_its_fits_off_and_the_next_call_goes_on(tmp_path: Path) -> None:
    ablation = write(tmp_path, seeds=[0], set={**GRID["set"], "data.schedule.rl_steps": 100000})
    words = ["-m", "mifo_lightning.lab", "ablation", "--config", str(ablation)]
    runner = warm.Program(words, tmp_path / "printed.txt", ROOT)
    grid = cells(read_ablation(ablation))
    try:
        for cell in grid:
            while not (cell.directory / "checkpoints" / "last.ckpt").exists():
                assert runner.poll() is None
                time.sleep(0.1)
        runner.send_signal(signal.SIGTERM)
        status = runner.wait(60)
    finally:
        if runner.poll() is None:
            os.killpg(runner.pid, signal.SIGKILL)
    said = [line for line in runner.said().splitlines() if not line.startswith(("cut off ", "warning: set."))]
    assert (status, said) == (143, ["interrupted by SIGTERM; the same command goes on"])
    for cell in grid:
        ended = outcome(cell.directory)
        assert ended.status == "cut off"
        assert str(ended.error).startswith("interrupted by SIGTERM after optimizer step ")
        path = cell.directory / "checkpoints" / "last.ckpt"
        step = re.search(r"optimizer step (\d+)", str(ended.error))
        assert step
        assert torch.load(path, weights_only=True)["global_step"] == int(step[1])
        assert prepare(cell.directory) == ["--ckpt_path", str(path)]


# --- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path: Path, case: str) -> None:
    found = compare(case, tmp_path, "single", 3)  # where there are evaluations, the second is within one
    assert found["unlike"] == {}
    assert found["checkpoints"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_stopped_anywhere_end_with_the_same_bits(tmp_path: Path, strategy: str) -> None:
    out, many = tmp_path / "found.json", 3
    program = Path(__file__).with_name("interruptions.py")
    warm.run(program, strategy, "mifo", out, many, output=tmp_path / "printed.txt", ranks=2)
    found = json.loads(out.read_text())
    assert found["unlike"] == {}
    assert found["checkpoints"] == many
