"""The final model as a Hugging Face directory."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from mifo_lightning.models import export_model
from mifo_lightning.monitors.run_dir import run_dir


class ExportModel(Callback):
    """Writes the model and its tokenizer where `AutoModelForCausalLM.from_pretrained` loads them, when training ends.

    Args:
        directory: Where to write; null takes `model` in the run's directory.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self.written: Path | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        directory = Path(self.directory) if self.directory else run_dir(trainer) / "model"
        export_model(pl_module.policy, pl_module.tokenizer, directory, write=trainer.is_global_zero)  # type: ignore[arg-type]
        self.written = directory
