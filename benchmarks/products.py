"""The limit of a step for `benchmarks.run`: its products with weights, each once, at shapes it cannot do without."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.sizes import Clock, Model, Size


class Products:
    """Those of a model's linear layers; logits are made only where a token is drawn or learned, and once.

    Left out: attention, norms, sampling, the optimizer, everything else.
    """

    def __init__(self, model: Model, bf16: bool) -> None:
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        loaded: Any = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model[0]
        loaded.to(dtype=self.dtype)
        self.head = loaded.get_output_embeddings().weight
        linear = [m.weight for m in loaded.modules() if isinstance(m, torch.nn.Linear)]
        self.body = [weight for weight in linear if weight is not self.head]
        self.ones = cache(lambda *shape: torch.ones(shape, dtype=self.dtype))

    def forward(self, tokens: int, logits: int) -> None:
        """Of `tokens` inputs, `logits` of which get logits."""
        for weight, rows in self._layers(tokens, logits):
            self.ones(rows, weight.shape[1]) @ weight.T

    def backward(self, tokens: int, logits: int) -> None:
        """Gradients of inputs and of weights."""
        for weight, rows in self._layers(tokens, logits):
            gradient = self.ones(rows, weight.shape[0])
            gradient @ weight
            gradient.T @ self.ones(rows, weight.shape[1])

    def _layers(self, tokens: int, logits: int) -> list[tuple[Tensor, int]]:
        return [*((weight, tokens) for weight in self.body), (self.head, logits)]


@torch.no_grad()
def grpo(model: Model, size: Size, clock: Clock, bf16: bool) -> None:
    """Prompts once a group, then all rows a token at a time; forward and backward of both, prompts once a group."""
    of, asked = Products(model, bf16), size.prompts * size.tokens
    for _ in range(size.steps):
        clock.begin()
        of.forward(asked, size.prompts)
        for _ in range(size.length - 1):
            of.forward(size.rows, size.rows)
        learned = size.rows * (size.length - 1)  # the last token of a response is never an input
        of.forward(asked + learned, size.rows * size.length)
        of.backward(asked + learned, size.rows * size.length)
        clock.end()


@torch.no_grad()
def sft(model: Model, size: Size, clock: Clock, bf16: bool) -> None:
    """Forward and backward of prompts and demonstrations, whose last token is the end."""
    of = Products(model, bf16)
    for _ in range(size.steps):
        clock.begin()
        of.forward(size.rows * (size.tokens + size.length), size.rows * (size.length + 1))
        of.backward(size.rows * (size.tokens + size.length), size.rows * (size.length + 1))
        clock.end()
