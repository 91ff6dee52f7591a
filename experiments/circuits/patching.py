"""Recording what heads and MLPs of a decoder put out, and putting something else in its place.

What enters a layer's `o_proj` is the concatenation of its heads: head h is columns h*d to (h+1)*d, with grouped keys
and values too. A replaced head still goes through the `o_proj` of the model that runs.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mifo_lightning.common.errors import InputError


class Part(NamedTuple):
    """A head of a layer, or the layer's MLP where `head` is None."""

    layer: int
    head: int | None = None

    def __str__(self) -> str:
        return f"{self.layer}.mlp" if self.head is None else f"{self.layer}.{self.head}"

    @classmethod
    def named(cls, text: str) -> "Part":
        """The part that `str` wrote."""
        layer, _, head = text.partition(".")
        return cls(int(layer), None if head == "mlp" else int(head))


class Outputs(NamedTuple):
    """What the parts of each layer put out: float [N, L, heads * d] and [N, L, hidden]; N = 1 stands for every row."""

    heads: list[Tensor]
    mlps: list[Tensor]

    def mean(self) -> "Outputs":
        """The mean over rows at each position: [1, L, ...]."""
        return Outputs(*([each.mean(0, keepdim=True) for each in side] for side in self))


class Sites(NamedTuple):
    """The modules of each layer whose input (`projections`) or output (`mlps`) is read and replaced."""

    projections: list[nn.Module]
    mlps: list[nn.Module]


def sites(model: PreTrainedModel) -> Sites:
    """Where heads and MLPs of each layer end.

    Raises:
        InputError: Not every layer has an `o_proj` and an `mlp`.
    """
    modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    found = Sites(*([module for name, module in modules if name == end] for end in ("o_proj", "mlp")))
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if any(len(side) != layers for side in found):
        raise InputError(f"{type(model).__name__}: not every layer has an `o_proj` and an `mlp`, which are looked for")
    return found


def head_parts(model: PreTrainedModel) -> list[Part]:
    """Every head, layer by layer."""
    config = model.config.get_text_config(decoder=True)
    return [Part(layer, h) for layer in range(config.num_hidden_layers) for h in range(config.num_attention_heads)]


def mlp_parts(model: PreTrainedModel) -> list[Part]:
    """Every MLP."""
    return [Part(layer) for layer in range(model.config.get_text_config(decoder=True).num_hidden_layers)]


@torch.no_grad()
def record(model: PreTrainedModel, tokens: Tensor) -> Outputs:
    """What every head and MLP puts out for tokens, int64 [N, L]."""
    outputs = Outputs([], [])
    with ExitStack() as hooks:
        for projection, mlp in zip(*sites(model), strict=True):
            at_input = projection.register_forward_pre_hook(lambda _, inputs: outputs.heads.append(inputs[0]))
            at_output = mlp.register_forward_hook(lambda _, inputs, output: outputs.mlps.append(output))
            hooks.callback(at_input.remove)
            hooks.callback(at_output.remove)
        model(tokens, use_cache=False)
    return outputs


@contextmanager
def replaced(model: PreTrainedModel, parts: Collection[Part], by: Outputs) -> Iterator[None]:
    """Within, these parts put out what `by` holds for them, whatever they compute; all else is computed from there."""
    count = model.config.get_text_config(decoder=True).num_attention_heads
    with ExitStack() as hooks:
        for layer, (projection, mlp) in enumerate(zip(*sites(model), strict=True)):
            heads = torch.tensor([Part(layer, h) in parts for h in range(count)])
            if heads.any():
                handle = projection.register_forward_pre_hook(_heads_of(heads, by.heads[layer]))
                hooks.callback(handle.remove)
            if Part(layer) in parts:
                handle = mlp.register_forward_hook(_output_of(by.mlps[layer]))
                hooks.callback(handle.remove)
        yield


def _heads_of(heads: Tensor, values: Tensor) -> Any:
    """A pre-hook that takes the columns of `heads`, bool [H], from `values`."""
    columns = heads.repeat_interleave(values.shape[-1] // len(heads)).to(values.device)

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.where(columns, values, inputs[0]), *inputs[1:]

    return hook


def _output_of(values: Tensor) -> Any:
    """A hook that gives `values` in place of the output."""
    return lambda _, inputs, output: values.expand_as(output)
