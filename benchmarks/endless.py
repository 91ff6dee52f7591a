"""Responses of full length, for measurements in which all sides do the same."""

import lightning

from mifo_lightning.policy.ending import set_ends

NEVER = {-1}  # no token; an empty set would be the tokenizer's own end


class Endless(lightning.Callback):
    """No token ends a response, from where demonstrations, which do end in one, have been read."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """They have."""
        set_ends(pl_module.tokenizer, NEVER)  # type: ignore[arg-type]  # a MifoModule's
