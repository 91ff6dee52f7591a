"""How much of which phase, in which order."""

from dataclasses import dataclass

from mifo_lightning.errors import InputError


@dataclass
class Schedule:
    """How much of which phase, in which order.

    Args:
        rl_steps: RL steps, each one rollout of `rl_questions` questions with all its updates; null goes on until the
            Trainer stops.
        rl_questions: Questions per rollout, over all ranks.
        passes: Passes over each rollout; 1 is on-policy.
        minibatches: Optimizer steps that one pass is divided into.
        sft_batch: Demonstrations per SFT optimizer step, over all ranks.
        sft_epochs: Passes over the demonstrations of an SFT phase.
        sft_before: SFT optimizer steps on all demonstrations before the first RL step.
        sft_after: SFT optimizer steps on all demonstrations after the last RL step.
    """

    rl_steps: int | None = None
    rl_questions: int = 32
    passes: int = 1
    minibatches: int = 1
    sft_batch: int = 64
    sft_epochs: int = 1
    sft_before: int = 0
    sft_after: int = 0

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.passes * self.minibatches

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        least = dict.fromkeys(("rl_questions", "passes", "minibatches", "sft_batch", "sft_epochs"), 1)
        for name, low in {**least, "rl_steps": 0, "sft_before": 0, "sft_after": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{key}.{name}: {value} is not allowed; it must be at least {low}")
        if self.rl_steps is None and self.sft_after:
            raise InputError(f"{key}.sft_after: {self.sft_after} never comes, since {key}.rl_steps is null")
        if self.rl_steps == 0 and not self.sft_before and not self.sft_after:
            raise InputError(f"{key}.rl_steps: 0, with no SFT steps either, leaves nothing to train")
