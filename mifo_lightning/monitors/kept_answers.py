"""What an initial model answered, kept for other runs that begin alike: the arms of a study ask it once, not each."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Trainer

from mifo_callbacks.collectives import from_first_rank, rank
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.common.seeds import stable_key
from mifo_lightning.monitors.trained import Trained
from mifo_lightning.policy.ending import end_tokens
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.isolation import state_of
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder

Answers = list[dict[str, Any]]


def beginning(
    trainer: Trainer, module: Trained, judge: Responder, questions: list[Question], sampling: Sampling, **sizes: int
) -> dict[str, Any]:
    """All that decides what the initial model answers and what of it is right, but for the code; as JSON.

    Raises:
        InputError: Something is not known well enough to be compared: another engine than the one in the training
            process, or a reward that holds more than settings.
    """
    if type(judge.engine) is not InProcessEngine:
        raise InputError(f"{type(judge.engine).__name__} may draw otherwise another time")
    config = module.policy.model.config
    return {
        "model": [str(getattr(module, "model_name", "")), json.loads(config.to_json_string())],
        "numerics": [str(trainer.precision), module.policy.device.type],
        "seed": judge.seed.value,
        "sampling": [vars(sampling), sorted(end_tokens(module.tokenizer))],
        "judge": [settings(judge.reward), judge.success_threshold],
        "questions": [[q.source, q.id, q.text, q.prompt, q.truth, settings(q.columns)] for q in questions],
        **sizes,
    }


def settings(value: object) -> Any:
    """A setting as JSON, the same in every process; of a reward its class and what its public attributes hold.

    Raises:
        InputError: It is no plain value.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [settings(item) for item in value]
    if isinstance(value, dict):
        return {str(name): settings(item) for name, item in value.items()}
    if isinstance(value, Reward):
        state = {name: item for name, item in state_of(value).items() if not name.startswith("_")}
        return [f"{type(value).__module__}.{type(value).__qualname__}", settings(state)]
    raise InputError(f"a {type(value).__name__} is no setting that can be compared")


def kept_answers(directory: str, about: dict[str, Any], draw: Callable[[], Answers]) -> Answers:
    """What `draw` returns, or what it has returned to a run with the same `about`; collective.

    Args:
        directory: Where answers are kept, in a file for each `about`; the first rank reads and writes.
        about: All that decides what is drawn, the same on every rank; as JSON.
        draw: Draws the answers of all ranks; collective.

    Raises:
        InputError: A file cannot be read or written, on all ranks.
    """
    text = json.dumps(about, sort_keys=True)
    path = Path(directory) / f"{stable_key(text):016x}.json"
    found, problem = from_first_rank(_attempt(lambda: _read(path, text), path) if rank() == 0 else (None, None))
    if found is None and problem is None:
        found = draw()
        drawn = found
        _, problem = from_first_rank(_attempt(lambda: _write(path, text, drawn), path) if rank() == 0 else (None, None))
    if problem is not None:
        raise InputError(problem)
    assert found is not None, "nothing is found only where there is a problem"
    return found


def _attempt(work: Callable[[], Answers | None], path: Path) -> tuple[Answers | None, str | None]:
    """The result, or the line that says what went wrong: an exception on one rank would leave the others waiting."""
    try:
        return work(), None
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error!s:.120}"
        return None, f"retention.cache: {path}: {why}; remove it, or name another directory"


def _read(path: Path, about: str) -> Answers | None:
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["about"] != about:
        raise ValueError("holds the answers of another run")
    return [dict(answer) for answer in record["answers"]]


def _write(path: Path, about: str, answers: Answers) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")  # another run may write it too
    part.write_text(json.dumps({"about": about, "answers": answers}), encoding="utf-8")
    part.replace(path)
