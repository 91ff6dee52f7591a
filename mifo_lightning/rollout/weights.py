"""The weights as an engine that keeps a copy of its own takes them over."""

from collections.abc import Iterator

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from mifo_lightning.policy.loading import plain_weights
from mifo_lightning.policy.policy import Policy


def weights_as_in_files(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of each weight, adapters merged in, as the files of a Hugging Face model have them.

    Collective. A tied head comes under its own name too: an engine that packs it apart from the embedding needs both.
    """
    # families that transformers fuses in memory, such as mixtures of experts, are apart in files
    yield from revert_weight_conversion(policy.model, plain_weights(policy, policy.device)).items()
