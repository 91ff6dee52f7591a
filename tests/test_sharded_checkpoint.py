"""Sharded checkpoints: a directory is whole or refused, and nothing in it is run."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.distributed.checkpoint import save

from mifo_lightning.checkpoints.sharded import is_sharded, seal
from mifo_lightning.cli.resume import choose, read
from mifo_lightning.common.errors import InputError


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class Reach:
    """Asks for an attribute of a class that is no enum: some versions of Python write members of an enum so."""

    def __reduce__(self) -> Any:
        return getattr, (Path, "unlink")


MODULE: Any = SimpleNamespace(model_name="embedded", trust_remote_code=False)


def write(directory: Path, **more: Any) -> Path:
    """What FSDP2 writes, from one process."""
    state = {"state_dict": {"w": torch.arange(1000.0)}, "optimizer_0": {"param_groups": [{"lr": 0.1, **more}]}}
    save(state, checkpoint_id=directory, no_dist=True)
    torch.save({"global_step": 3}, directory / "meta.pt")
    seal(directory)
    return directory


def test_a_whole_one_is_read_without_its_weights(tmp_path: Path) -> None:
    state = read(write(tmp_path / "a"))
    assert state["global_step"] == 3
    assert {name: w.shape for name, w in state["state_dict"].items()} == {"w": (1000,)}


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp", "checksums.json"])
@pytest.mark.parametrize("how", ["flipped", "missing", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, how: str) -> None:
    path = write(tmp_path / "a") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "flipped" else b"")
    if how == "missing":
        path.unlink()
    if name == "checksums.json":
        name = ""  # any file may be what it no longer matches
    with pytest.raises(InputError, match=rf"^ckpt_path: .*{name}"):
        read(tmp_path / "a")


def test_no_code_in_it_runs(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(InputError, match="more than plain types"):
        read(write(tmp_path / "value", evil=Evil(marker)))
    directory = write(tmp_path / "table")
    (directory / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    seal_again(directory)
    with pytest.raises(InputError, match="more than plain types"):
        read(directory)
    (directory / ".metadata").write_bytes(pickle.dumps(Reach()))
    seal_again(directory)
    with pytest.raises(InputError, match="more than plain types"):
        read(directory)
    directory = write(tmp_path / "rest")
    torch.save({"evil": Evil(marker)}, directory / "meta.pt")
    seal_again(directory)
    with pytest.raises(InputError, match="more than plain types"):
        read(directory)
    directory = write(tmp_path / "elsewhere")
    table = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(table.replace(b"__0_0.distcp", b"../_0.distcp"))
    seal_again(directory)
    with pytest.raises(InputError, match="more than plain types"):
        read(directory)
    assert not marker.exists()


def seal_again(directory: Path) -> None:
    """As one would who forges a checkpoint."""
    (directory / "checksums.json").unlink()
    seal(directory)
    assert set(json.loads((directory / "checksums.json").read_text(encoding="utf-8"))) >= {".metadata", "meta.pt"}


def test_another_strategy_does_not_load_it(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    assert is_sharded(write(tmp_path / "a"))
    with pytest.raises(InputError, match=r"trainer\.strategy ModelParallelStrategy"):
        choose(make_trainer(), MODULE, str(tmp_path / "a"), resume=False, fit=True)
