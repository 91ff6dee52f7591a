"""Loading a Hugging Face causal LM and its tokenizer, sharding it, and writing it back."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from mifo_callbacks.collectives import gather_ranks
from mifo_callbacks.sharding import full
from mifo_lightning.common.errors import InputError, require
from mifo_lightning.policy.ending import ends_of, read_ends, set_ends
from mifo_lightning.policy.frozen import freeze_unused
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.prefix import share_prompts
from mifo_lightning.policy.pretrained import (
    first_line,
    quiet_loading,
    read_blueprint,
    read_config,
    read_model,
    read_tokenizer,
)

_without_padding: set[str] = set()  # models whose tokenizers a line has told of: data and module load one each


class Loaded(NamedTuple):
    """A model that is in memory already, with its tokenizer; it is trained in place."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __str__(self) -> str:
        return self.model.name_or_path or type(self.model).__name__


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Args:
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        trust_remote_code: Whether code that the model brings (`auto_map`) may be run; nobody is asked.
        share_prompts: Whether the prompt of a group runs once, forward and backward, instead of once a rollout; null
            does so from ten million weights on where a test of the loaded model, values and gradients, finds it right.
        frozen: Patterns of names of weights that stand still all through training, in RL too: `*embed_tokens*`, with
            which a tied head stands still as well.
    """

    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    share_prompts: bool | None = None
    frozen: list[str] = field(default_factory=list)

    def check(self, key: str, adapter: bool) -> None:
        """Raise an InputError where a setting, under `key` in the configuration, cannot be; `adapter`: beside one."""
        texts = isinstance(self.frozen, list | tuple) and all(isinstance(name, str) for name in self.frozen)
        require(f"{key}.frozen", repr(self.frozen), texts, "a list of patterns")
        fixed = "[] with an adapter: all else is frozen"
        require(f"{key}.frozen", self.frozen, not (adapter and self.frozen), fixed)


EMBEDDED = "embedded"  # names the base model of the embedded task, which lies inside the package


def locate(model: str | Loaded) -> str:
    """The directory or hub name that `model` stands for.

    Raises:
        InputError: If it looks like a path but is no Hugging Face model directory.
    """
    if isinstance(model, Loaded):
        return str(model)
    if not isinstance(model, str):
        raise InputError(
            f"model.model: a {type(model).__name__} is not allowed; give a Hugging Face model directory or hub name, "
            "or a loaded (model, tokenizer), as MifoModule.from_model does"
        )
    if model == EMBEDDED:
        return str(Path(__file__).parents[1] / "assets" / "base")
    try:
        path = Path(model).expanduser()
        present = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # NUL, half characters, too long, the home of nobody
        raise InputError(f"model.model: {model!r:.120} is no path: {first_line(error)}") from error
    looks_like_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"model.model: directory {model!r} has no config.json; give a Hugging Face model directory"
            )
        return str(path)
    if present or looks_like_path:
        raise InputError(f"model.model: {model!r} is not a directory; give a Hugging Face model directory or hub name")
    return model


def load_tokenizer(model: str | Loaded, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the model's end tokens (`ending.end_tokens`).

    Raises:
        InputError: If there is none, it has no end-of-sequence token, or the end tokens cannot be read.
    """
    directory, name = locate(model), str(model)
    tokenizer = model.tokenizer if isinstance(model, Loaded) else read_tokenizer(model, directory, trust_remote_code)
    if tokenizer.eos_token is None:
        raise InputError(f"model.model: the tokenizer of {name!r} has no eos_token; set it in tokenizer_config.json")
    if tokenizer.pad_token is None and name not in _without_padding:
        _without_padding.add(name)
        rank_zero_warn(
            f"model.model: the tokenizer of {name!r} has no pad_token; rows are filled up with its end token "
            f"{tokenizer.eos_token!r}, told apart by their lengths"
        )
    set_ends(tokenizer, ends_of(model.model) if isinstance(model, Loaded) else read_ends(directory))
    return tokenizer


def load_policy(model: str | Loaded, gradient_checkpointing: bool = False, trust_remote_code: bool = False) -> Policy:
    """The model with fp32 weights, ready for training.

    Raises:
        InputError: If it cannot be loaded as a causal LM, or a weight is missing or not finite.
    """
    loaded = model.model.float() if isinstance(model, Loaded) else read_model(model, locate(model), trust_remote_code)
    broken = [name for name, p in loaded.named_parameters() if not p.isfinite().all()]
    if broken:
        raise InputError(f"model.model: {str(model)!r} has weights that are not finite, in {', '.join(broken[:3])}")
    try:
        policy = Policy(loaded)
        check_causal(policy)
        unused = freeze_unused(policy)
    except InputError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise InputError(
            f"model.model: {type(loaded).__name__} cannot be run on token ids alone ({type(error).__name__}: "
            f"{first_line(error)}); give a decoder-only causal LM"
        ) from error
    if gradient_checkpointing:
        recompute_layers(loaded)
    if on := dropouts(loaded.config):
        listed = ", ".join(f"{name} {value:g}" for name, value in on.items())
        rank_zero_warn(f"model.model: dropout is switched off ({listed}): updates must score what rollouts drew")
    if unused:
        rank_zero_warn(f"model.model: text does not pass through {', '.join(unused)}; those weights are not trained")
    return policy


@cache
def blueprint(model: str | Loaded, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights: names and shapes alone, on the meta device.

    Raises:
        InputError: If it is none.
    """
    return model.model if isinstance(model, Loaded) else read_blueprint(model, locate(model), trust_remote_code)


def shares_prompts(policy: Policy, loading: Loading) -> bool:
    """Whether rows of a group share their prompt; an InputError if that is wanted and would be wrong."""
    against = None if policy.split_head else "its logits are not its head's outputs, capped or scaled at most"
    if loading.gradient_checkpointing:
        against = "model.loading.gradient_checkpointing makes layers again, which would fill the cache twice"
    return share_prompts(policy.model, loading.share_prompts, against)


@torch.no_grad()
def check_causal(policy: Policy) -> None:
    """Raise an InputError where a token's probability depends on what follows it, as in an encoder such as BERT."""
    logp, _ = policy(Sequences.pack([[0, 1], [0, 1]], [[2, 3], [2, 1]], 0).to(policy.device))
    one, other = logp[:, 0]
    if not torch.isclose(one, other, atol=1e-5):
        raise InputError(
            f"model.model: in {type(policy.model).__name__} a token's probability depends on the tokens after it "
            f"({float(one):.4f} or {float(other):.4f} nats); give a decoder-only causal LM"
        )


def dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """The dropout probabilities above 0 in a model's configuration, those of unused heads left out."""
    values = config.get_text_config(decoder=True).to_dict()
    return {
        name: value
        for name, value in values.items()
        if "drop" in name and isinstance(value, float) and value > 0 and not name.startswith(("summary", "classifier"))
    }


def recompute_layers(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass; Hugging Face's own switch asks for training mode.

    Raises:
        InputError: If the family has no layers made for it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"model.loading.gradient_checkpointing: {type(model).__name__} does not support it; set it to false"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)  # which a copy of the model binds to its own layer


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)


def check_same_weights(policy: Policy) -> None:
    """Raise an InputError where ranks have built models of their own, as without a seed they do; collective."""
    sums = gather_ranks([float(p.detach().double().sum()) for p in policy.parameters()])
    if any(other != sums[0] for other in sums):
        raise InputError(
            "from_model: the weights differ between processes; load the same ones, or seed before building"
        )


def check_vocabulary(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an InputError where the tokenizer knows tokens that the model has no embedding for."""
    rows, ids = policy.model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if ids > rows:
        raise InputError(
            f"model.model: the tokenizer has {ids} tokens, the embedding {rows} rows; take the model's own tokenizer "
            "or resize the embedding"
        )


def positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence in tokens that a model is made for; None where nothing limits it."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    limits = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    if not limits:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    stretched = int(rope.get("factor", 1) * rope.get("original_max_position_embeddings", 0))
    return max(limits[0], stretched)


def shard_policy(policy: Policy, mesh: DeviceMesh) -> None:
    """FSDP2 over a data-parallel mesh: one group per decoder layer, the rest in the root."""
    for module in list(policy.model.modules()):
        if type(module).__name__ in (policy.model._no_split_modules or []):
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    for method in ("decode", "states"):
        register_fsdp_forward_method(policy, method)


def stored_dtype(model: str | Loaded, trust_remote_code: bool = False) -> torch.dtype:
    """The floating dtype that the configuration of a model names for its weights; float32 where it names none."""
    config = model.model.config if isinstance(model, Loaded) else read_config(model, locate(model), trust_remote_code)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def plain_weights(policy: Policy, device: torch.device = torch.device("cpu")) -> dict[str, torch.Tensor]:
    """The whole weights on a device by Hugging Face's names, adapters merged in; collective if they are sharded."""
    weights = {name: full(tensor).detach().to(device) for name, tensor in policy.model.state_dict().items()}
    return weights if policy.adapter is None else policy.adapter.plain(weights)


def export_model(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    write: bool,
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = None,
) -> None:
    """Write a Hugging Face directory; collective if the weights are sharded, `write` on one rank only.

    Args:
        policy: The model, fp32.
        tokenizer: The model's.
        directory: Where to.
        write: Whether this rank writes.
        dtype: Of the written floating-point weights; another than fp32 rounds them.
        chat_template: Jinja text in place of the tokenizer's own.
    """
    weights = plain_weights(policy)
    if write:
        directory.mkdir(parents=True, exist_ok=True)
        rounded = {name: w.to(dtype) if w.dtype == torch.float32 else w for name, w in weights.items()}
        with quiet_loading():
            policy.model.save_pretrained(directory, state_dict=rounded)
        config = copy.deepcopy(policy.model.config)
        config.dtype = dtype  # save_pretrained names the dtype of the weights in memory
        config.save_pretrained(directory)
        kept = copy.copy(tokenizer)
        kept.chat_template = chat_template or tokenizer.chat_template
        kept.save_pretrained(directory)
