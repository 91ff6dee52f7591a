"""What MifoModule refuses: settings of the Trainer under which a run would be silently wrong, and broken numbers."""

from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor

from mifo_callbacks.sharding import require_data_parallel
from mifo_lightning.distributed import sum_ranks
from mifo_lightning.errors import InputError, TrainingError
from mifo_lightning.loader import WorkItem

FORMAT = 3  # of what MifoModule, its loader and its callbacks put into a checkpoint
PRECISIONS = ("32-true", "bf16-mixed")  # 16-mixed: a fused AdamW unscales after clipping, so the clip would be wrong


def check_trainer(trainer: Trainer) -> None:
    """Raise an InputError for half-precision weights, a second gradient clip, or a limit that cuts a step."""
    require_data_parallel(trainer, "MifoModule")
    if trainer.precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision: {trainer.precision} is not allowed; it must be one of {', '.join(PRECISIONS)}: master "
            f"weights and measured updates are fp32"
        )
    if trainer.gradient_clip_val:
        raise InputError(
            f"trainer.gradient_clip_val: {trainer.gradient_clip_val} is not allowed; set model.rl.clip and "
            "model.sft.clip"
        )
    limit, micro = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if isinstance(limit, int) and limit % micro:
        raise InputError(f"trainer.limit_train_batches: {limit} is not a multiple of accumulate_grad_batches = {micro}")


def check_format(checkpoint: dict[str, Any]) -> None:
    """Raise an InputError if a checkpoint to go on from is not one of this version's runs."""
    found = checkpoint.get("mifo", {}).get("format")
    if found != FORMAT:
        raise InputError(
            f"ckpt_path: its format is {found}, this version of mifo_lightning reads {FORMAT}: a run is resumed by the "
            "version that began it"
        )


def check_resume(trainer: Trainer) -> None:
    """Raise an InputError if the checkpoint was written inside an optimizer step: accumulated gradients are in none."""
    position = getattr(trainer.train_dataloader, "position", {})
    if position.get("micro"):
        raise InputError(
            "ckpt_path: written between two micro-batches of one optimizer step, whose gradient it does not hold; take "
            "another, such as last.ckpt"
        )


def check_alignment(trainer: Trainer, batch: WorkItem, batch_idx: int) -> None:
    """Raise an InputError if Lightning would step on another micro-batch than the loader's last one."""
    micro = trainer.accumulate_grad_batches
    if batch_idx % micro != batch["micro"] or micro != batch["micro_batches"]:
        raise InputError(
            f"trainer.accumulate_grad_batches: {micro} at batch {batch_idx} is out of step with the loader, which is "
            f"at micro-batch {batch['micro'] + 1} of {batch['micro_batches']}; keep it the same for a whole run"
        )


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
            raise TrainingError(
                f"{what}; the run stops and the last checkpoint stays; a smaller learning rate may help"
            )
        self.skipped += 1
        rank_zero_warn(f"{what}; this optimizer step is skipped, a second one in a row stops the run")
        return True

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
        raise TrainingError(
            f"{where}: weights of {int(bad)} tensors are not finite any more; the run stops and the last checkpoint "
            "stays; a smaller learning rate may help"
        )
