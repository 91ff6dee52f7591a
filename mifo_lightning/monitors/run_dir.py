"""Where a run's files go."""

from itertools import count
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger

from mifo_lightning.common.errors import InputError

# what a run writes row by row or at its end, besides model and checkpoint
ROWS = ("config.yaml", "samples.jsonl", "metrics.csv", "hparams.yaml", "history.jsonl", "summary.json")


def run_dir(trainer: Trainer) -> Path:
    """A directory of this run alone, beside its checkpoints, as its logger names it; valid on the first rank only.

    A W&B logger that writes inside `trainer.default_root_dir` leaves that directory to the run. A trial
    (`trainer.fast_dev_run`) has a directory `fast_dev_run`, which the next one overwrites.
    """
    logger, root = trainer.logger, Path(trainer.default_root_dir)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return root / "fast_dev_run"
    if isinstance(logger, WandbLogger):
        place = Path(logger.save_dir or root)
        inside = root.resolve() in place.resolve().parents
        return root if inside else place / str(logger.name) / str(logger.version)
    return Path(getattr(logger, "log_dir", None) or root)


def run_of(checkpoint: Path) -> Path:
    """The directory of the run that a checkpoint belongs to."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def goes_on_here(trainer: Trainer, directory: Path, start: Any) -> bool:
    """Whether a run that goes on from `start`, or from nothing, belongs to this directory."""
    homes = [directory, getattr(trainer.checkpoint_callback, "dirpath", None)]
    return start is not None and any(home and Path(home).resolve() in Path(start).resolve().parents for home in homes)


def set_aside(directory: Path) -> None:
    """Move the rows of a run that left no model and no checkpoint out of the way of one that begins; a line says so."""
    names = [name for name in ROWS if (directory / name).exists()]
    if names:
        place = next(p for n in count(1) if not (p := directory / f"earlier-{n}").exists())
        place.mkdir()
        for name in names:
            (directory / name).rename(place / name)
        print(f"files: {', '.join(names)} of an earlier run in {directory} moved to {place.name}")


def keep_earlier(trainer: Trainer, path: Path, key: str, start: Any) -> None:
    """Refuse to write over what another run left; a run that goes on from a checkpoint beside it may.

    Collective once the processes have found each other.

    Args:
        trainer: About to train.
        path: The file or directory that training will write.
        key: The configuration key that says where.
        start: The checkpoint that training goes on from, or None.

    Raises:
        InputError: If it is there, and training does not go on from a checkpoint of the same run.
    """
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if trainer.strategy.broadcast(taken and not goes_on_here(trainer, path.parent, start)):
        raise InputError(
            f"{key}: {path} is there already and is not written over; give another trainer.default_root_dir or {key}, "
            "or go on from its checkpoint with --ckpt_path"
        )
