"""The columns of a file: which of them hold prompt, truth, demonstration and source, and in which form."""

import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, TypeGuard

from lightning.pytorch.utilities import rank_zero_warn

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.source import Row

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell it, no tokenizer can read it
WHOLE = 2**53  # floats beyond are not known to the unit
MISSING = object()


@dataclass
class Columns:
    """Which columns of a file hold what a question is made of; the defaults are the row format.

    A name may lead into nested columns by dots, as `reward_model.ground_truth` or `answers.0` does.

    Args:
        prompt: The question: a text, which is one user message, or a list of {role, content}.
        truth: The right answer, a text or a number.
        target: The demonstration: a text, a list with one {role: assistant, content}, or null.
        data_source: The name that metrics are kept under; the file's or hub set's where there is none.
        truth_after: The truth is what follows the last such text in its column; null takes all of it.
    """

    prompt: str = "prompt"
    truth: str = "reward_model.ground_truth"
    target: str = "target"
    data_source: str = "data_source"
    truth_after: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """The keys that were given another column than the row format's."""
        default = asdict(Columns())
        return {key: name for key, name in asdict(self).items() if key != "truth_after" and name != default[key]}

    def of(self, names: Collection[str], where: str) -> "Columns":
        """These, or the row format for a file that is in it and has none of the named columns, with a warning.

        Demonstrations may be absent from a whole file, with a warning too if their column was named.

        Raises:
            InputError: The file lacks another of the named columns; the message begins with `where`.
        """
        absent = {key: name for key, name in self.named.items() if not {name, name.partition(".")[0]} & set(names)}
        plain = Columns()
        if absent and absent == self.named and {plain.prompt, plain.truth.partition(".")[0]} <= set(names):
            columns = ", ".join(self.named.values())
            rank_zero_warn(f"{where}: has none of the columns that data.columns names ({columns}); read as row format")
            return plain
        demonstrations = absent.pop("target", None)
        if absent:
            key, name = next(iter(absent.items()))
            raise _absent(name, f" (data.columns.{key})", names, where)
        if demonstrations:
            rank_zero_warn(f"{where}: has no column `{demonstrations}` (data.columns.target), so no demonstrations")
        return self


def to_row(found: dict[str, Any], columns: Columns, name: str, where: str, unanswered: bool = False) -> Row:
    """A row of the row format; what `columns` do not name stays beside it.

    Args:
        found: Plain values by the file's own names.
        columns: Which of them are meant.
        name: `data_source` of rows that have none.
        where: File and row, for messages.
        unanswered: Whether the row may lack a truth, which is "" then.

    Raises:
        InputError: A column is missing or of the wrong type; the message begins with `where`.
    """
    reward_model = found.get("reward_model")
    others = reward_model if isinstance(reward_model, dict) else {"style": "rule"}
    silent = unanswered and _look_up(found, columns.truth) in (MISSING, None)
    return {
        **found,
        "data_source": _source(found, columns, name, where),
        "prompt": _prompt(found, columns, where),
        "reward_model": {**others, "ground_truth": "" if silent else _truth(found, columns, where)},
        "target": _target(found, columns, where),
    }


def truth_text(value: object) -> object:
    """A number as a person writes it: 72 for 72 and 72.0, 0.0001 for 1e-4; anything else as it is.

    So are floats too large to be known to the unit, for they are no truth.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        return value
    if not isinstance(value, float):
        return format(Decimal(value), "f")
    if abs(value) >= WHOLE:
        return value
    # a column of whole numbers with a gap is one of floats
    return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")


def wrong(where: str, what: str, allowed: str, value: object) -> InputError:
    """The error for a value of the wrong type."""
    return InputError(f"{where}: {what} must be {allowed}, got {type(value).__name__} {value!r:.80}")


def has_source(found: dict[str, Any], columns: Columns) -> bool:
    """Whether a row says itself which set it is of."""
    return _look_up(found, columns.data_source) is not MISSING


def _source(found: dict[str, Any], columns: Columns, name: str, where: str) -> str:
    source = _look_up(found, columns.data_source)
    source = name if source is MISSING else source
    if not (_is_text(source) and source):
        raise wrong(where, f"`{columns.data_source}`", "a name in Unicode", source)
    return source


def _prompt(found: dict[str, Any], columns: Columns, where: str) -> list[dict[str, str]]:
    prompt, what = _needed(found, columns, "prompt", where), f"`{columns.prompt}`"
    if _is_text(prompt):
        return [{"role": "user", "content": prompt}]
    if not _is_conversation(prompt):
        raise wrong(where, what, "a text, or a list of {role, content} with texts, all Unicode", prompt)
    if not prompt:
        raise wrong(where, what, "a conversation of at least one message", prompt)
    if prompt[-1]["role"] == "assistant":
        raise wrong(where, what, "a conversation that does not end in an answer, which is `target`", prompt[-1:])
    return prompt


def _truth(found: dict[str, Any], columns: Columns, where: str) -> str:
    given, what = _needed(found, columns, "truth", where), f"`{columns.truth}`"
    truth = truth_text(given)
    if not (_is_text(truth) and truth.strip()):
        raise wrong(where, what, "a Unicode text, not empty, or a number", given)
    if columns.truth_after is None:
        return truth
    _, marker, after = truth.rpartition(columns.truth_after)
    if not marker or not after.strip():
        raise wrong(
            where, what, f"a text with an answer after {columns.truth_after!r} (data.columns.truth_after)", given
        )
    return after.strip()


def _target(found: dict[str, Any], columns: Columns, where: str) -> list[dict[str, str]] | None:
    target = _look_up(found, columns.target)
    if target is MISSING or target is None:
        return None
    if _is_text(target):
        return [{"role": "assistant", "content": target}]
    if not (_is_conversation(target) and len(target) == 1 and target[0]["role"] == "assistant"):
        allowed = "null, a Unicode text, or a list with one {role: assistant, content}"
        raise wrong(where, f"`{columns.target}`", allowed, target)
    return target


def _needed(found: dict[str, Any], columns: Columns, key: str, where: str) -> object:
    path = str(getattr(columns, key))
    value = _look_up(found, path)
    if value is not MISSING:
        return value
    head, _, rest = path.partition(".")
    if head in found:
        raise wrong(where, f"`{head}`", f"an object that holds `{rest}`", found[head])
    hint = f" (data.columns.{key})" if key in columns.named else f"; data.columns.{key} names another"
    raise _absent(head, hint, found, where)


def _absent(name: str, hint: str, names: Collection[str], where: str) -> InputError:
    return InputError(f"{where}: column `{name}` is missing{hint}; there are {', '.join(map(str, names)) or 'none'}")


def _look_up(found: dict[str, Any], path: str) -> Any:
    """The value of a column, or at a path of names and list positions joined by dots; MISSING if there is none."""
    if path in found:
        return found[path]
    value: Any = found
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value


def _is_conversation(value: object) -> TypeGuard[list[dict[str, str]]]:
    return isinstance(value, list) and all(
        isinstance(message, dict) and _is_text(message.get("role")) and _is_text(message.get("content"))
        for message in value
    )


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and not SURROGATE.search(value)
