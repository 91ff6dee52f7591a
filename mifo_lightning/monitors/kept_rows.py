"""Rows that a run goes on with: those from before its checkpoint, none of them twice."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from mifo_lightning.common.files import replace_text
from mifo_lightning.monitors.run_dir import goes_on_here, run_of

METRICS = ExperimentWriter.NAME_METRICS_FILE


def samples_before(text: str, step: int) -> str:
    """Those lines of `samples.jsonl` that a run which goes on from optimizer step `step` will not write again."""
    kept = []
    for line in text.split("\n")[:-1]:  # what follows the last end of line was cut off; responses hold other separators
        row = json.loads(line)
        # a checkpoint comes after the step's rollout and before an evaluation at that step
        if row["step"] < step or (row["step"] == step and row["stage"] == "rl"):
            kept.append(line + "\n")
    return "".join(kept)


def metrics_before(text: str, step: int) -> str:
    """Those rows of `metrics.csv` that a run which goes on from optimizer step `step` will not log again."""
    whole = text[: text.rfind("\n") + 1]  # a row may be cut off
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    kept = io.StringIO(newline="")
    writer = csv.DictWriter(kept, fieldnames=rows.fieldnames or [])
    writer.writeheader()
    writer.writerows(row for row in rows if int(row["step"]) < step)
    return kept.getvalue()


def carry(trainer: Trainer, target: Path, start: Path, keep: Callable[[str, int], str], step: int) -> None:
    """Make `target` hold what `keep` leaves of the same file of the run that goes on; it is never there by half.

    Args:
        trainer: Of the run; it may go on in a directory of its own.
        target: The file, in the directory where the run goes on.
        start: The checkpoint that it goes on from.
        keep: As `samples_before`.
        step: Optimizer steps that were done.
    """
    source = target if goes_on_here(trainer, target.parent, start) else run_of(start) / target.name
    if source.is_file():
        with open(source, encoding="utf-8", newline="") as file:
            text = keep(file.read(), step)
        replace_text(target, text)


class KeptRows(ExperimentWriter):
    """Lightning's writer of `metrics.csv`, without removing the file that is there."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        if os.path.isfile(self.metrics_file_path):
            with open(self.metrics_file_path, encoding="utf-8", newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def _check_log_dir_exists(self) -> None:
        """Lightning would remove it here."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """As Lightning, but a process that is killed meanwhile loses no row."""
        path, text = Path(self.metrics_file_path), io.StringIO(newline="")
        with open(path, encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(text, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(csv.DictReader(file))
        replace_text(path, text.getvalue())


def keep_rows(logger: CSVLogger) -> None:
    """Let a logger add to the file that lies in its directory."""
    logger._experiment = KeptRows(logger.log_dir)
