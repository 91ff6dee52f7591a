"""What was found of an initial model, kept for other runs that begin alike: the arms of a study ask it once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from mifo_callbacks.collectives import from_first_rank, rank
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.files import replace_text
from mifo_lightning.common.question import Question
from mifo_lightning.common.seeds import stable_key
from mifo_lightning.monitors.trained import Trained
from mifo_lightning.policy.ending import end_tokens
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.isolation import state_of
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder


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
    """A setting as JSON, the same in every process; of a reward its class and its attributes, of ours the public ones.

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
        ours = type(value).__module__.startswith("mifo_lightning.")  # whose private ones are workers and caches
        state = {name: item for name, item in state_of(value).items() if not (ours and name.startswith("_"))}
        return [f"{type(value).__module__}.{type(value).__qualname__}", settings(state)]
    raise InputError(f"a {type(value).__name__} is no setting that can be compared")


def kept(directory: str, about: dict[str, Any], find: Callable[[], list[Any]], anew: bool = False) -> list[Any]:
    """What `find` returns, or what it has returned to a run with the same `about`; collective.

    What cannot be kept is used all the same, with a line that says why.

    Args:
        directory: Where it is kept, in a file for each `about`; the first rank reads and writes.
        about: All that decides what is found, the same on every rank; as JSON.
        find: Finds a list, the same on every rank, that JSON can hold; collective.
        anew: Whether what cannot be read is found anew and replaced, with a line.

    Raises:
        InputError: A file cannot be read, on all ranks, and is not to be replaced.
    """
    text = json.dumps(about, sort_keys=True)
    path = Path(directory) / f"{stable_key(text):016x}.json"
    found = from_first_rank(_read(path, text) if rank() == 0 else None)
    if isinstance(found, str):
        if not anew:
            raise InputError(found)
        rank_zero_warn(f"{found}; found anew")
    elif found is not None:
        return found
    found = find()
    if rank() == 0:
        try:
            replace_text(path, json.dumps({"about": text, "found": found}))
        except OSError as error:
            rank_zero_warn(f"retention.cache: {path}: {error.strerror}; what was found is used and not kept")
    return found


def _read(path: Path, about: str) -> list[Any] | str | None:
    """What is kept, or the line that says what is wrong: an exception on one rank would leave the others waiting."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["about"] != about:
            raise ValueError("holds what another run found")
        if not isinstance(record["found"], list):
            raise ValueError("holds no list")
        return list(record["found"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"retention.cache: {path}: {type(error).__name__}: {error!s:.120}; remove it, or name another directory"
