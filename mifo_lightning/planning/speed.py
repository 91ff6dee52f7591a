"""Tokens per second by a simple model: arithmetic at a share of the peak, or bytes at a share of the bandwidth.

Left out: launching kernels, the network between GPUs, grading. So it is what a run can hope for, not what it will show.
"""

from typing import NamedTuple

from mifo_lightning.planning.workload import Workload

FP32, BF16 = 4, 2  # bytes
COMPUTES, READS = 0.4, 0.6  # shares of peak FLOPs and of bandwidth that well-written programs reach
GROWS = 3  # times that a step of decoding moves a cache that grows: it is read, and copied into a longer one


class Shape(NamedTuple):
    """What of a model decides its speed.

    Attributes:
        multiplying: Weights that a token is multiplied with.
        trained: Those of them that are trained.
        attention: Query heads x width x layers: 4 times as many operations for each pair of tokens.
        cache_per_token: Bytes of one token of one sequence in the cache.
        shared: Whether the prompt of a group runs once.
        slots: Whether it decodes in slots; if not, in a cache that grows.
    """

    multiplying: int
    trained: int
    attention: int = 0
    cache_per_token: int = 0
    shared: bool = False
    slots: bool = True


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


def speed(work: Workload, gpu: GPU, shape: Shape) -> Speed:
    """How fast a run is, by the model above.

    Args:
        work: What each process does.
        gpu: What it does it on.
        shape: Of the model.
    """
    rows, context = work.prompts * work.group, work.prompt + work.response / 2
    peak, moved = gpu.tflops * 1e12 * COMPUTES, gpu.bandwidth * 1e9 * READS
    # decoding: a token of each row a step, all weights read once for it; casts are kept of weights that are trained
    arithmetic = work.decoded * (2 * shape.multiplying + 4 * shape.attention * context)
    cache = work.decoded * context * shape.cache_per_token * (1 if shape.slots else GROWS)
    casts = BF16 if shape.trained >= shape.multiplying else FP32 + 2 * BF16
    traffic = shape.multiplying * (casts if work.bf16 else FP32) + cache
    decoding = rows / work.decoded * work.response * max(arithmetic / peak, traffic / moved)
    # passes over whole sequences: 2 N operations a token forward, 2 N more where layers are recomputed; 2 N + 2 T back
    trained = work.prompts * work.prompt * (1 if shape.shared else work.group) + rows * work.response
    pairs = rows * (work.prompt + work.response) ** 2 / 2  # causal: half of all
    forward = 2 * shape.multiplying * trained + 4 * shape.attention * pairs
    backward = 2 * (shape.multiplying + shape.trained) * trained + 8 * shape.attention * pairs
    update = (forward * (2 if work.checkpointing else 1) + backward) * work.passes / peak
    scoring = (work.scored + work.reference) * forward / peak
    drawn = work.ranks * rows * work.response
    return Speed(drawn / decoding, drawn * work.passes / update, decoding + scoring + update)
