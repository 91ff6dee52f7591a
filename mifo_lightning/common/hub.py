"""Does the hub answer? transformers and datasets would wait for minutes, and ask again, where it takes a call only."""

import urllib.request
from functools import lru_cache

from huggingface_hub import constants

from mifo_lightning.common.errors import InputError

PATIENCE = 20.0  # seconds


def check_hub(name: str) -> None:
    """Ask once whether the hub is there; one that cannot be reached at all is left to who loads, who has a cache.

    Raises:
        InputError: It does not answer in time; the message names what was to be loaded.
    """
    if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
        raise InputError(
            f"{name}: the hub {constants.ENDPOINT} has not answered for {PATIENCE:g} s; set HF_HUB_OFFLINE=1 to load "
            "what was downloaded before, or give a local path"
        )


@lru_cache
def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE):
            return True
    except (OSError, ValueError) as error:  # an error is an answer; URLError wraps a time-out of the connection
        return not isinstance(getattr(error, "reason", error), TimeoutError)
