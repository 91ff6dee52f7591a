"""How much of which phase, in which order."""

from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

from mifo_lightning.common.errors import InputError, require, require_choices


@dataclass
class Schedule:
    """How much of which phase, in which order.

    Args:
        rl_steps: RL steps, each one rollout of `prompts_per_step` questions with all its updates; null goes on until
            the Trainer stops.
        prompts_per_step: Questions per rollout, over all ranks.
        epochs_per_rollout: Passes over each rollout; 1 is on-policy.
        minibatches: Optimizer steps that one pass is divided into.
        sft_batch: Demonstrations per SFT optimizer step, over all ranks.
        sft_epochs: Passes over the demonstrations of an SFT phase.
        sft_before: SFT optimizer steps on all demonstrations before the first RL step.
        sft_after: SFT optimizer steps on all demonstrations after the last RL step.
        final_sft: Whether to keep or drop a buffer-triggered SFT phase that none of the `rl_steps` follows; the same in
            all arms of a comparison that have a buffer.
        fit_sizes: Whether `prompts_per_step`, `sft_batch`, the buffer's size and `data.holdout` are made smaller where
            the data cannot fill them, each with a warning; otherwise they are refused.
    """

    rl_steps: int | None = None
    prompts_per_step: int = 32
    epochs_per_rollout: int = 1
    minibatches: int = 1
    sft_batch: int = 64
    sft_epochs: int = 1
    sft_before: int = 0
    sft_after: int = 0
    final_sft: Literal["keep", "drop"] = "keep"
    fit_sizes: bool = True

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.epochs_per_rollout * self.minibatches

    def sft_phase_steps(self, phase_size: int | None) -> dict[str, int]:
        """Optimizer steps of each kind of SFT phase that may come, by the keys that decide.

        Args:
            phase_size: Demonstrations that a buffer pushes for one phase; None if there is none.
        """
        pushed = (phase_size or 0) * self.sft_epochs // self.sft_batch
        key = "data.schedule."
        steps = {
            f"{key}sft_before": self.sft_before,
            f"buffer.size x {key}sft_epochs / {key}sft_batch": pushed,
            f"{key}sft_after": self.sft_after,
        }
        return {name: n for name, n in steps.items() if n}

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        require_choices(key, self)
        least = dict.fromkeys(("prompts_per_step", "epochs_per_rollout", "minibatches", "sft_batch", "sft_epochs"), 1)
        for name, low in {**least, "rl_steps": 0, "sft_before": 0, "sft_after": 0}.items():
            value = getattr(self, name)
            require(f"{key}.{name}", value, value is None or value >= low, f"at least {low}")
        if self.rl_steps is None and self.sft_after:
            raise InputError(f"{key}.sft_after: {self.sft_after} never comes, since {key}.rl_steps is null")
        if self.rl_steps is None and self.final_sft == "drop":
            raise InputError(
                f"{key}.final_sft: drop needs {key}.rl_steps: with null no RL step is known to be the last"
            )
        if self.rl_steps == 0 and not self.sft_before and not self.sft_after:
            raise InputError(f"{key}.rl_steps: 0, with no SFT steps either, leaves nothing to train")

    def fit_rl(self, questions: int, ranks: int) -> "Schedule":
        """With as many of too few `questions` as can be cut into ranks and minibatches, if any can."""
        if self.prompts_per_step <= questions:
            return self
        parts = ranks * self.minibatches
        return replace(self, prompts_per_step=questions // parts * parts or self.prompts_per_step)

    def fit_sft(self, demonstrated: int, phase_size: int | None, ranks: int) -> tuple["Schedule", int | None]:
        """With sizes that too few demonstrations can fill and that divide, if there are any; and the size of a phase.

        A phase on fewer demonstrations keeps its number of optimizer steps: its batches become smaller with it. One
        that holds no whole batch gets a step an epoch. What its batches leave over of a phase waits.

        Args:
            demonstrated: Questions that have a demonstration.
            phase_size: Demonstrations that a buffer pushes for one phase; None if there is none.
            ranks: Data-parallel processes.
        """
        batch, size = self.sft_batch, phase_size
        if batch % ranks:
            return self, phase_size
        if self.sft_before or self.sft_after:
            batch = min(batch, demonstrated)
        if size is None:
            batch -= batch % ranks
            return (replace(self, sft_batch=batch) if batch else self), None
        if size <= demonstrated:  # S is the method's: what the data can fill stays, or is refused if it does not divide
            batch = batch if batch <= size * self.sft_epochs else size
            return (self if batch % ranks or size * self.sft_epochs % batch else replace(self, sft_batch=batch)), size
        steps = size * self.sft_epochs // batch or self.sft_epochs
        size = demonstrated
        batch = max(ranks, min(batch, size * self.sft_epochs // steps))
        cut = ((b, size - size % (b // gcd(b, self.sft_epochs))) for b in range(batch - batch % ranks, 0, -ranks))
        batch, size = next(((b, s) for b, s in cut if s), (self.sft_batch, phase_size))
        return replace(self, sft_batch=batch), size

    def check_rl(self, questions: int, ranks: int) -> None:
        """Raise an InputError if a rollout cannot be drawn, or cut into ranks and minibatches."""
        parts = ranks * self.minibatches
        if self.prompts_per_step % parts:
            raise InputError(
                f"data.schedule.prompts_per_step: {self.prompts_per_step} does not divide by {parts} "
                f"({ranks} ranks x {self.minibatches} minibatches)"
            )
        if self.prompts_per_step > questions:
            raise InputError(
                f"data.schedule.prompts_per_step: {self.prompts_per_step} is more than the {questions} questions that "
                f"are left after filters"
            )

    def check_sft(self, demonstrated: int, phase_size: int | None, ranks: int) -> None:
        """Raise an InputError if demonstrations are too few, or SFT cannot be cut into ranks."""
        if self.sft_batch % ranks:
            raise InputError(f"data.schedule.sft_batch: {self.sft_batch} does not divide by {ranks} ranks")
        hint = ""
        if not demonstrated:
            hint = "; data.columns.target names their column, and plain RL, a base without a method, needs none"
        if (self.sft_before or self.sft_after) and demonstrated < self.sft_batch:
            raise InputError(
                f"data.schedule.sft_batch: {self.sft_batch} is more than the {demonstrated} questions that have a "
                f"demonstration{hint}"
            )
        if phase_size is not None:
            if demonstrated < phase_size:
                raise InputError(
                    f"buffer.size: {phase_size} is more than the {demonstrated} training questions that have a "
                    f"demonstration; the buffer could never fill{hint}"
                )
            self.check_phase(phase_size)

    def check_phase(self, size: int) -> None:
        """Raise an InputError unless a buffer-triggered phase of `size` demonstrations is cut into whole batches."""
        if not size or size * self.sft_epochs % self.sft_batch:
            raise InputError(
                f"data.schedule.sft_batch: {self.sft_batch} does not divide an SFT phase of {size} demonstrations x "
                f"{self.sft_epochs} epochs (buffer.size x data.schedule.sft_epochs)"
            )
