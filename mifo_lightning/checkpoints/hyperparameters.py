"""What a checkpoint says of the module that wrote it, in plain values: enough to build it again."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from mifo_lightning.common.errors import InputError

GIVEN_AGAIN = "given_again"  # key of the names of arguments that are objects: no checkpoint holds them


def plain_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor as plain values.

    Returns:
        Numbers, texts and lists as they are, settings as dicts of theirs; objects, such as a reward, by name alone in
        `GIVEN_AGAIN`.
    """
    plain = {name: _plain(value) for name, value in arguments.items()}
    objects = [name for name, value in plain.items() if value is _OBJECT]
    return {**{name: value for name, value in plain.items() if value is not _OBJECT}, GIVEN_AGAIN: objects}


def settings_again(saved: Mapping[str, Any], defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor from `plain_settings` and what is given in their place.

    Args:
        saved: What `plain_settings` made.
        defaults: The constructor's defaults by name: settings are built like theirs.
        given: Arguments that are given now.

    Raises:
        InputError: An object is missing, or a setting has a part that this version does not know.
    """
    missing = [name for name in saved.get(GIVEN_AGAIN, []) if name not in given]
    if missing:
        raise InputError(
            f"load_from_checkpoint: {', '.join(missing)}: an object that no checkpoint holds; give "
            + ", ".join(f"{name}=…" for name in missing)
        )
    known = {name: value for name, value in saved.items() if name in defaults}
    return {**{name: _built(name, value, defaults[name]) for name, value in known.items()}, **given}


def defaults_of(kind: type, base: type) -> dict[str, Any]:
    """The defaults of the constructor of `kind` by name, and those of `base` where it passes arguments on to it."""
    own = inspect.signature(kind).parameters
    passed = inspect.signature(base).parameters if any(p.kind is p.VAR_KEYWORD for p in own.values()) else {}
    return {name: parameter.default for name, parameter in {**passed, **own}.items()}


_OBJECT = object()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        return _OBJECT if _OBJECT in parts.values() else parts
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return _OBJECT if any(item is _OBJECT for item in items) else items
    return _OBJECT


def _built(name: str, value: Any, default: Any) -> Any:
    """A dict as the settings that the default is; lists as the tuples that defaults have."""
    if isinstance(value, list) and isinstance(default, tuple):
        return tuple(value)
    if not (isinstance(value, dict) and is_dataclass(default) and not isinstance(default, type)):
        return value
    known = {f.name for f in fields(default)}
    if unknown := sorted(value.keys() - known):
        raise InputError(f"load_from_checkpoint: {name}.{unknown[0]} is none of {', '.join(sorted(known))}")
    parts = {part: _built(f"{name}.{part}", item, getattr(default, part)) for part, item in value.items()}
    return type(default)(**parts)
