"""What a checkpoint says of the module that wrote it, in plain values: enough to build it again."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

from mifo_lightning.common.errors import InputError

GIVEN_AGAIN = "given_again"  # key of the names of arguments that are objects: no checkpoint holds them


def plain_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor as plain values.

    Returns:
        Numbers, texts and lists as they are, settings as dicts of theirs; objects, such as a reward, by name alone in
        `GIVEN_AGAIN`, those in settings as `group.name`.
    """
    objects: list[str] = []
    plain = {name: _plain(value, name, objects) for name, value in arguments.items()}
    return {**{name: value for name, value in plain.items() if value is not _OBJECT}, GIVEN_AGAIN: objects}


def settings_again(saved: Mapping[str, Any], defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor from `plain_settings` and what is given in their place.

    Args:
        saved: What `plain_settings` made.
        defaults: The constructor's defaults by name: settings are built like theirs.
        given: Arguments that are given now; `group.name` is one of a group of settings.

    Raises:
        InputError: An object is missing, or a setting has a part that this version does not know.
    """
    missing = [name for name in saved.get(GIVEN_AGAIN, []) if not given.keys() & {name, name.partition(".")[0]}]
    if missing:
        raise InputError(
            f"load_from_checkpoint: {', '.join(missing)}: an object that no checkpoint holds; give "
            + ", ".join(f'**{{"{name}": …}}' if "." in name else f"{name}=…" for name in missing)
        )
    known = {name: value for name, value in saved.items() if name in defaults}
    built = {name: _built(name, value, defaults[name]) for name, value in known.items()}
    built |= {name: value for name, value in given.items() if "." not in name}
    for name, value in given.items():
        group, _, part = name.partition(".")
        if part:
            settings: Any = built.get(group, defaults.get(group))
            built[group] = replace(settings, **{part: value})
    return built


def defaults_of(kind: type, base: type) -> dict[str, Any]:
    """The defaults of the constructor of `kind` by name, and those of `base` where it passes arguments on to it."""
    own = inspect.signature(kind).parameters
    passed = inspect.signature(base).parameters if any(p.kind is p.VAR_KEYWORD for p in own.values()) else {}
    return {name: parameter.default for name, parameter in {**passed, **own}.items()}


_OBJECT = object()


def _plain(value: Any, name: str, objects: list[str]) -> Any:
    """The value, or `_OBJECT`; names of objects are added to `objects`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _plain(getattr(value, f.name), f"{name}.{f.name}", objects) for f in fields(value)}
        return {part: plain for part, plain in parts.items() if plain is not _OBJECT}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, name, []) for item in value]
        if all(item is not _OBJECT for item in items):
            return items
    objects.append(name)
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
    hints = get_type_hints(type(default))
    parts = {
        part: _built(f"{name}.{part}", item, _example(getattr(default, part), hints[part]))
        for part, item in value.items()
    }
    return type(default)(**parts)


def _example(default: Any, hint: Any) -> Any:
    """The default; where it is none, settings of the class that the type allows beside."""
    kinds: list[Any] = [kind for kind in get_args(hint) if is_dataclass(kind)] if default is None else []
    return kinds[0]() if kinds else default
