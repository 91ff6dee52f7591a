"""Where a run's files go."""

from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger


def run_dir(trainer: Trainer) -> Path:
    """A directory of this run alone, beside its checkpoints, as its logger names it; valid on the first rank only.

    A W&B logger that writes inside `trainer.default_root_dir` leaves that directory to the run.
    """
    logger, root = trainer.logger, Path(trainer.default_root_dir)
    if isinstance(logger, WandbLogger):
        place = Path(logger.save_dir or root)
        inside = root.resolve() in place.resolve().parents
        return root if inside else place / str(logger.name) / str(logger.version)
    return Path(getattr(logger, "log_dir", None) or root)
