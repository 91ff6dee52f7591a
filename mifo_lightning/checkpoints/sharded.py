"""Checkpoints that FSDP2 writes as a directory, a file for each rank: sealed with checksums, and read only whole."""

import io
import json
import os
import pickle
import zlib
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from mifo_lightning.checkpoints.files import read_checkpoint, sync_directory
from mifo_lightning.common.errors import InputError

SEAL, TABLE, REST = "checksums.json", ".metadata", "meta.pt"  # the latter two as torch and Lightning name them


def seal(directory: Path) -> None:
    """Force all files onto the disk and write their checksums beside them."""
    sums = {}
    for path in sorted(directory.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            sums[path.name] = _checksum(file)
    with open(directory / SEAL, "w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def is_sharded(path: Path) -> bool:
    """Whether a path is such a directory, whole or not."""
    return any((path / name).is_file() for name in (TABLE, REST))


def read_sharded(directory: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds besides weights and moments; the weights' shapes stand for them.

    Raises:
        InputError: If a file is missing or damaged, or one holds anything but plain types and tensors: torch would
            unpickle what it finds.
    """
    _check_sums(directory)
    try:
        table = _TableReader(io.BytesIO((directory / TABLE).read_bytes())).load()
        _check_plain(directory, table)
        sizes = {
            name.removeprefix("state_dict."): kind.size
            for name, kind in table.state_dict_metadata.items()
            if isinstance(kind, TensorStorageMetadata) and name.startswith("state_dict.")
        }
    except Exception as error:  # whatever a forged file leads to
        raise InputError(
            f"ckpt_path: {directory} holds more than plain types and tensors, and is not loaded"
        ) from error
    weights = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    return {**read_checkpoint(directory / REST), "state_dict": weights, "optimizer_states": []}


def _check_sums(directory: Path) -> None:
    """Raise an InputError unless every file is as it was sealed."""
    if not (directory / SEAL).exists():
        raise InputError(f"ckpt_path: {directory} is not whole, or not of the group `checkpoint`: it has no {SEAL}")
    try:
        sums = json.loads((directory / SEAL).read_text(encoding="utf-8"))
        for name, expected in {TABLE: None, REST: None, **sums}.items():
            with open(directory / name, "rb") as file:
                if _checksum(file) != expected:
                    raise InputError(f"ckpt_path: {directory / name} is damaged: it does not match its checksum")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"ckpt_path: {directory} is not whole: {error}") from error


def _check_plain(directory: Path, table: Metadata) -> None:
    """Raise something if an entry is no plain value, or lies in another directory: torch unpickles them all."""
    names = {name for name, kind in table.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)}
    for index, place in table.storage_data.items():
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(place.relative_path)
        if index.fqn in names:
            with open(directory / place.relative_path, "rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


class _TableReader(pickle.Unpickler):
    """Reads the table of a sharded checkpoint: the classes that torch writes into one, and nothing else."""

    ALLOWED = {
        "torch": ("Size",),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.distributed.checkpoint.metadata": (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
        ),
        "pathlib": ("Path", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Raises an UnpicklingError for anything else."""
        if (module, name) == ("builtins", "getattr"):  # Python 3.11.2 writes a member of an enum so
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in self.ALLOWED.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Enum:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("builtins.getattr")
    return kind[name]


def _checksum(file: Any) -> int:
    """CRC-32 of the rest of a file, read by and by."""
    found = 0
    while part := file.read(1 << 20):
        found = zlib.crc32(part, found)
    return found
