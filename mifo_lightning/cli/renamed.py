"""Keys that had other names in an earlier version: one line says the new one, and a saved configuration is translated.

mifo translate config.yaml > translated.yaml
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail
from mifo_lightning.steps.optimizer import AdamWSettings

COMMAND = "mifo translate FILE"
# old key -> new key, with all that lies under it; 0.4
RENAMED = {
    "trainer.accumulate_grad_batches": "model.optimizer.micro_batches",
    "model.policy": "model.loss",
    **{f"model.{key}": f"model.rollout.{key}" for key in ("group_size", "sampling", "engine", "self_check")},
    "model.solved_at": "model.rollout.success_threshold",
    "model.sft_weight": "model.sft_loss.weight",
    "model.sft_entropy_bonus": "model.sft_loss.entropy_bonus",
    "model.demonstrations": "model.sft_loss.demonstrations",
    **{f"model.{key}": f"model.optimizer.{key}" for key in ("rl", "sft", "moments", "skip_zero_gradient")},
    **{f"model.{key}": f"model.loading.{key}" for key in ("gradient_checkpointing", "trust_remote_code")},
    "data.system_prompt": "data.prompts.system_prompt",
    "data.chat_template": "data.prompts.chat_template",
    "data.max_prompt_tokens": "data.prompts.max_tokens",
    "data.answer_after": "data.demonstrations.answer_after",
    "data.max_response_tokens": "data.demonstrations.max_tokens",
    "data.verify_demonstrations": "data.demonstrations.verify",
    "data.damaged_share": "data.demonstrations.damaged_share",
    "data.fit_sizes": "data.schedule.fit_sizes",
    "data.schedule.rl_questions": "data.schedule.prompts_per_step",
    "data.schedule.passes": "data.schedule.epochs_per_rollout",
    "switch.init_args.p": "buffer.init_args.max_accuracy",
    "switch.p": "buffer.max_accuracy",
    "switch": "buffer",
    "importance.init_args.g": "importance.init_args.movement",
    "importance.g": "importance.movement",
}
# what data could say again of the module, and had to say alike: it is said once
ONCE = {
    "data.reward": "reward",
    "data.tokenizer": "model.model",
    "data.group_size": "model.rollout.group_size",
    "data.solved_at": "model.rollout.success_threshold",
}
ADAMW = [field.name for field in fields(AdamWSettings)]
KNOBS = ("questions", "in_group", "own", "sft_end", "sft_decay")  # of a mixture, that no method has as a setting
METHODS = "mifo_lightning.methods"
MIXTURE = {  # the knobs of `Mixing` in 0.4, and their defaults
    "questions": "all",
    "gate": 0,
    "in_group": False,
    "shape": 0.1,
    "own": "advantage",
    "positive_weight": 0.1,
    "sft": 0.0,
    "sft_end": 0.0,
    "sft_decay": 0,
    "convex": False,
    "token_weight": "uniform",
}
SETTINGS = {
    "Luffy": ("shape",),
    "SRFT": ("shape", "positive_weight", "sft", "token_weight"),
    "HPT": ("gate", "sft", "token_weight"),
}
BATCHES = ("val_check_interval", "limit_train_batches", "fast_dev_run", "overfit_batches")
ARGUMENTS = {("BufferPhaseSwitch", "p"): "max_accuracy", ("ImportanceEMA", "g"): "movement"}  # of callbacks in a list


def new_name(key: str) -> str | None:
    """What a dotted key of an earlier version is called now; None if it has kept its name."""
    if (of_phase := re.fullmatch(r"model\.(?:rl|sft)\.(\w+)", key)) and of_phase[1] not in ADAMW:
        return None  # never a key: the parser knows a near one
    for old, new in (RENAMED | ONCE).items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    if re.fullmatch(rf"model\.mixing\.({'|'.join(KNOBS)})", key):
        return "model.mixing, the class_path of a method such as mifo_lightning.methods.Luffy"
    return None


def translated(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of version 0.4 with the names of now.

    Raises:
        InputError: It has a mixture that no method is, or that is only a part of one.
    """
    found: dict[str, Any] = {}
    for key, value in _leaves(config):
        if any(key == once or key.startswith(f"{once}.") for once in ONCE):
            continue
        _put(found, new_name(key) or key if not key.startswith("model.mixing") else key, value)
    mixing = (found.get("model") or {}).get("mixing")
    if isinstance(mixing, dict) and "class_path" not in mixing:
        found["model"]["mixing"] = _method(mixing)
    elif isinstance(mixing, dict) and str(mixing["class_path"]).endswith("Luffy"):
        (mixing.get("init_args") or {}).pop("token_weight", None)  # which did nothing
    trainer = found.get("trainer") or {}
    chunks = ((found.get("model") or {}).get("optimizer") or {}).get("micro_batches") or 1
    for key in BATCHES:  # these were counted in micro-batches
        if type(trainer.get(key)) is int and chunks > 1:
            trainer[key], left = divmod(trainer[key], chunks)
            if left:
                raise InputError(
                    f"trainer.{key}: it counted micro-batches, and {chunks} of them, a step, do not divide it; change "
                    "it first"
                )
    callbacks = trainer.get("callbacks") or []
    for callback in [callbacks] if isinstance(callbacks, dict) else callbacks:
        for old, new in ARGUMENTS.items() if isinstance(callback, dict) else ():
            arguments = callback.get("init_args") or {}
            if callback.get("class_path", "").endswith(old[0]) and old[1] in arguments:
                arguments[new] = arguments.pop(old[1])
    return found


def _method(given: dict[str, Any]) -> dict[str, Any]:
    """The method that the knobs of `Mixing` were."""
    if not given.keys() & {"questions", "in_group", "own", "convex"}:
        raise InputError(
            f"model.mixing: {given} is a part of a mixture; translate the file that it was laid over with it"
        )
    knobs = {**MIXTURE, **given}
    signed, decays = knobs["own"] == "sign", bool(knobs["sft_decay"])
    kind = {(True, True): "SRFT", (True, False): "Luffy", (False, False): "Chord"}.get((knobs["in_group"], signed))
    if knobs["questions"] == "failed":
        kind = "HPT" if kind == "Chord" else None
    if kind not in (None, "Luffy") and "sft" not in given:  # its default, 0, was no method's
        raise InputError(
            f"model.mixing: {given} is a part of a mixture; translate the file that it was laid over with it"
        )
    lost = kind == "Luffy" and (knobs["sft"] or decays)
    if kind is None or lost or (kind != "Chord" and (decays or knobs["convex"])):
        raise InputError(
            f"model.mixing: {given} is no method of mifo_lightning.methods; write one as a subclass of Mixing"
        )
    if kind != "Chord":
        settings = {name: knobs[name] for name in SETTINGS[kind] if kind != "Luffy" or name in given}
        return {"class_path": f"{METHODS}.{kind}", "init_args": settings}
    arguments = {"mu": knobs["sft"], "convex": knobs["convex"], "token_weight": knobs["token_weight"]}
    if decays:
        arguments |= {"mu_end": knobs["sft_end"], "decay_steps": knobs["sft_decay"]}
    return {"class_path": f"{METHODS}.Chord", "init_args": arguments}


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        config = config.setdefault(group, {})
    if value or not isinstance(config.get(last), dict):  # a group left empty takes nothing away
        config[last] = value


def translate(arguments: list[str]) -> None:
    """`mifo translate FILE`: print the translation of a file."""
    if len(arguments) != 1:
        fail(f"usage: {COMMAND}")
    try:
        config = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise InputError(f"a {type(config).__name__} is not allowed; it must be a mapping of keys")
        print(yaml.safe_dump(translated(config), sort_keys=False), end="")
        if following := [key for key, value in _leaves(config) if "${" in str(value)]:
            print(f"by hand: {', '.join(following)} may name other keys as they were", file=sys.stderr)
    except (InputError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"{arguments[0]}: {' '.join(str(error).split())}")
