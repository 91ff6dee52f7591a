"""What is counted and timed of a step on a GPU: operations, products, the clock, memory."""

import resource
import time
from typing import Any

import torch

from benchmarks.sizes import Size


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
