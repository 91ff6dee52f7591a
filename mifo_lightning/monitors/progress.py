"""A progress bar that names the phase."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mifo_callbacks import BufferPhaseSwitch


class PhaseProgress(ProgressBar):
    """Shows phase, RL step, reward, buffer fill, SFT phases and the time left; plain lines where there is no terminal.

    Args:
        lines: Where there is no terminal: how many lines to print over the whole run.
    """

    def __init__(self, lines: int = 12) -> None:
        super().__init__()
        self.lines = lines
        self._console = Console()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed = 0
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        if self._enabled and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("", total=1.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show where the run is."""
        if not self._enabled:
            return
        share = progress_share(trainer)
        text = describe(trainer, pl_module, batch)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text, completed=share)
        elif share * self.lines >= self._printed + 1:
            self._printed = int(share * self.lines)
            self._console.print(f"{share:4.0%}  {text}", highlight=False)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()


def progress_share(trainer: Trainer) -> float:
    """Share of the run that is done, by RL steps or, without a number of them, by optimizer steps; 0 if unbounded."""
    loader: Any = trainer.train_dataloader
    shares = [loader.share_done] if loader.share_done is not None else []
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    return min(1.0, max(shares, default=0.0))


def describe(trainer: Trainer, pl_module: LightningModule, batch: Any) -> str:
    """One line: phase, its number, reward, buffer and SFT phases so far."""
    name = "RL step" if batch["phase"] == "rl" else "SFT phase"
    parts = [f"{name} {batch['rollout'] + 1}"]
    reward = getattr(pl_module, "last_reward", None)
    if reward is not None:
        parts.append(f"reward {reward:.2f}")
    switches = [c for c in trainer.callbacks if isinstance(c, BufferPhaseSwitch)]  # type: ignore[attr-defined]
    parts += [f"buffer {len(c.buffer)}/{c.size}  SFT phases {c.switches}" for c in switches]
    return "  ".join(parts)
