"""The prompt once per group: rows of one prompt share its forward and its backward pass, by way of the cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.decoding import accepted

SHARED_FROM = 10_000_000  # weights; on smaller models a second pass costs what it saves
ALIKE = 1e-3  # of their size, in fp32; a mask or a position that is off by one makes 1e-2 and more
STRETCHED = ("dynamic", "longrope")  # rotations that depend on how long the sequence is: a prompt alone is shorter


def shared_states(model: PreTrainedModel, tokens: Tensor, prompt_lengths: Tensor, length: int) -> Tensor:
    """[B, L, D] the last hidden state before each response token, as of a forward pass over whole rows.

    Two passes of the base model, whatever the rows are: one over each different prompt, one over the responses.
    Prompts are padded on the left, as in generation: responses follow them without a gap, whatever looks back.

    Args:
        model: One that `cannot_share` has nothing against.
        tokens: [B, T] int64 prompts with responses, padded on the right.
        prompt_lengths: [B] int64.
        length: L, the longest response in tokens.
    """
    width, device = int(prompt_lengths.max()), tokens.device
    place = torch.arange(width, device=device) - width + prompt_lengths[:, None]
    prompts, row = torch.unique(
        tokens.gather(1, place.clamp_min(0)).masked_fill(place < 0, -1), dim=0, return_inverse=True
    )
    known = prompts >= 0
    cache = DynamicCache(config=model.config)
    base: Any = model.base_model
    first = base(
        input_ids=prompts.clamp_min(0),
        attention_mask=known.long(),
        position_ids=(known.cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:][row]
    cache.batch_select_indices(row)
    place = prompt_lengths[:, None] + torch.arange(max(length - 1, 1), device=device)
    rest = base(
        input_ids=tokens.gather(1, place.clamp_max(tokens.shape[1] - 1)),
        attention_mask=torch.cat([known[row], torch.ones_like(place, dtype=torch.bool)], 1).long(),
        position_ids=place,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first, rest], 1)[:, :length]


def cannot_share(model: PreTrainedModel) -> str | None:
    """Why rows of this model cannot share a prompt; None if nothing of its structure is against it."""
    forward = model.base_model.forward
    if len(accepted(forward, past_key_values=None, attention_mask=None, position_ids=None)) < 3:
        return "its forward takes no cache, mask and positions"
    layers = DynamicCache(config=model.config).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        return "not all of its layers look back at everything"
    rotation: Any = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    of_layers = [part for part in rotation.values() if isinstance(part, dict)]  # some have one for each kind of layer
    if stretched := {part.get("rope_type") for part in (rotation, *of_layers)} & set(STRETCHED):
        return f"its positions are stretched ({min(stretched)})"
    return None


def differences(model: PreTrainedModel) -> tuple[float, float]:
    """How far hidden states and gradients of shared prompts are from those of whole rows, relative to their size.

    Two prompts of unequal length, two responses each, of one token and more: few, since the model may be large. The
    gradient is that of the first layers' vectors, which all that comes after goes into.
    """
    device, embedding = model.device, next(p for p in model.get_input_embeddings().parameters())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(embedding), (4, 8), generator=generator)
    tokens[1, :4], tokens[3, :2] = tokens[0, :4], tokens[2, :2]
    tokens, prompts = tokens.to(device), torch.tensor([4, 4, 2, 2], device=device)
    lengths = torch.tensor([1, 4, 4, 2], device=device)
    row, step = (torch.arange(4, device=device) < lengths[:, None]).nonzero(as_tuple=True)
    base: Any = model.base_model
    vectors = [p for p in base.parameters() if p.dim() == 1 and p.requires_grad][:4] or [next(base.parameters())]
    found = []
    for shared in (False, True):
        if shared:
            states = shared_states(model, tokens, prompts, 4)[row, step]
        else:
            whole = base(input_ids=tokens, **accepted(base.forward, use_cache=False)).last_hidden_state
            states = whole[row, prompts[row] + step - 1]
        weight = torch.linspace(-1, 1, states.numel(), device=device).view_as(states)
        gradient = torch.autograd.grad((states * weight).sum(), vectors, allow_unused=True)
        found.append((states.detach(), torch.cat([g.flatten() for g in gradient if g is not None])))
    (a, b), (c, d) = zip(*found, strict=True)
    return float((a - b).norm() / a.norm()), float((c - d).norm() / c.norm())


def share_prompts(model: PreTrainedModel, wanted: bool | None, against: str | None) -> bool:
    """Whether rows of a group share their prompt: as wanted, or from `SHARED_FROM` weights on wherever it is right.

    Args:
        model: Loaded, in fp32.
        wanted: `model.loading.share_prompts`.
        against: What else than the model is against it.

    Raises:
        InputError: It is wanted, and it would be wrong; the line says why.
    """
    if wanted is False or (wanted is None and sum(p.numel() for p in model.parameters()) < SHARED_FROM):
        return False
    reason = against or _wrong(model)
    if reason and wanted:
        raise InputError(f"model.loading.share_prompts: true is not allowed for {type(model).__name__}: {reason}")
    return reason is None


def _wrong(model: PreTrainedModel) -> str | None:
    try:
        if reason := cannot_share(model):
            return reason
        values, gradients = differences(model)
    except Exception as error:  # whatever a model's own code raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if values < ALIKE and gradients < ALIKE:
        return None
    return f"values differ by {values:.1g} and gradients by {gradients:.1g} of their size, allowed is {ALIKE:.1g}"
