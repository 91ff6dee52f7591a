"""The argument parser of the command line: every error is one line that says which argument is meant."""

import difflib
import re
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, Namespace, get_loader, set_loader  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser

from mifo_lightning.cli.config_files import check_text, with_place
from mifo_lightning.cli.packaged import find
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail

MODE = "omegaconf+"  # interpolation that follows the command line


# what jsonargparse says of a key that takes short names or a class of one's own
UNION = re.compile(
    r'Parser key "([\w.]+)": Does not validate against any of the Union subtypes '
    r"Subtypes: \[((?:typing\.Literal\[[^\]]*\]|<class '(?:mifo_\w+[\w.]*|NoneType)'>|, )+)\] "
    r"Errors: (.*) Given value type: .*? Given value: (.*)"
)


UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'")


def in_short(message: str) -> str:
    """An error line of such a key: the value, the names and the class that are allowed, and why a class is none."""
    if not (found := UNION.search(message)):
        return message
    key, subtypes, errors, value = found.groups()
    if nested := re.search(r"NestedArg\(key='([\w.]+)'", value):
        return f"{key}.{nested[1]}: {key} is null and has no settings; name its class first: --{key} CLASS"
    allowed = re.findall(r"'(\w+)'(?!>)", subtypes) + ["null"] * ("NoneType" in subtypes)
    allowed += [f"the class_path of a {name}" for name in re.findall(r"\.(\w+)'>", subtypes)]
    reason = re.search(r"Problem with given class_path '[^']*': (.*?)(?: - Expected|$)", errors)
    why = f" ({reason[1].strip()})" if reason else ""
    asked = message[: found.start()] or f"{key}: "
    return f"{asked}{value!r:.80} is not allowed{why}; it must be {', '.join(allowed[:-1])} or {allowed[-1]}"


class NamedConfig(ActionConfigFile):
    """`--config`: a file, or the name of a packaged configuration."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Lay it over what came before."""
        super().__call__(parser, cfg, str(find(values) or values), option_string)  # type: ignore[no-untyped-call]


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line that says which argument is meant.

    Only `--config` reads configuration from a file: elsewhere jsonargparse would take the file that a value names, such
    as one of data, for configuration, and import the classes that stand in it.
    """

    arguments: list[str] = []  # what the command line gave
    places: dict[str, str] = {}  # where each key was given
    empty: dict[str, str] = {}  # where its configuration files leave a key empty
    done = False  # whether all that was asked for was to print something, such as `--help`

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **named})  # a part of a key is a misspelt key

    def dump(self, cfg: Any, *arguments: Any, **named: Any) -> str:
        """As of jsonargparse, without `resume`, which is of one command and not of a configuration."""
        if "resume" in cfg and not cfg["resume"]:
            cfg = cfg.clone()
            del cfg["resume"]
        text: str = super().dump(cfg, *arguments, **named)
        return text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit with status 2."""
        text = " ".join(message.split())
        quoted = re.findall(r"['\"]([\w.]+)['\"]", text)
        for argument in self.arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and name[2:] not in text and any(name.endswith(word) for word in quoted):
                text = f"{name}: {text}"
        text = in_short(text)
        if unknown := UNKNOWN.search(text):
            key = unknown[1] or unknown[2]
            near = [f"{'--' if unknown[1] else ''}{name}" for name in self._near(key)]
            text += f"; did you mean {' or '.join(near)}?" if near else "; `--help` lists all"
            if ", line " in (place := self.places.get(key, "")):
                text = f"{place}: {text}"
        fail(with_place(text, self.empty))

    def _near(self, key: str) -> list[str]:
        """Keys that hold a value, of the subcommand that was given: those of the same last part, and similar ones."""
        action = getattr(self, "_subcommands_action", None)
        parsers = action._name_parser_map if action else {}
        parser: Any = next((parsers[word] for word in self.arguments if word in parsers), self)
        names = parser._option_string_actions
        options = sorted(name[2:] for name in names if name.startswith("--") and not name.endswith(".help"))
        leaves = [a for a, b in zip(options, [*options[1:], ""], strict=True) if not b.startswith(f"{a}.")]
        lasts = {name: name.rpartition(".")[2] for name in leaves}
        alike = difflib.get_close_matches(key.rpartition(".")[2], sorted(set(lasts.values())), n=1, cutoff=0.8)
        same = [name for name, last in lasts.items() if last in alike]
        return list(dict.fromkeys([*same[:3], *difflib.get_close_matches(key, leaves, n=3, cutoff=0.75)]))[:3]

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the program as `--help` does."""
        OneLineParser.done = True
        super().exit(status, message)

    def add_argument(self, *arguments: Any, **named: Any) -> Any:
        """As of argparse; configuration files may be named."""
        if named.get("action") is ActionConfigFile:
            named |= {"action": NamedConfig, "help": "A YAML file, or a packaged name: tiny, methods/mifo, ..."}
        return super().add_argument(*arguments, **named)

    def _add_signature_parameter(self, *arguments: Any, **named: Any) -> Any:
        return super()._add_signature_parameter(*arguments, **{**named, "sub_configs": False})


def load_checked(text: str) -> Any:
    """YAML, of a file or an argument, unless reading it would take the process or the machine with it.

    Raises:
        yaml.YAMLError: It is none, or is refused.
    """
    check_text(text)
    try:
        return get_loader("yaml")(text)
    except ValueError as error:  # a number of thousands of digits, a day that is none
        raise yaml.YAMLError(str(error)) from error


set_loader(MODE, load_checked, exceptions=(yaml.YAMLError,))


def check_groups(config: Any, group: str, kind: type) -> None:
    """Refuse a group of settings that is null or no mapping: the parser would build it from nothing, or not at all.

    Args:
        config: The values of `group`.
        group: Its name, such as `model`.
        kind: The class that they are arguments of.

    Raises:
        InputError: One of its dataclasses, or of theirs, has no keys.
    """
    for name, hint in get_type_hints(kind.__init__).items():  # type: ignore[misc]
        if not is_dataclass(hint):
            continue
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if not isinstance(value, (Namespace, dict, hint)):  # type: ignore[arg-type]
            keys, given = ", ".join(field.name for field in fields(hint)), "null" if value is None else repr(value)
            raise InputError(
                f"{group}.{name}: {given} is not allowed; it holds the keys {keys}; leave it out for the defaults"
            )
        check_groups(value, f"{group}.{name}", hint)  # type: ignore[arg-type]
