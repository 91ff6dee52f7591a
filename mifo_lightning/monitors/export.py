"""The model as a Hugging Face directory: the final one, and those of given steps on the way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from mifo_callbacks.ownership import claim
from mifo_lightning.common.errors import InputError, require
from mifo_lightning.monitors.run_dir import keep_earlier, run_dir
from mifo_lightning.policy.loading import dtype_name, export_model, locate, stored_dtype


class ExportModel(Callback):
    """Writes the model and its tokenizer where `AutoModelForCausalLM.from_pretrained` loads them, when training ends.

    With `steps` it also writes the model as it is after so many optimizer steps, RL's and SFT's counted together, 0
    before the first, to `model-<step>` beside `model`: the curve of a run, whose checkpoints are no models.

    The tokenizer keeps the chat template that prompts were built with; `data.prompts.system_prompt` stands in it for
    conversations that bring no system message. A template that prints the date prints that of the day it is used.

    Weights are trained in float32. With dtype `loaded` they are written as the model came: where that is bfloat16, what
    training has learned is rounded to 8 significant bits, which takes small updates back; a line says so. `float32`
    keeps every bit. A trial (`trainer.fast_dev_run`) writes nothing.

    Args:
        directory: Where to write; null takes `model` in the run's directory.
        dtype: Of the written weights: loaded, as the configuration of the input model names it, or float32.
        steps: Optimizer steps after which the model is written as well; none by default.

    Raises:
        InputError: If a step is below 0, or, before training, if another run has left something there, or if the
            input model lies there.
    """

    def __init__(
        self,
        directory: str | None = None,
        dtype: Literal["loaded", "float32"] = "loaded",
        steps: Sequence[int] = (),
    ) -> None:
        whole = isinstance(steps, list | tuple) and all(isinstance(step, int) and step >= 0 for step in steps)
        require("export.steps", repr(steps), whole, "a list of whole numbers, 0 or more")
        require("export.dtype", dtype, dtype in ("loaded", "float32"), "loaded or float32")
        self.directory, self.dtype, self.steps = directory, dtype, sorted(set(steps))
        self.written: Path | None = None

    def check_free(self, trainer: Trainer, pl_module: Any, start: Any) -> None:
        """Raise an InputError if the directory is another's; `start` is the checkpoint to go on from."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        place, source = self._place(trainer), Path(locate(pl_module.model_name)).resolve()
        for directory in (place, *(_of_step(place, step) for step in self.steps)):
            if directory.resolve() == source:
                raise InputError(f"export.directory: {directory} is the input model, which is not written over")
            if place != self.written:
                keep_earlier(trainer, directory, "export.directory", start)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever is in the directory stays as it is; the model before the first step, where it is asked for."""
        if trainer.ckpt_path is None:
            claim(self, pl_module)
        self.check_free(trainer, pl_module, trainer.ckpt_path)
        if trainer.global_step == 0:
            self._write_step(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The model after this step, where it is asked for; the checkpoint of the step comes after it."""
        self._write_step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if late := [step for step in self.steps if step > trainer.global_step]:
            rank_zero_warn(f"export.steps: {late} were not reached; training ended after step {trainer.global_step}")
        self.written = self._place(trainer)
        dtype = self._write(trainer, pl_module, self.written)
        if dtype != torch.float32:
            rank_zero_only(print)(
                f"export: the trained weights are rounded to {dtype_name(dtype)}, as the model came; "
                "--export.dtype float32 keeps them whole"
            )

    def _write_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step in self.steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer, pl_module, _of_step(self._place(trainer), trainer.global_step))

    def _write(self, trainer: Trainer, pl_module: LightningModule, place: Path) -> torch.dtype:
        """Write the model as it is; the dtype it is written in."""
        module: Any = pl_module
        whole = self.dtype == "float32"
        dtype = torch.float32 if whole else stored_dtype(module.model_name, module.loading.trust_remote_code)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        template = data.kept_template() if hasattr(data, "kept_template") else None
        export_model(module.policy, module.tokenizer, place, trainer.is_global_zero, dtype, template)
        return dtype

    def _place(self, trainer: Trainer) -> Path:
        return Path(self.directory) if self.directory else run_dir(trainer) / "model"


def _of_step(place: Path, step: int) -> Path:
    """Where the model of a step goes."""
    return place.with_name(f"{place.name}-{step}")
