"""What MifoModule refuses: settings of the Trainer under which a run would be silently wrong."""

from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedConfig

from mifo_callbacks.sharding import require_data_parallel
from mifo_lightning.data.question import Question
from mifo_lightning.errors import InputError
from mifo_lightning.loader import WorkItem
from mifo_lightning.models import positions

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


def check_lengths(config: PreTrainedConfig, questions: list[Question], key: str, max_new_tokens: int) -> None:
    """Refuse sequences beyond the model's positions; warn where demonstrations are longer than responses may be.

    Args:
        config: The model's.
        questions: All that are to be answered.
        key: Names the sampling settings.
        max_new_tokens: The longest response in tokens.

    Raises:
        InputError: If a prompt with its longest response, or with its demonstration, does not fit.
    """
    limit = positions(config)
    prompt = max((len(q.prompt) for q in questions), default=0)
    whole = max((len(q.prompt) + len(q.demonstration or []) for q in questions), default=0)
    if limit is not None and prompt + max_new_tokens > limit:
        raise InputError(
            f"{key}.max_new_tokens: {max_new_tokens} after the longest prompt of {prompt} tokens makes "
            f"{prompt + max_new_tokens}, and the model has {limit} positions; lower it or data.max_prompt_tokens, or "
            "take a model with a longer context"
        )
    if limit is not None and whole > limit:
        raise InputError(
            f"data.max_response_tokens: a prompt with its demonstration has {whole} tokens, and the model has {limit} "
            "positions; lower it or data.max_prompt_tokens, or take a model with a longer context"
        )
    longest = max((len(q.demonstration or []) for q in questions), default=0)
    if longest > max_new_tokens:
        rank_zero_warn(
            f"data.max_response_tokens: demonstrations have up to {longest} tokens and {key}.max_new_tokens is "
            f"{max_new_tokens}: what is learned from the longer ones is cut off in a rollout and counts as wrong; make "
            "them equal"
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
