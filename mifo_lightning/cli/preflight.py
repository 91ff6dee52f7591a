"""Check first, log then: what can be refused is refused before a logger writes or an evaluation runs."""

from typing import Literal

from lightning import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from mifo_callbacks import BufferPhaseSwitch, GradientDropping
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.module import MifoModule
from mifo_lightning.steps.guards import check_trainer


def check_run(
    trainer: Trainer, module: MifoModule, data: QuestionData, stage: Literal["fit", "validate", "test"]
) -> None:
    """Read the data, load the model and refuse what does not fit together; the run keeps both as they are here.

    What only a run can tell stays for later: a reward that refuses every response, an engine under sharded weights.

    Raises:
        InputError: Model, data, schedule, lengths, demonstrations or a callback is not allowed.
    """
    module.trainer = data.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]  # where callbacks look for it
    trainer.strategy.connect(module)
    check_trainer(trainer)
    data.setup(stage)
    with (
        trainer.strategy.tensor_init_context(),
        trainer.strategy.model_sharded_context(),
        trainer.precision_plugin.module_init_context(),
    ):
        module.load()
    loaders = data.test_dataloader() if stage == "test" else data.val_dataloader()
    train = data.train_dataloader() if stage == "fit" else None
    # the engine is compared with the weights where and as they will be
    here = not isinstance(trainer.strategy, ModelParallelStrategy)
    engine = here and module.policy is not None and module.policy.device == trainer.strategy.root_device
    module.check_questions(loaders, True, engine)
    if train is not None:
        check_controls(trainer, module, data)
        module.check_questions(train, False, engine)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "preflight"):
                callback.preflight(trainer, loaders)


def check_controls(trainer: Trainer, module: MifoModule, data: QuestionData) -> None:
    """Refuse a control of SFT in a run without SFT: it would be its own reference, without a word.

    Raises:
        InputError: Such a control is set; the line names it.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    phases = any(isinstance(callback, BufferPhaseSwitch) for callback in callbacks)
    if phases or data.schedule.sft_before or data.schedule.sft_after:
        return
    dropped = any(isinstance(callback, GradientDropping) and callback.during == "sft" for callback in callbacks)
    factor, damaged = module.optimizer_settings.sft.lr_factor, data.demonstrations.damaged_share
    controls = {
        "drop.during: sft": dropped,
        f"model.optimizer.sft.lr_factor: {factor}": factor != 1,
        f"data.demonstrations.damaged_share: {damaged}": damaged > 0 and not module.needs_demonstrations,
    }
    for control, given in controls.items():
        if given:
            raise InputError(
                f"{control} changes nothing in a run without SFT (buffer is null, sft_before and sft_after are 0); lay "
                "it over a method that learns from demonstrations, such as --config methods/mifo"
            )
