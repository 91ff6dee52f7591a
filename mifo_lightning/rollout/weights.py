"""The weights as an engine that keeps a copy of its own takes them over."""

from collections.abc import Iterator

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from mifo_callbacks.sharding import full
from mifo_lightning.policy.policy import Policy


def plain_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of each weight, as the files of a plain Hugging Face model have them; collective.

    A tied head comes under its own name too: an engine that packs it apart from the embedding needs both.
    """
    whole = {name: full(tensor.detach()) for name, tensor in policy.model.state_dict().items()}
    # families that transformers fuses in memory, such as mixtures of experts, are apart in files
    yield from revert_weight_conversion(policy.model, whole).items()
