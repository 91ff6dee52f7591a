"""How a model decodes: which cache it makes, and what may be done with it. Read off the model, not off its name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from mifo_lightning.common.errors import InputError

CACHES = ("past_key_values", "cache_params", "state")  # what outputs and arguments call a cache


@dataclass(frozen=True)
class Decoding:
    """What a model's cache allows.

    Attributes:
        argument: What the model's forward calls its cache.
        given: Whether it fills a cache that it is given, and makes none itself.
        movable: Whether rows can be repeated and dropped; if not, every row is prefilled and stays.
        padded: Whether prompts of unequal length can be padded on the left; if not, those of equal length go together.
        slots: Whether rows can be decoded in slots, entering and leaving as they like (`slots.Slots`).
    """

    argument: str
    given: bool
    movable: bool
    padded: bool
    slots: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Decoding":
        """Read from the cache that a model returns, or fills where one is given, for two rows of two tokens.

        Raises:
            InputError: If it keeps no cache.
        """
        tokens = torch.arange(4, device=model.device).view(2, 2)
        arguments = accepted(model.forward, use_cache=True)
        output = model(input_ids=tokens, **arguments)
        argument, given = next((name for name in CACHES if getattr(output, name, None) is not None), None), False
        cache: Any = output[argument] if argument else None
        if cache is None and accepted(model.forward, past_key_values=None):
            argument, given, cache = "past_key_values", True, DynamicCache(config=model.config)
            model(input_ids=tokens, **arguments, past_key_values=cache)
        if argument is None or (given and all(getattr(layer, "keys", None) is None for layer in cache.layers)):
            raise InputError(
                f"model.model: {type(model).__name__} keeps no key-value cache, so it cannot be decoded token by "
                "token; give a decoder-only causal LM"
            )
        kinds = [type(cache), *map(type, getattr(cache, "layers", []))]
        own = [kind for kind in kinds if kind.__module__ != DynamicCache.__module__]
        alone = not _keeps_state(model, len(tokens))
        return cls(
            argument,
            given,
            # a model's own kind of cache may hold more than the inherited method moves
            movable=alone and all("reorder_cache" in vars(kind) for kind in own),
            # nor need it know of padding; without position ids a model cannot know that its first tokens are padding
            padded=alone and not own and bool(accepted(model.forward, position_ids=None)),
        )


def accepted(forward: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """The arguments that `forward` names: families differ in what they take."""
    names = inspect.signature(forward).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _keeps_state(model: nn.Module, rows: int) -> bool:
    """Whether modules hold per-row tensors outside of any cache, as RecurrentGemma's do."""
    held = (v for m in model.modules() for v in vars(m).values())
    return any(isinstance(v, Tensor) and v.dim() > 1 and len(v) == rows for v in held)
