"""Numbers that are not finite: one optimizer step is skipped, then the run stops before anything broken is saved."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor

from mifo_callbacks.collectives import sum_ranks
from mifo_lightning.common.errors import TrainingError

STOPS = "the run stops and writes no more, what it wrote before stays; a smaller learning rate may help"


class FiniteSteps:
    """Decides what happens to an optimizer step with a number that is not finite.

    One such step is skipped and counted; the second in a row stops the run, and so does a rollout whose own
    log-probabilities are not finite: then not the step but the weights are broken.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._in_a_row = 0

    def skips(self, where: str, broken: list[str]) -> bool:
        """Whether the step must be skipped; call it once per optimizer step.

        Args:
            where: The optimizer step, for the message.
            broken: Names of its metrics that are not finite, the same on every rank.

        Raises:
            TrainingError: It is the second in a row, or the policy cannot score its own rollout.
        """
        self._in_a_row = self._in_a_row + 1 if broken else 0
        if not broken:
            return False
        what = f"{where}: {', '.join(broken)} not finite"
        if self._in_a_row > 1 or "rollout/entropy" in broken:
            raise TrainingError(f"{what}; {STOPS}")
        self.skipped += 1
        rank_zero_warn(f"{what}; this optimizer step is skipped, a second one in a row stops the run")
        return True

    def begin(self) -> None:
        """Begin a training: what an earlier one ended in is not in a row with what comes."""
        self._in_a_row = 0

    def end(self) -> None:
        """Raise a TrainingError if the run's last optimizer step was skipped: whether it persists is not known."""
        if self._in_a_row:
            raise TrainingError(f"the last optimizer step was skipped, since its numbers were not finite; {STOPS}")

    def metrics(self) -> dict[str, float]:
        """`skipped_steps` so far; nothing before the first."""
        return {"skipped_steps": float(self.skipped)} if self.skipped else {}

    def state_dict(self) -> dict[str, int]:
        """How many steps were skipped, and how many of them came last."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]


def check_weights(model: nn.Module, where: str) -> None:
    """Raise a TrainingError if a weight is not finite; collective, so that every rank stops."""
    weights = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    # the largest magnitude of a tensor is finite exactly if all of it is
    largest = torch._foreach_norm([w.detach() for w in weights.values() if w.numel()], float("inf"))
    bad = sum_ranks([(~torch.stack(largest).isfinite()).sum()])[0]
    if bad:
        raise TrainingError(f"{where}: weights of {int(bad)} tensors are not finite any more; {STOPS}")
