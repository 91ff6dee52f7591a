"""Checkpoint files that are never there by half, and are read only if they are whole; no code in them ever runs."""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from torch.utils._pytree import tree_leaves

from mifo_lightning.common.errors import InputError, TrainingError


class CheckedCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, which the file replaces when it is on the disk; reads local files, verified."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file; another one there stays whole until this one is.

        Raises:
            TrainingError: If it cannot be written: names the path and the bytes that it takes.
        """
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        """Read the file, whatever `weights_only` says, as plain types and tensors.

        Raises:
            InputError: As `read_checkpoint`.
        """
        return read_checkpoint(Path(path), map_location, mmap=False)


def with_checkpoint_io(config: dict[str, Any]) -> dict[str, Any]:
    """A Trainer's arguments with `CheckedCheckpointIO` among the plugins, unless they name another."""
    given = config.get("plugins")
    plugins = given if isinstance(given, list) else [] if given is None else [given]
    own = [] if any(isinstance(plugin, CheckpointIO) for plugin in plugins) else [CheckedCheckpointIO()]
    return {**config, "plugins": [*plugins, *own]}


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write beside the path, force it onto the disk, and only then give it the name.

    Raises:
        TrainingError: If it cannot be written; what was there before is there still.
    """
    part = path.with_name(f"{path.name}.part")  # beside: a rename across file systems would be a copy
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)
    except BaseException as error:
        remove_file(part)
        reason = error if isinstance(error, OSError) else error.__context__  # torch hides it behind one of its own
        if not isinstance(error, (OSError, RuntimeError)) or not isinstance(reason, OSError):
            raise
        raise TrainingError(unwritten(path, reason, tensor_bytes(checkpoint))) from error


def read_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = True) -> dict[str, Any]:
    """A checkpoint as plain types and tensors; with `mmap` the tensors are read from the disk when they are used.

    Raises:
        InputError: If it is no local file, not whole, or holds anything else.
    """
    check_archive(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise InputError(f"ckpt_path: {path} holds more than plain types and tensors, and is not loaded") from error
    except Exception as error:  # whatever torch makes of an archive that another program wrote
        raise InputError(f"ckpt_path: {path} is no checkpoint: {str(error).strip().split(chr(10))[0][:200]}") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"ckpt_path: {path} is no checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def check_archive(path: Path) -> None:
    """Compare every part of a file written by torch.save with its checksum, which torch.load does not do.

    Raises:
        InputError: If the path is no such file, or the file is not whole.
    """
    if not path.exists():
        raise InputError(f"ckpt_path: there is no file {path}; give a file on this machine")
    if not path.is_file():
        raise InputError(f"ckpt_path: {path} is {'a directory' if path.is_dir() else 'no regular file'}, no checkpoint")
    if not path.stat().st_size:
        raise InputError(f"ckpt_path: {path} is empty")
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # whatever zipfile makes of damaged bytes
        what = f"damaged or cut off ({error})" if is_archive else "no checkpoint"
        raise InputError(f"ckpt_path: {path} is {what}") from error
    if broken is not None:
        raise InputError(f"ckpt_path: {path} is damaged: {broken} does not match its checksum")


def unwritten(path: Path, error: OSError, needed: int) -> str:
    """One line on a checkpoint that could not be written, and the bytes that it takes."""
    return (
        f"{path}: {error.strerror or error}; this checkpoint takes {needed:,} bytes, and {free_bytes(path):,} are free"
    )


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists, what they share counted once."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def existing(path: Path) -> Path:
    """The path itself or the nearest directory above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def free_bytes(path: Path) -> int:
    """How much the disk of a path, which need not exist, has left."""
    found = os.statvfs(existing(path))
    return found.f_bavail * found.f_frsize


def sync_directory(directory: Path) -> None:
    """Force the names in a directory onto the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_file(path: Path) -> None:
    """Remove what may be there; where even that fails, nothing more can be done."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
