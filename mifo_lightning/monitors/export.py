"""The final model as a Hugging Face directory."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from mifo_lightning.common.errors import InputError
from mifo_lightning.monitors.run_dir import keep_earlier, run_dir
from mifo_lightning.policy.loading import dtype_name, export_model, locate, stored_dtype


class ExportModel(Callback):
    """Writes the model and its tokenizer where `AutoModelForCausalLM.from_pretrained` loads them, when training ends.

    The tokenizer keeps the chat template that prompts were built with; `data.prompts.system_prompt` stands in it for
    conversations that bring no system message. A template that prints the date prints that of the day it is used.

    Weights are trained in float32. With dtype `loaded` they are written as the model came: where that is bfloat16, what
    training has learned is rounded to 8 significant bits, which takes small updates back; a line says so. `float32`
    keeps every bit. A trial (`trainer.fast_dev_run`) writes nothing.

    Args:
        directory: Where to write; null takes `model` in the run's directory.
        dtype: Of the written weights: loaded, as the configuration of the input model names it, or float32.

    Raises:
        InputError: Before training, if another run has left something there, or if the input model lies there.
    """

    def __init__(self, directory: str | None = None, dtype: Literal["loaded", "float32"] = "loaded") -> None:
        self.directory, self.dtype = directory, dtype
        self.written: Path | None = None

    def check_free(self, trainer: Trainer, pl_module: Any, start: Any) -> None:
        """Raise an InputError if the directory is another's; `start` is the checkpoint to go on from."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        place = self._place(trainer)
        if place.resolve() == Path(locate(pl_module.model_name)).resolve():
            raise InputError(f"export.directory: {place} is the input model, which is not written over")
        if place != self.written:
            keep_earlier(trainer, place, "export.directory", start)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever is in the directory stays as it is."""
        self.check_free(trainer, pl_module, trainer.ckpt_path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        whole = self.dtype == "float32"
        dtype = torch.float32 if whole else stored_dtype(module.model_name, module.loading.trust_remote_code)
        self.written = self._place(trainer)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        template = data.kept_template() if hasattr(data, "kept_template") else None
        export_model(module.policy, module.tokenizer, self.written, trainer.is_global_zero, dtype, template)
        if dtype != torch.float32:
            rank_zero_only(print)(
                f"export: the trained weights are rounded to {dtype_name(dtype)}, as the model came; "
                "--export.dtype float32 keeps them whole"
            )

    def _place(self, trainer: Trainer) -> Path:
        return Path(self.directory) if self.directory else run_dir(trainer) / "model"
