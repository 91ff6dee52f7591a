"""Random models of known shapes, and their tokenizers: nothing is downloaded, and TRL's environment suffices."""

import json
from pathlib import Path
from typing import Any

import torch

ASSETS = Path(__file__).parents[1] / "mifo_lightning" / "assets"  # read as files: TRL's environment lacks the package
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "qwen2.5-1.5b": json.loads((ASSETS / "shapes" / "Qwen2.5-Math-1.5B" / "config.json").read_text(encoding="utf-8")),
    "tiny": TINY,
}


def million(vocabulary: int) -> dict[str, Any]:
    """A shape of a million weights beside its head."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return {**shape, "vocab_size": vocabulary}


def embedded() -> Any:
    """The tokenizer of the embedded task, whose tokens are characters."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "base")


def words(vocabulary: int) -> Any:
    """A tokenizer of so many tokens, which are words: those of this file, and numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "?"]
    known = dict.fromkeys(Path(__file__).read_text(encoding="utf-8").split()[: vocabulary - len(special)])
    names = [*special, *known, *map(str, range(vocabulary))][:vocabulary]
    tokens = Tokenizer(models.WordLevel(dict(zip(names, range(vocabulary), strict=True)), unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>")


def random_model(tokenizer: Any, shape: dict[str, Any], device: str = "cpu") -> Any:
    """A causal LM of a shape, Llama if it does not say, with random fp32 weights, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    given = {"model_type": "llama", "tie_word_embeddings": True, **shape, **ids}
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**given), dtype=torch.float32)
