"""What MifoModule refuses: settings of the Trainer under which a run would be silently wrong."""

from collections.abc import Collection
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedConfig

from mifo_callbacks import GradientFreezing
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.policy.adapter import Adapter
from mifo_lightning.policy.loading import positions
from mifo_lightning.steps.optimizer import OptimizerSettings

FORMAT = 4  # of what MifoModule, its loader and its callbacks put into a checkpoint
PRECISIONS = ("32-true", "bf16-mixed")  # 16-mixed: a fused AdamW unscales after clipping, so the clip would be wrong

REFUSED: dict[type[Callback], str] = {
    LearningRateMonitor: "it reads the rate of the step before, which may be of the other phase; rl/lr and sft/lr are "
    "logged without it",
    StochasticWeightAveraging: "it averages where epochs begin, and a run is one epoch: what it leaves is the model "
    "that training began with. EMAWeightAveraging goes by steps",
}
"""Callbacks of Lightning that would be wrong without a word, and why."""


def check_trainer(trainer: Trainer) -> None:
    """Raise an InputError for half-precision weights, a second gradient clip, or a step of several batches."""
    if trainer.precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision: {trainer.precision} is not allowed; it must be one of {', '.join(PRECISIONS)}: master "
            f"weights and measured updates are fp32"
        )
    if trainer.gradient_clip_val:
        raise InputError(
            f"trainer.gradient_clip_val: {trainer.gradient_clip_val} is not allowed; set model.optimizer.rl.clip and "
            "model.optimizer.sft.clip"
        )
    check_accumulation(trainer)
    check_flags(trainer)


def check_adapter(trainer: Trainer, adapter: Adapter | None) -> None:
    """Raise an InputError where freezing would go by the importance of an adapter that RL does not move."""
    if adapter is None or not adapter.per_phase:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientFreezing) and callback.rule is not None and callback.rule.needs_importance:
            raise InputError(
                "model.adapter.per_phase: true is not allowed with freezing by importance, as RL moves nothing that "
                "SFT trains; leave freeze out, or set per_phase to false"
            )


def check_accumulation(trainer: Trainer) -> None:
    """Raise an InputError if Lightning would step after several batches; a scheduler may say so at any epoch."""
    if (accumulate := trainer.accumulate_grad_batches) != 1:
        raise InputError(
            f"trainer.accumulate_grad_batches: {accumulate} is not allowed; a batch is a whole optimizer step: "
            "model.optimizer.micro_batches cuts it into parts"
        )


def check_chunks(trainer: Trainer, settings: OptimizerSettings) -> None:
    """Raise an InputError where DDP counts every backward of a step, those of chunks too."""
    name = "micro_batches" if settings.micro_batch_tokens is None else "micro_batch_tokens"
    value = getattr(settings, name)
    if value != 1 and getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
        raise InputError(
            f"model.optimizer.{name}: {value} is not allowed with DDPStrategy(static_graph=True), "
            "whose gradients would be wrong; leave static_graph out"
        )


def check_flags(trainer: Trainer) -> None:
    """Raise an InputError for flags that do nothing or never end: a run's number of batches is not known before."""
    if trainer.min_steps:
        raise InputError(f"trainer.min_steps: {trainer.min_steps} is not allowed; data.schedule says when a run ends")
    for name in ("limit_train_batches", "val_check_interval"):
        value = getattr(trainer, name)
        if isinstance(value, float) and value not in (0.0, 1.0):
            raise InputError(
                f"trainer.{name}: {value} is not allowed; how many batches data.schedule makes is not known before: "
                "give a whole number of optimizer steps"
            )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("val/") and trainer.val_check_interval == 1.0:
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} waits for {monitor} in vain; nothing is validated "
                "inside fit unless trainer.val_check_interval is a number of optimizer steps"
            )
        if why := next((why for kind, why in REFUSED.items() if isinstance(callback, kind)), None):
            raise InputError(f"trainer.callbacks: {type(callback).__name__} is not allowed; {why}")


def check_optimizer(trainer: Trainer) -> None:
    """Raise an InputError for a schedule or a group of parameters that the phases' own settings would write over."""
    groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
    if trainer.lr_scheduler_configs or groups != [1]:
        raise InputError(
            f"configure_optimizers: {len(groups)} optimizers with {sum(groups)} groups of parameters and "
            f"{len(trainer.lr_scheduler_configs)} schedulers are not allowed; it must be one with one group: its rate "
            "and decay are those of model.optimizer.rl and model.optimizer.sft in every step, schedules among them"
        )


def check_fp32(module: nn.Module) -> None:
    """Raise an InputError for a trained weight that is not fp32."""
    for name, weight in module.named_parameters():
        if weight.requires_grad and weight.dtype != torch.float32:
            raise InputError(
                f"{name}: its dtype is {weight.dtype}; it must be fp32 (module.float()) to be trained: fewer bits "
                "lose small steps"
            )


def check_hooks(module: nn.Module, missing: Collection[str]) -> None:
    """Raise an InputError if a step was made without the module's own hooks: a subclass has its own in their place."""
    if missing:
        raise InputError(
            f"{type(module).__name__}.{min(missing)}: MifoModule's own did not run in this step; one of a subclass "
            f"calls super().{min(missing)}(...)"
        )


def check_format(checkpoint: dict[str, Any]) -> None:
    """Raise an InputError if a checkpoint to go on from is not one of this version's runs."""
    own = checkpoint.get("mifo")
    found = own.get("format") if isinstance(own, dict) else None
    if found != FORMAT:
        raise InputError(
            f"ckpt_path: its format is {found}, this version of mifo_lightning reads {FORMAT}: a run is resumed by the "
            "version that began it"
        )


def own_rollout(rollouts: list[Any], rank: int, ranks: int) -> Any:
    """This rank's of the rollouts that a checkpoint holds, or None if it was written between two.

    Raises:
        InputError: It was written inside a rollout by another number of processes.
    """
    if not any(rollouts):
        return None
    if len(rollouts) != ranks:
        raise InputError(
            f"ckpt_path: the checkpoint was written in the middle of a rollout by {len(rollouts)} processes and cannot "
            f"be resumed by {ranks}"
        )
    return rollouts[rank]


def check_lengths(config: PreTrainedConfig, questions: list[Question], key: str, max_new_tokens: int) -> None:
    """Refuse sequences beyond the model's positions.

    Args:
        config: The model's.
        questions: All that are to be answered.
        key: Names the sampling settings.
        max_new_tokens: The longest response in tokens.

    Raises:
        InputError: If a prompt with its longest response, or with its demonstration, does not fit, or a teacher's with
            its longest response.
    """
    limit = positions(config)
    prompt = max((len(q.prompt) for q in questions), default=0)
    whole = max((len(q.prompt) + len(q.demonstration or []) for q in questions), default=0)
    if limit is not None and prompt + max_new_tokens > limit:
        raise InputError(
            f"{key}.max_new_tokens: {max_new_tokens} after the longest prompt of {prompt} tokens makes "
            f"{prompt + max_new_tokens}, and the model has {limit} positions; lower it or data.prompts.max_tokens, or "
            "take a model with a longer context"
        )
    if limit is not None and whole > limit:
        raise InputError(
            f"data.demonstrations.max_tokens: a prompt with its demonstration has {whole} tokens, and the model has "
            f"{limit} positions; lower it or data.prompts.max_tokens, or take a model with a longer context"
        )
    taught = max((len(q.teacher_prompt or []) for q in questions), default=0)
    if limit is not None and taught and taught + max_new_tokens > limit:
        raise InputError(
            f"model.sft_loss.distillation.template: a prompt with a demonstration in it has {taught} tokens, which "
            f"{max_new_tokens} of a response make {taught + max_new_tokens}, and the model has {limit} positions; "
            "shorten it, or lower data.demonstrations.max_tokens"
        )


def warn_of_long_demonstrations(questions: list[Question], max_new_tokens: int) -> None:
    """Warn where demonstrations that are learned from are longer than rollouts may be, in tokens."""
    longest = max((len(q.demonstration or []) for q in questions), default=0)
    if longest > max_new_tokens:
        rank_zero_warn(
            f"data.demonstrations.max_tokens: demonstrations have up to {longest} tokens and "
            f"model.rollout.sampling.max_new_tokens is {max_new_tokens}: what is learned from the longer ones is cut "
            "off in a rollout and counts as wrong; make them equal"
        )


def check_ends(ends: list[int], before: list[int] | None) -> None:
    """Say once that a resumed run ends responses with other tokens than the checkpoint's; None: it names none."""
    if before is not None and before != ends:
        rank_zero_warn(
            f"ckpt_path: tokens {before} ended responses when the checkpoint was written, {ends} do now; "
            "set eos_token_id in the model's generation_config.json if that is not meant"
        )


def warn_of_single_steps(trainer: Trainer, moments: str) -> None:
    """Warn if an SFT phase is one optimizer step of a fresh AdamW: whatever the gradient, that step is its sign."""
    steps: dict[str, int] = getattr(trainer.train_dataloader, "sft_phase_steps", {})
    single = [key for key, n in steps.items() if n == 1]
    if moments == "reset" and single:
        rank_zero_warn(
            f"an SFT phase is one optimizer step ({single[0]} = 1) with model.optimizer.moments reset: it moves every "
            "weight by the learning rate, whatever the size of its gradient, so that loss weights, denominators and "
            "clipping mean nothing; set several steps a phase (a smaller sft_batch), or model.optimizer.moments: keep"
        )
