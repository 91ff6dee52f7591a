"""The model card beside an exported model: what it came from, how, with what result, and the command that made it."""

import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from mifo_lightning.common.terminal import printable
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.monitors.summary import RunSummary, comparison
from mifo_lightning.policy.loading import locate

# callbacks of the method, as the command line names them
GROUPS = ("entropy", "importance", "anchor", "freeze", "directions", "soft", "conflict", "subspace", "drop", "buffer")
PACKAGES = ("mifo-lightning", "torch", "lightning", "transformers")
Counts = Mapping[str, Mapping[str, tuple[int, int]]]


def model_card(
    config: Mapping[str, Any],
    arguments: Sequence[str],
    counts: Counts,
    before: Mapping[str, float],
    after: Mapping[str, float],
    base_model: str | None = None,
) -> str:
    """The text of README.md, with a YAML head that the Hugging Face hub reads; text from data is escaped.

    Args:
        config: The resolved configuration of the run.
        arguments: What the command line was given.
        counts: Of each split and source how many questions there are, and how many of them have a demonstration.
        before: Metrics of the first validation, without `val/`; may be empty.
        after: The same of the last one.
        base_model: The hub name of the model that was trained; None where it is a directory.
    """
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base_model is not None:
        head["base_model"] = base_model
    head["tags"] = ["mifo-lightning", "reinforcement-learning"]
    model, data = config["model"], config["data"]
    on = {name: config[name]["init_args"] for name in GROUPS if config.get(name)}
    lines = [
        f"- Base model: {escaped(model['model'])}",
        f"- Method: {escaped(config.get('method') or 'none named')}",
        f"- Callbacks: {'; '.join(f'{name} ({settings(values)})' for name, values in on.items()) or 'none'}",
        f"- Policy loss: {settings(model['loss'])}",
        *([f"- Adapters, merged: {settings(model['adapter'])}"] if model.get("adapter") else []),
        *([f"- Demonstrations in RL steps: {_named(model['mixing'])}"] if model.get("mixing") else []),
        f"- Rollouts: {settings({'group_size': model['rollout']['group_size'], **model['rollout']['sampling']})}",
        f"- Schedule: {settings(data['schedule'])}",
        f"- Seed: {config['seed_everything']}",
        f"- Prompts: `chat_template.jinja` gives those of training{_system(data['prompts'].get('system_prompt'))}",
        f"- Versions: {', '.join(f'{name} {version(name)}' for name in PACKAGES)}, Python {platform.python_version()}",
    ]
    parts = [f"# {escaped(Path(model['model']).name)}, trained with mifo-lightning", "\n".join(lines)]
    counted = [[split, source, *n] for split, sources in counts.items() for source, n in sources.items()]
    parts += ["## Data", _table(["split", "source", "questions", "with demonstration"], counted)]
    if after:
        metrics, rows = comparison(before, after)
        cells = [[name, *(values.get(metric, "") for metric in metrics)] for name, values in rows.items()]
        evaluation = {name: value for name, value in model["evaluation"].items() if name != "sampling"}
        drawn = settings(evaluation | _drawn(model))
        parts += ["## Results, before → after", f"Drawn with {drawn}.", _table(["source", *metrics], cells)]
    command = "python -m mifo_lightning " + shlex.join(arguments)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", command)), 3)
    parts += ["## Command", f"{fence}\n{command}\n{fence}"]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


@rank_zero_only
def write_card(trainer: Trainer, data: Any, config: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Write README.md beside the exported model, once the last evaluation is there; see `model_card`."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    summary = next((c for c in callbacks if isinstance(c, RunSummary)), None)
    measured = (summary.before, summary.after) if summary else ({}, {})
    name = config["model"]["model"]
    hub = None if Path(locate(name)).is_dir() else name
    for callback in callbacks:
        if isinstance(callback, ExportModel) and callback.written:
            card = model_card(config, arguments, data.counts(), *measured, hub)
            (callback.written / "README.md").write_text(card, encoding="utf-8")


def escaped(text: object) -> str:
    """Text as Markdown shows it, in one line: what would be a mark, a tag or a control character is none."""
    line = printable(" ".join(str(text).split()))
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", line)


def settings(values: Mapping[str, Any]) -> str:
    """`name value` of each that is set."""
    return ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in values.items() if value is not None)


def _named(built: Mapping[str, Any]) -> str:
    """The class of a `class_path` with its settings."""
    name = escaped(built["class_path"].rpartition(".")[2])
    return f"{name} ({settings(built.get('init_args') or {})})"


def _drawn(model: Mapping[str, Any]) -> dict[str, Any]:
    """How evaluation draws: what its own settings leave open is that of rollouts."""
    own: Mapping[str, Any] = model["evaluation"]["sampling"]
    return {name: model["rollout"]["sampling"].get(name) if value is None else value for name, value in own.items()}


def _system(prompt: str | None) -> str:
    if prompt is None:
        return ""
    return f", with the system message {escaped(prompt)!r} where a conversation brings none"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(escaped, line)) + " |" for line in lines)
