"""What decides a cell's result, our code aside, in a few digests: two runs are the same if these are."""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mifo_lightning.cli.packaged import DEFAULTS, find
from mifo_lightning.common.errors import InputError
from mifo_lightning.lab.grid import Cell

FINGERPRINT = "fingerprint.json"
CARD = "README.md"  # of a model: tells paths and versions, and decides nothing
Fingerprint = dict[str, Any]
READ = ("data.train.", "data.val.", "data.prompts.", "retention.prompts.", "retention.others.")
"""Keys whose values may name files that a fit reads."""


def fingerprint(cell: Cell) -> Fingerprint:
    """Arguments, contents of configurations, files of the base model, and files that the settings name.

    The base is None where it is not there. Of `files`, those that are: the path as it is written -> digest.
    """
    base = digest(cell.model) if cell.model.is_dir() else None
    return {**_settings(cell), "base model": base, "files": _digest_named(cell.settings)}


def read_fingerprint(directory: Path) -> Fingerprint | None:
    """What the cell in this directory was run with; None if it was not."""
    path = directory / FINGERPRINT
    found: Fingerprint | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found


def check_same(cell: Cell, before: Fingerprint, present: Fingerprint) -> None:
    """Raise InputError if the cell was run with something else than what it would be run with now.

    What is not there now, or was not recorded then, differs from nothing.
    """
    files = before.get("files", {})
    changed = [
        key for key in ("arguments", "configurations", "base model") if before[key] != (present[key] or before[key])
    ]
    changed += [f"contents of {path}" for path, now in present["files"].items() if files.get(path, now) != now]
    if changed:
        raise InputError(
            f"{cell.name}: {cell.directory} was run with other {' and '.join(changed)}; "
            "choose another `out`, or remove that directory, and the cell's line where there are `records`"
        )


def check_settings(cell: Cell) -> None:
    """Raise InputError if the cell was run with other settings, whatever there is here of what it read.

    The defaults may have got a key since: an arm may still be added to a grid that is whole.
    """
    before = read_fingerprint(cell.directory)
    if before is not None:
        now = _settings(cell)
        now["configurations"][:1] = before["configurations"][:1]
        check_same(cell, before, {**now, "base model": None, "files": {}})


def _settings(cell: Cell) -> Fingerprint:
    files = [find(file) or Path(file) for file in (str(DEFAULTS), *cell.configs)]
    return {"arguments": list(cell.settings), "configurations": [_digest_config(file) for file in files]}


@cache
def _digest_config(path: Path) -> str:
    """Of what a YAML file says; its comments do not count."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@cache
def digest(path: Path) -> str:
    """Of a file, or of names and contents of the files in a directory, such as a model's, but for its card."""
    if not path.is_dir():
        return sha256(path)[:16]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name != CARD)
    text = "".join(f"{file.name} {sha256(file)}\n" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal; InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _digest_named(settings: tuple[str, ...]) -> dict[str, str]:
    """Digests of the files and directories that the settings name, by the path as it is written."""
    paths = {value: Path(resolved).expanduser() for value in _named(settings) if (resolved := _resolved(value))}
    # not `path.exists`, which raises for a text too long to be a path, such as a template
    return {value: digest(path) for value, path in paths.items() if os.path.exists(path)}


def _named(settings: tuple[str, ...]) -> list[str]:
    """Texts under the keys that name what a fit reads; what is given later takes the place of what was given before."""
    found: dict[str, str] = {}
    for flag, text in zip(settings[::2], settings[1::2], strict=True):
        for key, value in _of_config(text) if flag == "--config" else _leaves(flag.removeprefix("--"), _parsed(text)):
            found = {name: path for name, path in found.items() if not f"{name}.".startswith(f"{key}.")}
            if isinstance(value, str) and f"{key}.".startswith(READ):
                found[key] = value
    return list(found.values())


@cache
def _of_config(file: str) -> list[tuple[str, Any]]:
    return list(_leaves("", yaml.safe_load((find(file) or Path(file)).read_text(encoding="utf-8"))))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What mappings and lists hold at the end, by dotted key."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    if not items:
        yield key, value
    for name, inner in items:
        yield from _leaves(f"{key}.{name}".lstrip("."), inner)


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _resolved(value: str) -> str:
    """The text with variables of the environment put in; what refers to others or to keys names no file."""
    if "${" not in value:
        return value
    try:
        return str(OmegaConf.to_container(OmegaConf.create([value]), resolve=True)[0])  # type: ignore[index]
    except OmegaConfBaseException:
        return ""
