"""What MifoModule refuses: settings of the Trainer under which a run would be silently wrong."""

from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

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
    check_flags(trainer)
    limit, micro = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if isinstance(limit, int) and limit % micro:
        name = "fast_dev_run" if trainer.fast_dev_run else "limit_train_batches"  # type: ignore[attr-defined]
        raise InputError(f"trainer.{name}: {limit} is not a multiple of accumulate_grad_batches = {micro}")


def check_flags(trainer: Trainer) -> None:
    """Raise an InputError for flags that do nothing or never end: a run's number of batches is not known before."""
    if trainer.min_steps:
        raise InputError(f"trainer.min_steps: {trainer.min_steps} is not allowed; data.schedule says when a run ends")
    for name in ("limit_train_batches", "val_check_interval"):
        value = getattr(trainer, name)
        if isinstance(value, float) and value not in (0.0, 1.0):
            raise InputError(
                f"trainer.{name}: {value} is not allowed; how many batches data.schedule makes is not known before: "
                "give a whole number of micro-batches"
            )
    if any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise InputError(
            "trainer.callbacks: LearningRateMonitor is not allowed; it reads the rate of the step before, which may be "
            "of the other phase; rl/lr and sft/lr are logged without it"
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
