"""What a model does between its last hidden state and its logits, found by asking it with known numbers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mifo_lightning.policy.decoding import accepted

INSIDE = 0.5  # of the cap: where a capped logit still says how large it was


class LogitTransform(NamedTuple):
    """logits = cap * tanh(scale * head(input_scale * hidden) / cap), without the tanh where there is no cap.

    Scales are those of Cohere, Granite and MiniCPM, caps those of Gemma; scaling after the cap is in it too.
    """

    input_scale: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, outputs: Tensor) -> Tensor:
        """The logits of a head's outputs, of the same shape."""
        logits = outputs if self.scale == 1.0 else outputs * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def in_place(self, outputs: Tensor) -> Tensor:
        """The same, in the memory of `outputs`."""
        if self.scale != 1.0:
            outputs.mul_(self.scale)
        return outputs if self.cap is None else outputs.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """What the cap makes of a derivative by the logits beside `scale`, of their shape; None without a cap."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1.0)


@torch.no_grad()
def head_transform(model: PreTrainedModel) -> LogitTransform | None:
    """How logits follow from `output_embeddings(last_hidden_state)`; None where they do so in another way.

    The head's output is replaced by numbers of all sizes: a cap does not show on the small logits of a fresh model.
    """
    untyped: Any = model
    head: torch.nn.Module | None = untyped.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    tokens = torch.arange(3, device=model.device)[None]
    seen: dict[str, Tensor] = {}

    def replace_output(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        sizes = torch.logspace(-3, 4, output.numel(), device=output.device, dtype=output.dtype)
        sizes[::2] *= -1
        seen["input"], seen["output"] = inputs[0], sizes.view_as(output)
        return seen["output"]

    hook = head.register_forward_hook(replace_output)
    logits = _run(model, tokens).logits
    hook.remove()
    hidden = _run(untyped.base_model, tokens).last_hidden_state
    if not seen:
        return LogitTransform() if _alike(logits, hidden) else None
    input_scale = _scale(hidden, seen["input"])
    scale, cap = _output(seen["output"], logits)
    found = LogitTransform(input_scale, scale, cap)
    right = _alike(hidden * input_scale, seen["input"]) and _alike(found(seen["output"]), logits)
    return found if right else None


def _output(outputs: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """The scale and the cap that make `logits` of `outputs`, if they are made so at all."""
    scale = _scale(outputs, logits)
    if _alike(outputs * scale, logits):
        return scale, None
    cap = float(logits.abs().max())
    inside = logits.abs() < INSIDE * cap
    if logits.shape != outputs.shape or not inside.any():
        return 1.0, None
    return _scale(outputs[inside], cap * torch.atanh(logits[inside].double() / cap)), cap


def _scale(x: Tensor, y: Tensor) -> float:
    """The factor from `x` to `y`, the mean over all numbers, so that rounding cancels; 1 where nothing else is seen."""
    if x.shape != y.shape or _alike(x, y):
        return 1.0
    ratio = y.double() / x.double()
    return float(ratio[ratio.isfinite()].mean())


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def _run(model: torch.nn.Module, tokens: Tensor) -> Any:
    return model(input_ids=tokens, **accepted(model.forward, use_cache=False))
