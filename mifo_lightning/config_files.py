"""What error lines must know of configuration files: that they are text, and where a key is left empty."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import yaml

from mifo_lightning.errors import InputError

NULL = "tag:yaml.org,2002:null"


def left_empty(arguments: list[str]) -> dict[str, str]:
    """Dotted keys that the configuration files of a command line set to null, with file and line; later files win.

    Raises:
        InputError: A file is not UTF-8 text or no YAML.
    """
    found: dict[str, str] = {}
    for path in _config_files(arguments):
        try:
            root = yaml.compose(path.read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise InputError(f"{path}, line {line}: not UTF-8 text (byte {error.object[error.start]:#x})") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}, line {mark.line + 1}" if mark else str(path)
            raise InputError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
        for key, value in _leaves(root, ""):
            found.pop(key, None)
            if value.tag == NULL:
                found[key] = f"{path}, line {value.start_mark.line + 1}"
    return found


def with_place(message: str, empty: dict[str, str]) -> str:
    """An error line, with file and line of a key whose missing value it is about and that was left empty there."""
    if not re.search(r"null|None|required", message):  # some value is wrong: a flag may have given it
        return message
    missing = re.search(r"arguments are required: (.*)", message)
    for key, place in empty.items():
        named = re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", message)
        if named or (missing and key.rpartition(".")[2] in missing[1].split(", ")):
            return f"{message} ({place}: `{key}` is left empty)"
    return message


def _config_files(arguments: list[str]) -> list[Path]:
    named = []
    for text, following in pairwise([*arguments, ""]):
        flag, equals, value = text.partition("=")
        if flag in ("--config", "-c"):
            named.append(Path(value if equals else following))
    return [path for path in named if path.is_file()]


def _leaves(node: yaml.Node | None, key: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    if isinstance(node, yaml.ScalarNode):
        yield key, node
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _leaves(value, f"{key}.{name.value}".lstrip("."))
