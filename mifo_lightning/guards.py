"""What MifoModule refuses: settings of the Trainer under which a run would be silently wrong."""

from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mifo_callbacks.sharding import require_data_parallel
from mifo_lightning.errors import InputError
from mifo_lightning.loader import WorkItem

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


def check_resume(trainer: Trainer) -> None:
    """Raise an InputError if the checkpoint was written inside an optimizer step: accumulated gradients are in none."""
    position = getattr(trainer.train_dataloader, "position", {})
    if position.get("micro"):
        raise InputError(
            "ckpt_path: written between two micro-batches of one optimizer step, whose gradient it does not hold; take "
            "another, such as last.ckpt"
        )


def check_ends(ends: list[int], before: list[int] | None) -> None:
    """Say once that a resumed run ends responses with other tokens than the checkpoint's; None: it names none."""
    if before is not None and before != ends:
        rank_zero_warn(
            f"ckpt_path: tokens {before} ended responses when the checkpoint was written, {ends} do now; "
            "set eos_token_id in the model's generation_config.json if that is not meant"
        )


def check_alignment(trainer: Trainer, batch: WorkItem, batch_idx: int) -> None:
    """Raise an InputError if Lightning would step on another micro-batch than the loader's last one."""
    micro = trainer.accumulate_grad_batches
    if batch_idx % micro != batch["micro"] or micro != batch["micro_batches"]:
        raise InputError(
            f"trainer.accumulate_grad_batches: {micro} at batch {batch_idx} is out of step with the loader, which is "
            f"at micro-batch {batch['micro'] + 1} of {batch['micro_batches']}; keep it the same for a whole run"
        )
