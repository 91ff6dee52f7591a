"""The configurations that travel with the package, by name: `tiny`, `methods/mifo`."""

import difflib
import os
import re
from pathlib import Path

from mifo_lightning.common.errors import InputError

HERE = Path(__file__).parents[1]
# in an installed package beside its modules; in a checkout, which an editable install is too, above them
CONFIGS = next((path for path in (HERE / "configs", HERE.parent / "configs") if path.is_dir()), HERE / "configs")
DEFAULTS = CONFIGS / "defaults.yaml"
NAME = re.compile(r"[^:{}\[\]\n]*")  # what may name a file; anything else is configuration itself


def names() -> list[str]:
    """The names of all packaged configurations, without their suffix."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def find(value: str) -> Path | None:
    """The file that `--config value` means: a file of that path if there is one, else the packaged one of that name.

    Returns:
        None if it names no file but is configuration itself, such as `{model: {group_size: 4}}`.

    Raises:
        InputError: It names a file that there is not; the line lists near names.
    """
    path = Path(value)
    exists = os.path.exists(path)  # unlike `path.exists()` False, no error, for what no path can be
    if exists and not path.is_dir():
        return path
    if (name := value.removesuffix(".yaml")) in names():
        return CONFIGS / f"{name}.yaml"
    if exists:
        return path
    if not NAME.fullmatch(value):
        return None
    raise InputError(f"--config {value}: neither a file nor the name of a packaged configuration; {_near(name)}")


def _near(name: str) -> str:
    name = name.removeprefix("configs/")
    near = difflib.get_close_matches(name, names(), n=3)
    near += [known for known in names() if known.rpartition("/")[2] == name.rpartition("/")[2] and known not in near]
    return f"did you mean {' or '.join(near)}?" if near else f"packaged are {', '.join(names())}"
