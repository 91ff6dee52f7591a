"""Tokens per second by a simple model: arithmetic at a share of the peak, or bytes at a share of the bandwidth.

Left out: launching kernels, the network between GPUs, grading. So it is what a run can hope for, not what it will show.
"""

from typing import NamedTuple

from mifo_lightning.monitors.costs import flops
from mifo_lightning.planning.workload import Workload

COMPUTES, READS = 0.4, 0.6  # shares of peak FLOPs and of bandwidth that well-written programs reach
GROWS = 3  # times that a step of decoding moves the cache: it is read, and copied into a longer one


class GPU(NamedTuple):
    """One GPU; the defaults are those of an H100 SXM.

    Attributes:
        memory: GB (10^9 bytes).
        tflops: Dense peak of the precision that is used, 10^12 per second.
        bandwidth: GB per second.
    """

    memory: float = 80.0
    tflops: float = 989.0
    bandwidth: float = 3350.0


class Speed(NamedTuple):
    """Of all processes together.

    Attributes:
        decoding: Response tokens per second while they are drawn.
        update: Response tokens per second in the passes of RL updates.
        step: Seconds of an RL step: drawing, scoring, updates.
    """

    decoding: float
    update: float
    step: float


def speed(work: Workload, gpu: GPU, multiplying: int, attention: int, cache_per_token: int, shared: bool) -> Speed:
    """How fast a run is, by the model above.

    Args:
        work: What each process does.
        gpu: What it does it on.
        multiplying: Weights that a token is multiplied with.
        attention: Query heads x width x layers: 4 times as many operations for each pair of tokens.
        cache_per_token: Bytes of one token of one sequence in the cache.
        shared: Whether the prompt of a group runs once.
    """
    rows, context = work.prompts * work.group, work.prompt + work.response / 2
    peak, moved = gpu.tflops * 1e12 * COMPUTES, gpu.bandwidth * 1e9 * READS
    # decoding: a token of each row a step, all weights read once for it
    arithmetic = work.decoded * (flops(tokens(generated=1), multiplying) + 4 * attention * context)
    traffic = multiplying * (2 if work.bf16 else 4) + GROWS * work.decoded * context * cache_per_token
    decoding = rows / work.decoded * work.response * max(arithmetic / peak, traffic / moved)
    # passes over whole sequences: 2 N operations a token forward, 4 N backward, 2 N more where layers are recomputed
    trained = work.prompts * work.prompt * (1 if shared else work.group) + rows * work.response
    pairs = rows * (work.prompt + work.response) ** 2 / 2  # causal: half of all
    forward = flops(tokens(scored=trained), multiplying) + 4 * attention * pairs
    backward = flops(tokens(trained=trained), multiplying) - flops(tokens(scored=trained), multiplying)
    update = (forward * (2 if work.checkpointing else 1) + backward + 8 * attention * pairs) * work.passes / peak
    scoring = (work.scored + work.reference) * forward / peak
    drawn = work.ranks * rows * work.response
    return Speed(drawn / decoding, drawn * work.passes / update, decoding + scoring + update)


def tokens(generated: float = 0, scored: float = 0, trained: float = 0) -> dict[str, float]:
    """An account of tokens, as `costs.flops` reads it."""
    return {"generated_tokens": generated, "scored_tokens": scored, "trained_tokens": trained}
