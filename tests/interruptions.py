"""Short runs that are stopped at a chosen safe point and gone on with, for test_interruption.py and as a program.

python tests/interruptions.py {single|ddp|fsdp2} CASE OUT.json [HOW_MANY]    # all points, if it is not said how many
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import make_data, make_module, method_callbacks
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from monitoring import monitors, summaries
from torch.distributed.distributed_c10d import _get_default_store

from mifo_callbacks.collectives import gather_ranks, leave_group, rank, ranks
from mifo_callbacks.sharding import full
from mifo_lightning.checkpoints import interruption, safe_points
from mifo_lightning.common.errors import Interrupted
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.monitors.history import History
from mifo_lightning.monitors.summary import RunSummary
from mifo_lightning.rollout import decoder
from mifo_lightning.steps.settings import PolicyLoss

decoder.TURNS = 5  # three looks at the flag in a response of 14 tokens

CASES: dict[str, dict[str, Any]] = {
    "mifo": {"schedule": Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4, epochs_per_rollout=2)},
    "dynamic sampling": {
        "schedule": Schedule(rl_steps=2, prompts_per_step=4, sft_batch=4, minibatches=2),
        "loss": PolicyLoss(dynamic_sampling=2, kl_coefficient=0.05),
    },
    "sft around": {
        "schedule": Schedule(rl_steps=2, prompts_per_step=4, sft_batch=4, sft_before=2, sft_after=2, final_sft="drop")
    },
    "evaluations between": {
        "schedule": Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4),
        "trainer": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    },
    "evaluation after": {  # the second of three points is within a step, and an evaluation must come when it is due
        "schedule": Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4),
        "trainer": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    },
}


class Evaluations(Callback):
    """Keeps what every evaluation inside the fit has measured."""

    def __init__(self) -> None:
        self.measured: dict[str, dict[str, float]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Those before it are none of its."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name}
            assert any("mirrored" in name for name in metrics)
            self.measured[str(trainer.global_step)] = metrics

    def state_dict(self) -> dict[str, Any]:
        """A later run holds what this one has measured."""
        return {"measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The other way."""
        self.measured = dict(state["measured"])


Point = tuple[int, int]  # how many optimizer steps are done, and which safe point it is of those that follow


class Points:
    """Notes the safe points that a run passes after its first step; its first rank asks to stop at one.

    Those that follow the step from which a run goes on are not numbered as in one that has done this step itself.
    """

    def __init__(self, at: Point | None, trainer: Trainer) -> None:
        self.passed, self.at, self._pending = list[Point](), at, interruption.pending
        self._trainer = trainer

    def __call__(self) -> int | None:
        if step := self._trainer.global_step:
            same = self.passed and self.passed[-1][0] == step
            self.passed.append((step, self.passed[-1][1] + 1 if same else 1))
            if self.passed[-1] == self.at and rank() == 0:
                interruption.request(signal.SIGTERM)
        return self._pending()


def fit(
    case: str, directory: Path, strategy: str = "single", at: Point | None = None, ckpt: str | None = None
) -> tuple[dict[str, Any], Interrupted | None, list[Point]]:
    """Fit, stopped at a safe point if one is named: what it is then, what stopped it, its points after a first step."""
    changes = dict(CASES[case])
    schedule, evaluations = changes.pop("schedule"), changes.pop("trainer", {})
    several: Any = {"ddp": "ddp", "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
    kept = [*monitors(4), Evaluations(), RunSummary()]
    last = LastCheckpoint(every=10**6, dirpath=str(directory / "checkpoints"))
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if strategy == "single" else 2,
        strategy=several.get(strategy, "auto"),
        **evaluations,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*method_callbacks(size=8), *kept, last],
        default_root_dir=directory,
    )
    module = make_module(micro_batches=2, **changes)
    data = make_data(schedule=schedule, val=Skills(["addition", "mirrored"], 8, split="val"), eval_batch=4)
    stopped = None
    points = Points(at, trainer)
    interruption.forget()
    interruption.pending = points  # type: ignore[assignment]
    try:
        if ckpt is None:
            trainer.validate(module, data, verbose=False)
        trainer.fit(module, data, ckpt_path=ckpt)
    except Interrupted as stop:
        stopped = stop
    finally:
        interruption.pending = points._pending
        interruption.forget()
        if ranks() > 1 and rank() == 0:  # the next run has the same process group
            _get_default_store().delete_key(safe_points.KEY)
    return state(trainer, module, kept), stopped, points.passed


def state(trainer: Trainer, module: Any, kept: list[Callback]) -> dict[str, Any]:
    """All that a run which was never stopped must agree with."""
    names = {p: name for name, p in module.named_parameters()}
    whole = {
        "weights": {name: full(p).detach().clone() for name, p in module.named_parameters()},
        "moments": {
            f"{names[p]}/{slot}": full(value).clone()
            for optimizer in trainer.optimizers
            for p, slots in optimizer.state.items()
            for slot, value in slots.items()
        },
        "parked": module.optimizer_of_phase.state_dict() if module.optimizer_of_phase else {},
    }
    whole["records"] = json.loads(json.dumps(summaries(kept[:-2])))
    whole["evaluations"] = kept[-2].state_dict()
    whole["history"] = next(callback.lines for callback in kept if isinstance(callback, History))
    whole["summary"] = kept[-1].state_dict()
    return whole


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two states differ, by a bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {a.keys() ^ b.keys()}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a.cpu(), b.cpu()) else [where]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a} {b}"]


def spread(points: list[Point], many: int) -> list[Point]:
    """So many of them at even distances, the first and the last among them."""
    return [points[i * (len(points) - 1) // (many - 1)] for i in range(many)]


def compare(case: str, directory: Path, strategy: str, many: int | None) -> dict[str, Any]:
    """Hold an undisturbed run against one that is stopped at so many points, one after the other, or at each alone."""
    whole, stopped, passed = fit(case, directory / "whole", strategy)
    assert stopped is None
    points = gather_ranks(passed)[0]
    chains = [[point] for point in points] if many is None else [spread(points, many)]
    found: dict[str, Any] = {"points": [points[0], points[-1]], "checkpoints": 0, "unlike": {}}
    for number, chain in enumerate(chains):
        where, ckpt = directory / str(number), None
        for point in [*chain, None]:
            end, stopped, _ = fit(case, where, strategy, at=point, ckpt=ckpt)
            if point is None:
                if unlike := differences(whole, end):
                    found["unlike"][str(chain)] = unlike[:3]
            elif stopped is None or stopped.checkpoint is None or stopped.step != point[0]:
                found["unlike"][str(chain)] = [f"{point}: {stopped and (stopped.step, stopped.checkpoint)}"]
                break
            else:
                found["checkpoints"] += 1
                ckpt = stopped.checkpoint
    return found


def main() -> None:
    strategy, case, out, many = (
        sys.argv[1],
        sys.argv[2],
        Path(sys.argv[3]),
        int(sys.argv[4]) if len(sys.argv) > 4 else None,
    )
    found = compare(case, out.parent / f"{strategy} {case}", strategy, many)
    if interruption.is_first():
        out.write_text(json.dumps(found))
    leave_group()


if __name__ == "__main__":
    main()
