"""What transformers reads for a model: with no code but its own unless that is asked for, and all weights or none."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.hub import check_hub
from mifo_lightning.policy.tokenizer_file import PROBES, faithful

SHOWN = 3  # names of weights in a message
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST_LAYERS = 10_000


def read_config(model: str, directory: str, trust: bool) -> PreTrainedConfig:
    """The configuration of a model.

    Args:
        model: As the user names it, for messages.
        directory: Hugging Face directory or hub name.
        trust: Whether code that the model brings may be run.

    Raises:
        InputError: There is none, it cannot be read, or it needs code that may not be run.
    """
    fault = "has no config.json to read"
    config: PreTrainedConfig = _read(AutoConfig.from_pretrained, model, directory, trust, fault)
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"model.model: dtype in the config.json of {model!r} is {dtype!r}, no floating type of torch")
    return config


def read_tokenizer(model: str, directory: str, trust: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; arguments as of `read_config`.

    Raises:
        InputError: There is none, it knows no text, it cannot be read, or it needs code that may not be run.
    """

    def load(directory: str, **options: Any) -> PreTrainedTokenizerBase:
        return faithful(AutoTokenizer.from_pretrained(directory, **options), directory)

    tokenizer: PreTrainedTokenizerBase = _read(load, model, directory, trust, "has no tokenizer that can be read")
    read = {token for text in PROBES for token in tokenizer(text, add_special_tokens=False)["input_ids"]}
    if not read - set(tokenizer.all_special_ids):  # without a vocabulary transformers makes one that drops all text
        raise InputError(f"model.model: the tokenizer of {model!r} reads no text; is its tokenizer.json missing?")
    if not trust and tokenizer.init_kwargs.get("auto_map"):
        _warn_of_code(model, type(tokenizer))
    return tokenizer


def read_model(model: str, directory: str, trust: bool) -> PreTrainedModel:
    """The causal LM with fp32 weights; arguments as of `read_config`. Weights that it has no place for are named.

    Raises:
        InputError: It cannot be loaded as one, needs code that may not be run, or its files lack a weight or hold it
            in another shape, for which transformers would draw a random one.
    """
    read_config(model, directory, trust)  # its dtype, which is not the one asked for below
    fault = "cannot be loaded as a causal LM"
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: PreTrainedModel
    with quiet_loading():
        loaded, found = _read(AutoModelForCausalLM.from_pretrained, model, directory, trust, fault, **options)
    kind = type(loaded).__name__
    wrong = {name: f"{list(given)} in place of {list(asked)}" for name, given, asked in found["mismatched_keys"]}
    faults = [
        *(f"{name} is missing" for name in sorted(found["missing_keys"])),
        *(f"{name} has the shape {shapes}" for name, shapes in sorted(wrong.items())),
    ]
    if faults:
        raise InputError(
            f"model.model: the files of {model!r} do not hold the weights of {kind}: {listed(faults)}; it would train "
            "from random numbers there"
        )
    if found["unexpected_keys"]:
        names = listed(sorted(found["unexpected_keys"]))
        rank_zero_warn(f"model.model: {kind} has no place for these weights of {model!r}, which are left out: {names}")
    if not trust and getattr(loaded.config, "auto_map", None):
        _warn_of_code(model, type(loaded))
    return loaded


def read_blueprint(model: str, directory: str, trust: bool) -> PreTrainedModel:
    """The causal LM without its weights, on the meta device; arguments as of `read_config`.

    Raises:
        InputError: It is none, or needs code that may not be run.
    """
    config = read_config(model, directory, trust)
    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config

    def build(directory: str, **options: Any) -> PreTrainedModel:
        with torch.device("meta"):
            return from_config(config, dtype=torch.float32, **options)

    built: PreTrainedModel = _read(build, model, directory, trust, "cannot be loaded as a causal LM")
    return built


def listed(names: Iterable[str]) -> str:
    """The first names, and how many there are beside them."""
    every = list(names)
    rest = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + rest


def first_line(error: BaseException) -> str:
    """What an exception says, in one line of at most 200 characters; its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hugging Face shows no bar and no table of its own beside ours."""
    shown: Any = transformers_logging  # which is not typed
    bar, level = shown.is_progress_bar_enabled(), shown.get_verbosity()
    shown.disable_progress_bar()
    shown.set_verbosity_error()
    try:
        yield
    finally:
        shown.set_verbosity(level)
        if bar:
            shown.enable_progress_bar()


def _warn_of_code(model: str, kind: type) -> None:
    rank_zero_warn(f"model.model: the code that {model!r} brings is not run; {kind.__name__} of transformers is")


def _check_layers(model: str, config: dict[str, Any]) -> None:
    """Refuse more layers than any model has: transformers lists them one by one, even for the tokenizer alone."""
    for name in LAYER_KEYS:
        if isinstance(number := config.get(name), int) and number > MOST_LAYERS:
            raise InputError(
                f"model.model: {name} in the config.json of {model!r} is {number}; at most {MOST_LAYERS} are built"
            )


def _read(load: Callable[..., Any], model: str, directory: str, trust: bool, fault: str, **options: Any) -> Any:
    if not Path(directory).is_dir():
        check_hub(f"model.model: {model}")
    try:
        _check_layers(model, PreTrainedConfig.get_config_dict(directory)[0])
        return load(directory, trust_remote_code=trust, **options)
    except InputError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and a model's own code raise what they like
        if "trust_remote_code" in str(error):
            raise InputError(
                f"model.model: {model!r} brings code of its own (auto_map), which is not run; set "
                "model.loading.trust_remote_code: true if you have read it and trust it"
            ) from error
        raise InputError(f"model.model: {model!r} {fault}: {type(error).__name__}: {first_line(error)}") from error
