"""Keys that had other names in an earlier version: one line says the new one, and a saved configuration is translated.

python -m mifo_lightning.renamed config.yaml > translated.yaml
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mifo_lightning.terminal import fail

COMMAND = "python -m mifo_lightning.renamed FILE"
# old key -> new key, with all that lies under it; 0.4
RENAMED = {
    "trainer.accumulate_grad_batches": "model.micro_batches",
    "model.policy": "model.loss",
    "model.solved_at": "model.success_threshold",
    "data.solved_at": "data.success_threshold",
    "data.schedule.rl_questions": "data.schedule.prompts_per_step",
    "data.schedule.passes": "data.schedule.epochs_per_rollout",
    "switch.init_args.p": "buffer.init_args.max_accuracy",
    "switch.p": "buffer.max_accuracy",
    "switch": "buffer",
    "importance.init_args.g": "importance.init_args.movement",
    "importance.g": "importance.movement",
}
KNOBS = ("questions", "in_group", "own", "sft_end", "sft_decay")  # of a mixture, that no method has as a setting
METHODS = "mifo_lightning.methods"


def new_name(key: str) -> str | None:
    """What a dotted key of an earlier version is called now; None if it has kept its name."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    if re.fullmatch(rf"model\.mixing\.({'|'.join(KNOBS)})", key):
        return "model.mixing, the class_path of a method such as mifo_lightning.methods.Luffy"
    return None


def translated(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of version 0.4 with the names of now."""
    found: dict[str, Any] = {}
    for key, value in _leaves(config):
        _put(found, new_name(key) or key if not key.startswith("model.mixing") else key, value)
    mixing = found.get("model", {}).get("mixing")
    if isinstance(mixing, dict) and "class_path" not in mixing:
        found["model"]["mixing"] = _method(mixing)
    return found


def _method(knobs: dict[str, Any]) -> dict[str, Any]:
    """The method that the knobs of `Mixing` were."""
    weight = {"token_weight": knobs["token_weight"]} if "token_weight" in knobs else {}
    names: tuple[str, ...]
    if knobs.get("in_group"):
        signed = knobs.get("own") == "sign"
        kind, names = ("SRFT", ("shape", "positive_weight", "sft")) if signed else ("Luffy", ("shape",))
    elif knobs.get("questions") == "failed":
        kind, names = "HPT", ("gate", "sft")
    else:
        arguments = {"mu": knobs.get("sft", 0.0), "convex": knobs.get("convex", False), **weight}
        if knobs.get("sft_decay"):
            arguments |= {"mu_end": knobs.get("sft_end", 0.0), "decay_steps": knobs["sft_decay"]}
        return {"class_path": f"{METHODS}.Chord", "init_args": arguments}
    return {"class_path": f"{METHODS}.{kind}", "init_args": {n: knobs[n] for n in names if n in knobs} | weight}


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
    config[last] = value


def main(arguments: list[str]) -> None:
    """Print the translation of a file."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        fail(f"usage: {COMMAND}")
    config = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))
    print(yaml.safe_dump(translated(config), sort_keys=False), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
