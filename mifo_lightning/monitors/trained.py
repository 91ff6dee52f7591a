"""What monitors read of the module that is trained, beyond what every LightningModule has."""

from typing import Protocol, cast

from lightning import LightningModule
from transformers import PreTrainedTokenizerBase

from mifo_callbacks.contracts import require_offer
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.evaluation import Evaluator
from mifo_lightning.rollout.respond import Responder


class Trained(Protocol):
    """A module that answers questions, as `MifoModule` does.

    Attributes:
        policy: The model, once the Trainer has set the module up.
        tokenizer: The model's.
        responder: Draws and grades responses.
        evaluator: Draws and grades those of evaluations.
        sampling: How rollouts are drawn.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    responder: Responder
    evaluator: Evaluator
    sampling: Sampling


def as_trained(pl_module: LightningModule, who: str) -> Trained:
    """The module as monitors read it.

    Raises:
        MisconfigurationException: It lacks something; the line names `who` reads it and what is missing.
    """
    require_offer(Trained, pl_module, who, "the module")
    return cast(Trained, pl_module)
