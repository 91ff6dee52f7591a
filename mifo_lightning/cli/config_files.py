"""What error lines must know of configuration files: that they are text, what they give and where."""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent

from mifo_lightning.cli.packaged import find
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.files import UNREADABLE, read_regular

NULL = "tag:yaml.org,2002:null"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LARGEST, DEEPEST, MOST = 2**20, 100, 100_000  # characters, levels and values, aliases written out, of a configuration


def check_characters(arguments: list[str]) -> None:
    """Raise an InputError for an argument with NUL or half a character, as bytes become that are not UTF-8."""
    for argument in arguments:
        if found := UNREADABLE.search(argument):
            raise InputError(
                f"argument {argument!r:.120} holds U+{ord(found[0]):04X}, which is not allowed; give UTF-8"
            )


def check_text(text: str) -> None:
    """Refuse YAML that would end the process (depth), fill the memory (aliases) or holds what is no text.

    Raises:
        yaml.MarkedYAMLError: With the line and what is allowed, also where the text is no YAML.
    """
    if len(text) > LARGEST:
        raise yaml.MarkedYAMLError(problem=f"{len(text)} characters, at most {LARGEST} are allowed")
    sizes: dict[str | None, int] = {}  # values in each anchored value
    opened: list[tuple[str | None, int]] = [(None, 0)]  # anchor of each open collection, and values before it
    count = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, CollectionStartEvent):
            opened.append((event.anchor, count))
        elif isinstance(event, CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor] = count - before
        elif isinstance(event, ScalarEvent):
            sizes[event.anchor] = 1
        elif isinstance(event, AliasEvent):
            count += sizes.get(event.anchor, 0)
        count += isinstance(event, NodeEvent)
        if problem := _problem(event, opened, count):
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _problem(event: yaml.Event, opened: list[tuple[str | None, int]], count: int) -> str | None:
    if len(opened) > DEEPEST:
        return f"nested more than {DEEPEST} levels deep"
    if count > MOST:
        return f"more than {MOST} values, aliases written out"
    if isinstance(event, AliasEvent) and any(event.anchor == anchor for anchor, _ in opened):
        return f"alias {event.anchor} stands inside its own value"
    if isinstance(event, ScalarEvent) and (found := UNREADABLE.search(event.value)):
        return f"a value holds the character U+{ord(found[0]):04X}, which is not allowed"
    return None


class Given(NamedTuple):
    """One value that a configuration file or a flag gives."""

    key: str
    """Dotted."""
    tag: str
    """Of YAML."""
    place: str
    """File and line, or the flag."""
    value: str = ""
    """As it is written."""


def given(arguments: list[str]) -> list[Given]:
    """What the files and flags of a command line give, in their order; later ones win.

    Raises:
        InputError: A file is no regular one, cannot be read, is not UTF-8 text, or `check_text` refuses it; no file or
            packaged configuration has the name.
    """
    found: list[Given] = []
    for text, following in pairwise([*arguments, ""]):
        flag, equals, value = text.partition("=")
        value = value if equals else following
        if flag not in ("--config", "-c"):
            found += _of_flag(flag, value)
        elif path := find(value):
            found += _of_file(path)
        else:
            found += _of_flag("", value)
    return found


def left_empty(values: Iterable[Given]) -> dict[str, str]:
    """Dotted keys that configuration files leave null: what is said of each, with file and line."""
    found: dict[str, str] = {}
    for one in values:
        found.pop(one.key, None)
        if one.tag == NULL and ", line " in one.place:
            found[one.key] = f"{one.place}: `{one.key}` is {'null' if one.value else 'left empty'}"
    return found


def with_place(message: str, empty: dict[str, str]) -> str:
    """An error line, with what `left_empty` says of a key whose missing value it is about."""
    if not re.search(r"null|None|required", message):  # some value is wrong: a flag may have given it
        return message
    missing = re.search(r"arguments are required: (.*)", message)
    for key, said in empty.items():
        named = re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", message)
        if named or (missing and key.rpartition(".")[2] in missing[1].split(", ")):
            return f"{message} ({said})"
    return message


def _of_file(path: Path) -> Iterator[Given]:
    try:
        text = read_regular(path, LARGEST).decode("utf-8-sig")
        check_text(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text (byte {error.object[error.start]:#x})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise InputError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
    for key, value in _leaves(root, ""):
        yield Given(key, value.tag, f"{path}, line {value.start_mark.line + 1}", str(value.value))


def _of_flag(flag: str, text: str) -> Iterator[Given]:
    """What one flag gives, or without one configuration itself; what cannot be read is for the parser to refuse."""
    if flag and not flag.startswith("--"):
        return
    try:
        check_text(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return
    for key, value in _leaves(root, flag.removeprefix("--")):
        yield Given(key, value.tag, flag or "--config", str(value.value))


def _leaves(node: yaml.Node | None, key: str) -> Iterator[tuple[str, yaml.Node]]:
    """Scalars, and mappings that are empty, by dotted key."""
    if isinstance(node, yaml.MappingNode) and node.value:
        for name, value in node.value:
            yield from _leaves(value, f"{key}.{name.value}".lstrip("."))
    elif isinstance(node, (yaml.ScalarNode, yaml.MappingNode)):
        yield key, node
