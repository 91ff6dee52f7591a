"""A progress bar that names the phase."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.common.errors import require
from mifo_lightning.rollout.engine import Decoded, Listener

TICK = 0.5  # seconds between two updates of the bar while a rollout lasts


class PhaseProgress(ProgressBar):
    """Shows phase, RL step, reward, buffer fill, SFT phases and the time left; plain lines where there is no terminal.

    A rollout or an evaluation that lasts shows its responses, tokens and tokens per second, if the engine tells
    (`RolloutEngine`): at once in the bar, and as a line every `seconds` where there is none.

    Args:
        lines: Where there is no terminal: how many lines to print over the whole run.
        seconds: Where there is no terminal: seconds between two lines of one rollout or evaluation.

    Raises:
        InputError: If `lines` is below 1 or `seconds` not above 0.
    """

    def __init__(self, lines: int = 12, seconds: float = 30.0) -> None:
        super().__init__()
        require("progress.lines", lines, lines >= 1, "at least 1")
        require("progress.seconds", seconds, seconds > 0, "above 0")
        self.lines, self.seconds = lines, seconds
        self._console = Console()
        self._progress: Progress | None = None
        self._printed = 0
        self._enabled = True
        self._decoding = DecodingView("rollout")
        self._own_bar = False  # whether an evaluation opened the bar
        self._shown = 0.0  # when a line about decoding was last due

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to the engine."""
        super().setup(trainer, pl_module, stage)
        if self._enabled:
            _listen(pl_module, self._hear)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the engine."""
        if self._enabled:
            _listen(pl_module, None)

    def _hear(self, far: Decoded) -> None:
        now = time.perf_counter()
        if self._decoding.hear(far, now):
            self._shown = now
        if now - self._shown > (self.seconds if self._progress is None else TICK):
            self._shown = now
            text = self._decoding.text(now)
            if not self._update(description=text):
                self._console.print(f"      {text}", highlight=False, soft_wrap=True)

    def _open(self, total: float) -> None:
        if self._enabled and self._console.is_terminal and self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._progress.start()
            self._progress.add_task("", total=total)

    def _update(self, **changes: Any) -> bool:
        """Change the bar; whether one is open."""
        if self._progress is None:
            return False
        self._progress.update(self._progress.task_ids[0], **changes)
        return True

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        self._open(1.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show where the run is."""
        if not self._enabled:
            return
        share = progress_share(trainer)
        text = describe(trainer, pl_module, batch)
        if not self._update(description=text, completed=share) and share * self.lines >= self._printed + 1:
            self._printed = int(share * self.lines)
            self._console.print(f"{share:4.0%}  {text}", highlight=False, soft_wrap=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar, unless that of training is open."""
        batches = sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
        self._decoding = DecodingView("evaluation", batches)
        self._shown = time.perf_counter()
        self._own_bar = self._progress is None  # amid training its bar is open
        self._open(batches)

    def on_validation_batch_end(self, trainer: Trainer, *rest: Any, **named: Any) -> None:
        """Count it."""
        self._decoding.batches += 1
        if self._own_bar:
            self._update(completed=self._decoding.batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar, unless it is that of training."""
        self._decoding = DecodingView("rollout")
        if self._own_bar:
            self._close()

    on_test_start, on_test_batch_end, on_test_end = on_validation_start, on_validation_batch_end, on_validation_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()


class DecodingView:
    """What a rollout, one call of the engine, or an evaluation, all calls together, says of itself.

    Args:
        name: Of the activity.
        of: Batches of the evaluation; None for rollouts, each of which begins anew.
    """

    def __init__(self, name: str, of: float | None = None) -> None:
        self.name, self.of = name, of
        self.batches = 0
        self._far = Decoded(0, 0, 0, 0, 0)
        self._began, self._tokens = time.perf_counter(), 0  # of this activity, before the present call

    def hear(self, far: Decoded, now: float) -> bool:
        """Take note; whether a new activity begins with it."""
        begins = far.tokens == 0 and self.of is None
        if begins:
            self._began, self._tokens = now, 0
        elif far.tokens == 0:
            self._tokens += self._far.tokens
        self._far = far
        return begins

    def text(self, now: float) -> str:
        """One line: batches, responses, tokens of the longest one, tokens per second of this process."""
        far = self._far
        speed = (self._tokens + far.tokens) / max(now - self._began, 1e-9)
        batches = "" if self.of is None else f" batch {self.batches + 1} of {self.of:g},"
        return (
            f"{self.name}:{batches} {far.responses} of {far.asked} responses, token {far.step} of at most {far.limit}, "
            f"{speed:.0f} tokens/s"
        )


def _listen(pl_module: Any, listener: Listener | None) -> None:
    engine = getattr(getattr(pl_module, "responder", None), "engine", None)
    if engine is not None and hasattr(engine, "listener"):
        engine.listener = listener


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
