"""Shapes of models and sizes of steps for `benchmarks.gpu`, and what is counted of them."""

import json
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

ASSETS = Path(__file__).parents[1] / "mifo_lightning" / "assets"  # read as files: TRL's environment lacks the package
SHAPES: dict[str, str | dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
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
    "qwen2.5-1.5b": "Qwen2.5-Math-1.5B",
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}


class Size(NamedTuple):
    """Of a step: questions, tokens of a prompt, responses to each, tokens of a response, most tokens of a chunk.

    `rows` are decoded at once; `square` is the side of the matrices whose product is measured.
    """

    prompts: int
    tokens: int
    group: int
    length: int
    chunk: int
    rows: tuple[int, ...]
    square: int


SIZES = {
    "cuda": Size(16, 128, 8, 512, 8192, (64, 256, 1024), 8192),
    "cpu": Size(2, 16, 4, 8, 64, (4, 8), 256),
}


def random_model(shape: str, device: str) -> tuple[Any, Any]:
    """A model of a shape with random fp32 weights, made on the device, and the embedded task's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base")
    named = SHAPES[shape]
    given: dict[str, Any] = (
        {"tie_word_embeddings": True, **named}
        if isinstance(named, dict)
        else json.loads((ASSETS / "shapes" / named / "config.json").read_text())
    )
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(given.pop("model_type"), **given, **ids)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


def update_flops(config: Any, weights: int, size: Size, shared: bool) -> float:
    """Operations of the model in forward and backward passes of one RL update.

    Args:
        config: Of the model.
        weights: Of its layers: without embeddings, head and vectors.
        size: Of the step.
        shared: Whether a group runs its prompt once; its responses then run all but their last token.
    """
    rows = size.prompts * size.group
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if shared:
        tokens = size.prompts * size.tokens + rows * (size.length - 1)
        pairs = size.prompts * size.tokens**2 + rows * (size.length - 1) * (size.tokens + size.length - 1)
    else:
        tokens = rows * (size.tokens + size.length)
        pairs = rows * (size.tokens + size.length) ** 2
    head = config.vocab_size * config.hidden_size * rows * size.length
    attention = config.num_hidden_layers * config.num_attention_heads * width * pairs
    return 6.0 * (weights * tokens + head) + 12.0 * attention


def multiplying(model: Any) -> int:
    """Weights of the layers that tokens are multiplied with."""
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)


def wait(device: str) -> float:
    """The time by the clock once the device has done all it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_flops(device: str, dtype: torch.dtype, side: int, repeats: int = 10) -> float:
    """Operations a second of a product of square matrices: the quickest of a few."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    took = []
    for _ in range(repeats):
        start = wait(device)
        torch.mm(a, b)
        took.append(wait(device) - start)
    return 2.0 * side**3 / min(took)


def peaks(device: str) -> dict[str, float]:
    """GiB that were used at most, and that CUDA's allocator held at most; on a CPU both are the process's."""
    if device == "cuda":
        used, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        used = held = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"used": used / 2**30, "held": held / 2**30}
