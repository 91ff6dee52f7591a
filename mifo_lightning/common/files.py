"""Files that may be opened, names that a file can have, and files that are never there by half."""

import os
import re
import socket
import stat
from pathlib import Path

from mifo_lightning.common.errors import InputError

UNREADABLE = re.compile("[\0\ud800-\udfff]")  # no path, tokenizer or file takes them


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a file, which is not opened unless it is a regular one: a pipe or device may never end.

    Raises:
        InputError: It is none, has more than `most` bytes or cannot be read.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > most:
        raise InputError(f"{path}: more than {most} bytes, which are allowed")
    return content


def check_regular(path: Path) -> None:
    """Raise an InputError if `path`, which may be absent, is no regular file; OSError and ValueError as of `stat`."""
    mode = path.stat().st_mode
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: {kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file")


def make_writable(directory: str | Path, key: str, otherwise: str = "") -> None:
    """Make the directory that `key` names.

    Raises:
        InputError: It cannot be made or written, said before work whose results it is for; `otherwise` is what else
            is allowed.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(directory, os.W_OK | os.X_OK) else "cannot be written"
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        problem = str(getattr(error, "strerror", None) or error)
    if problem:
        raise InputError(f"{key}: {str(directory)!r}: {problem}; allowed is a directory that can be written{otherwise}")


def replace_text(path: Path, text: str) -> None:
    """Write a file beside, force it onto the disk, then give it the name; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    with open(part, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
