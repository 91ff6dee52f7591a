"""Where a run's files go."""

from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger


def run_dir(trainer: Trainer) -> Path:
    """A directory of this run alone, beside its checkpoints, as its logger names it; valid on the first rank only."""
    logger = trainer.logger
    if isinstance(logger, WandbLogger):
        return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), str(logger.version))
    return Path(getattr(logger, "log_dir", None) or trainer.default_root_dir)
