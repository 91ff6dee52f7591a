"""Going on from a checkpoint: which one it is, and whether it fits the run that is to go on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from mifo_lightning.checkpoints.files import read_checkpoint
from mifo_lightning.checkpoints.sharded import is_sharded, read_sharded
from mifo_lightning.common.errors import InputError
from mifo_lightning.module import MifoModule
from mifo_lightning.monitors.checkpoint import LAST, PREVIOUS, LastCheckpoint
from mifo_lightning.monitors.kept_rows import METRICS, carry, keep_rows, metrics_before
from mifo_lightning.monitors.run_dir import goes_on_here, run_dir, run_of, set_aside
from mifo_lightning.policy.adapter import own_weights
from mifo_lightning.steps.guards import check_format

VERSION = "pytorch-lightning_version"
# what training goes on from
WHOLE = {"loops": dict, "optimizer_states": list, "callbacks": dict, "global_step": int}


@dataclass(frozen=True)
class Start:
    """A checkpoint to load, and the optimizer steps that were done when it was written."""

    path: Path
    step: int


def choose(trainer: Trainer, module: MifoModule, given: str | None, resume: bool, fit: bool) -> Start | None:
    """The checkpoint to load, verified; None if there is none to be.

    Args:
        trainer: Before it runs; with `resume` its loggers go on in the directory of the run that goes on.
        module: The configured one; its weights need not be loaded.
        given: The path that was given, if any.
        resume: Whether to go on with the newest run instead.
        fit: Whether training is to go on from it.

    Raises:
        InputError: If it is not whole or does not fit.
    """
    if given is None and not resume:
        return None
    if given is not None and "://" in given and not resume:
        raise InputError(f"ckpt_path: {given} is an address; only files on this machine are read: download it first")
    path = newest(trainer) if resume else Path(str(given)).absolute()  # Lightning takes `best` and `last` for others
    path, checkpoint = read_or_previous(path) if fit else (path, read(path))
    check_fits(checkpoint, path, trainer, module, fit)
    start = Start(path, int(checkpoint.get("global_step", 0)))
    if resume:
        stay_in(trainer, path)
        rank_zero_only(print)(f"resume: going on from {path}, of step {start.step}")
    return start


@rank_zero_only
def prepare_files(trainer: Trainer, start: Start | None) -> None:
    """Before training: no run adds to another's rows, and one that goes on has its own from before the checkpoint."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    for directory in {run_dir(trainer), *(Path(logger.log_dir) for logger in loggers)}:
        if start is None or not goes_on_here(trainer, directory, start.path):
            set_aside(directory)
    for logger in loggers:
        if start is not None:
            carry(trainer, Path(logger.log_dir, METRICS), start.path, metrics_before, start.step)
        keep_rows(logger)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint in one file or sharded, verified; raises an InputError unless it is whole."""
    try:
        return read_sharded(path) if is_sharded(path) else read_checkpoint(path)
    except OSError as error:
        raise InputError(f"ckpt_path: {path!s:.200} cannot be read: {error.strerror}") from error


def read_or_previous(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint, or the one before it where the last one of a run is not whole; a line says so.

    Raises:
        InputError: If neither is.
    """
    try:
        return path, read(path)
    except InputError as error:
        if path.name != LAST or not (previous := path.with_name(PREVIOUS)).exists():
            raise
        try:
            checkpoint = read(previous)
        except InputError as second:
            raise InputError(f"{error}; and {str(second).removeprefix('ckpt_path: ')}") from second
        rank_zero_warn(f"{error}; going on from {previous}, of step {checkpoint.get('global_step')}")
        return previous, checkpoint


def newest(trainer: Trainer) -> Path:
    """The last checkpoint of the newest run that has one, where this Trainer's runs lie.

    Raises:
        InputError: If there is none.
    """
    root = Path(trainer.default_root_dir)
    own = next((c.dirpath for c in trainer.callbacks if isinstance(c, LastCheckpoint)), None)  # type: ignore[attr-defined]
    places = [Path(own)] if own else [p for up in ("", "*/", "*/*/") for p in root.glob(f"{up}checkpoints")]
    if not own:
        logged = [Path(logger.save_dir or root, str(logger.name)) for logger in trainer.loggers]
        # a run without a logger, whose files lie beside, is another run
        places = [p for place in logged for p in place.glob("*/checkpoints")] or places
    paths = [place / name for place in places for name in (LAST, PREVIOUS)]
    found = {path.stat().st_mtime_ns: path for path in paths if path.exists()}
    if not found:
        raise InputError(
            f"resume: no run with a checkpoint lies in {own or root}; begin one without --resume, or name a file with "
            "--ckpt_path"
        )
    return found[max(found)].with_name(LAST)


def check_fits(checkpoint: dict[str, Any], path: Path, trainer: Trainer, module: MifoModule, fit: bool) -> None:
    """Refuse a checkpoint that this run cannot load.

    Args:
        checkpoint: As `read` gave it.
        path: Where it lies.
        trainer: Of this run.
        module: The configured one.
        fit: Whether training is to go on from it; evaluation needs the weights alone.

    Raises:
        InputError: If it is of another program or version, of weights alone, of another model, or sharded where the
            strategy is not.
    """
    if is_sharded(path) and not isinstance(trainer.strategy, ModelParallelStrategy):
        raise InputError(
            f"ckpt_path: {path} is sharded; it is loaded with trainer.strategy ModelParallelStrategy alone"
        )
    weights = checkpoint.get("state_dict")
    lacks = "state_dict" if not isinstance(weights, dict) else VERSION if VERSION not in checkpoint else None
    if lacks or not isinstance(weights, dict):
        raise InputError(f"ckpt_path: {path} is no checkpoint of a run: it has no {lacks}")
    for key, kind in WHOLE.items():
        if not isinstance(checkpoint.get(key, kind()), kind):
            raise InputError(f"ckpt_path: {path} is no checkpoint of a run: its {key} is no {kind.__name__}")
    if fit:
        missing = [key for key in WHOLE if key not in checkpoint]
        if missing and "mifo" in checkpoint:
            raise InputError(
                f"ckpt_path: {path} holds weights alone, without {', '.join(missing)}: training cannot go on from it; "
                "take last.ckpt"
            )
        check_format(checkpoint)
    expected = module.saved_weights()
    if module.adapter is not None:
        weights = own_weights(weights)
    unlike = sorted(name for name in expected.keys() | weights.keys() if _shape(weights, name) != expected.get(name))
    if unlike:
        name = unlike[0]
        raise InputError(
            f"ckpt_path: {path} is of another model than model.model {module.model_name}: {name} is "
            f"{_say(_shape(weights, name))} there and {_say(expected.get(name))} here ({len(unlike)} of "
            f"{len(expected)} weights differ)"
        )
    if fit:
        module.seed.restore(checkpoint["mifo"].get("seed"))  # now, before any file of the run is touched


def _shape(weights: dict[str, Any], name: str) -> Any:
    return getattr(weights.get(name), "shape", None)


def _say(shape: Any) -> str:
    return "missing" if shape is None else str(list(shape))


def stay_in(trainer: Trainer, path: Path) -> None:
    """Let each logger go on in the directory of a checkpoint's run, if that is one of its own and it is free to."""
    run = run_of(path).resolve()
    for logger in trainer.loggers:
        own = Path(logger.save_dir or trainer.default_root_dir, str(logger.name)).resolve() == run.parent
        if own and isinstance(logger, WandbLogger) and logger._id is None:
            logger._id = logger._wandb_init["id"] = run.name
        elif own and getattr(logger, "_version", "") is None:
            logger._version = run.name  # type: ignore[attr-defined]
