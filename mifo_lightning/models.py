"""Loading a Hugging Face causal LM and its tokenizer, sharding it, and writing it back."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mifo_lightning.distributed import full
from mifo_lightning.ending import read_ends, set_ends
from mifo_lightning.errors import InputError
from mifo_lightning.policy import Policy
from mifo_lightning.tokenizer_file import faithful

EMBEDDED = "embedded"  # names the base model of the embedded task, which lies inside the package


def locate(model: str) -> str:
    """The directory or hub name that `model` stands for.

    Raises:
        InputError: If it looks like a path but is no Hugging Face model directory.
    """
    if model == EMBEDDED:
        return str(Path(__file__).parent / "assets" / "base")
    path = Path(model).expanduser()
    looks_like_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"model.model: directory {model!r} has no config.json; give a Hugging Face model directory"
            )
        return str(path)
    if path.exists() or looks_like_path:
        raise InputError(f"model.model: {model!r} is not a directory; give a Hugging Face model directory or hub name")
    return model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the model's end tokens (`ending.end_tokens`).

    Raises:
        InputError: If there is none, it has no padding or end-of-sequence token, or the end tokens cannot be read.
    """
    directory = locate(model)
    try:
        tokenizer = faithful(AutoTokenizer.from_pretrained(directory), directory)
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare ones
        raise InputError(f"model.model: no tokenizer in {model!r}: {_first_line(error)}") from error
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name, None) is None:
            raise InputError(f"model.model: the tokenizer of {model!r} has no {name}; set it in tokenizer_config.json")
    set_ends(tokenizer, read_ends(directory))
    return tokenizer


def load_policy(model: str, gradient_checkpointing: bool = False) -> Policy:
    """The model with fp32 weights, ready for training.

    Raises:
        InputError: If it cannot be loaded as a causal LM.
    """
    directory = locate(model)
    try:
        with no_progress_bar():
            loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(f"model.model: {model!r} cannot be loaded as a causal LM: {_first_line(error)}") from error
    if gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(loaded.train())


def shard_policy(policy: Policy, mesh: DeviceMesh) -> None:
    """FSDP2 over a data-parallel mesh: one group per decoder layer, the rest in the root."""
    for module in list(policy.model.modules()):
        if type(module).__name__ in (policy.model._no_split_modules or []):
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "decode")


def stored_dtype(model: str) -> torch.dtype:
    """The floating dtype that the configuration of a model names for its weights; float32 where it names none."""
    dtype = getattr(AutoConfig.from_pretrained(locate(model)), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def export_model(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    write: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a Hugging Face directory; collective if the weights are sharded, `write` on one rank only.

    Args:
        policy: The model, fp32.
        tokenizer: The model's.
        directory: Where to.
        write: Whether this rank writes.
        dtype: Of the written floating-point weights; another than fp32 rounds them.
    """
    weights = {name: full(tensor).detach().cpu() for name, tensor in policy.model.state_dict().items()}
    if write:
        directory.mkdir(parents=True, exist_ok=True)
        rounded = {name: w.to(dtype) if w.dtype == torch.float32 else w for name, w in weights.items()}
        with no_progress_bar():
            policy.model.save_pretrained(directory, state_dict=rounded)
        config = copy.deepcopy(policy.model.config)
        config.dtype = dtype  # save_pretrained names the dtype of the weights in memory
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hugging Face shows no bar of its own beside ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
