"""Random changes of nested values and of text: what `fuzz` does to valid configurations and rows."""

import copy
import random
from collections.abc import Iterator
from typing import Any

SCALARS: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "1", "1e-3", "nan", "null", "true", "~", "-", "0x1f", "1_000"),
    *("\n", "\t", "\r\n", "\0", "\x1b[2J", "\x1b]0;t\x07", "[/x]", "[bold]"),
    *("\u2028", "\u202e", "\U0001f986", "\ufeff", "\ud800"),
    *("${nowhere}", "${..x}", "${oc.env:NOWHERE}", "${", "$", "{{ x }}", "{% for"),
    *("../../x", "/dev/null", "os.system", "os.path"),
    *("embedded", "top", "mean", "ddp", "x" * 5000, "9" * 4500, ">", "<think>", "user", "assistant", "system"),
]
COMPOUND: list[Any] = [[], {}, [None], [[]], [1, 2, 3], {"a": 1}, {"class_path": "os.path"}, {"class_path": None}]
COMPOUND += [{"init_args": {}}, {"class_path": "mifo_callbacks.GradientFreezing"}, [["x"] * 3] * 3, {"": ""}]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a nested value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate(value: Any, chance: random.Random) -> Any:
    """A copy with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        found = list(places(value))
        if not found:
            return copy.deepcopy(chance.choice(SCALARS + COMPOUND))
        container, key = chance.choice(found)
        old = container[key]
        kind = chance.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = [old]
        elif kind == 2:
            container[key] = copy.deepcopy(chance.choice(found)[0])
        elif kind == 3 and isinstance(container, dict):
            container[str(key) + chance.choice(["x", "", ".y", " ", "\n"])] = container.pop(key)
        elif kind == 4 and isinstance(container, dict):
            container[chance.choice([None, 7, "", "x.y", "class_path", "init_args", "dict_kwargs", "\x1b[2J"])] = old
        elif kind == 5 and isinstance(old, str | int | float) and not isinstance(old, bool):
            container[key] = chance.choice([str(old), str(old) * 2, old * 2, f" {old}"])
        else:
            container[key] = copy.deepcopy(chance.choice(SCALARS + COMPOUND))
    return value


def scramble(text: str, chance: random.Random) -> bytes:
    """The text with a few bytes changed."""
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        at, many = chance.randrange(len(raw) or 1), chance.choice([1, 1, 2, 20])
        kind = chance.randrange(5)
        if kind == 0:
            del raw[at : at + many]
        elif kind == 1:
            raw[at:at] = bytes(chance.randrange(256) for _ in range(many))
        elif kind == 2:
            raw[at:at] = chance.choice(
                [b"[", b"{", b"&a ", b"*a ", b"!!python/name:os.system ", b'"', b"\n", b"\t", b": ", b"- "]
            )
        elif kind == 3:
            raw[at:at] = raw[at : at + many]
        elif raw:
            raw[at % len(raw)] ^= 1 << chance.randrange(8)
    return bytes(raw)
