"""What a plan says: a row for each moment, a column for each component, and what to change where it does not fit."""

import math

from mifo_lightning.planning.memory import COMPONENTS, Moment, Plan
from mifo_lightning.planning.speed import Speed

USABLE = 0.9  # of a GPU's memory; the rest is CUDA's own, and what its allocator cannot use
GB = 1e9


def table(moments: list[Moment]) -> str:
    """A Markdown table in GB (10^9 bytes); components that are nowhere are left out."""
    columns = [name for name in COMPONENTS if any(moment.parts[name] for moment in moments)]
    lines = [f"| moment | {' | '.join(columns)} | total |", "|---" * (len(columns) + 2) + "|"]
    for moment in moments:
        cells = [moment.parts[name] for name in columns]
        lines.append(f"| {moment.name} | {' | '.join(gigabytes(cell) for cell in [*cells, moment.total])} |")
    return "\n".join(lines)


def gigabytes(count: float) -> str:
    """Three digits at most, `-` for none."""
    value = count / GB
    return "-" if not count else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def speed_line(found: Speed) -> str:
    """What the model of speed says, and that it is one."""
    return (
        f"at best, by the model of planning/speed.py: decoding {found.decoding:,.0f} tokens/s, updates "
        f"{found.update:,.0f} tokens/s, {found.step:,.1f} s an RL step"
    )


def verdict(plan: Plan, memory: float) -> list[str]:
    """Whether the largest moment fits into GPUs of `memory` GB; if not, a line for each moment that does not."""
    limit = memory * USABLE * GB
    over = [moment for moment in plan.moments if moment.total > limit]
    if not over:
        return [f"fits: {gigabytes(plan.peak.total)} GB ({plan.peak.name}) of {memory:g} GB"]
    return [
        f"does not fit: {moment.name} needs {gigabytes(moment.total)} GB of {memory:g} GB, a tenth of which is kept "
        f"free; {advice(plan, moment, limit)}"
        for moment in over
    ]


def advice(plan: Plan, moment: Moment, limit: float) -> str:
    """Which key to change so that a moment fits; numbers are proportional estimates."""
    work = plan.work
    decodes, updates = moment.name in ("generation", "evaluation"), moment.name.endswith("update")
    movable = ("activations", "cache", "logits") if decodes else ("activations",) if updates else ()
    part = sum(moment.parts[name] for name in movable)
    room = limit - (moment.total - part)
    if room <= 0:
        return without_room(plan, moment)
    if decodes:
        rows = plan.batch(moment.name).rows
        fewer = math.floor(rows * room / part)
        if fewer:
            return f"lower model.rollout.engine.init_args.rows to {fewer}"
        return "lower model.rollout.sampling.max_new_tokens"
    if updates:
        rl = moment.name == "RL update"
        rows, _, count = work.chunk(plan.shape.shared) if rl else work.sft_chunk()
        tokens, chunks = work.micro_batch_tokens, math.ceil(count * part / room)
        if tokens is not None:
            lower = math.floor(tokens * room / part)
            if lower >= work.prompt + (work.response if rl else work.demonstration):  # a longer sequence stays whole
                return f"lower model.optimizer.micro_batch_tokens to {lower}"
        elif rows > 1 and chunks <= (work.rows if rl else work.demonstrations):
            return f"raise model.optimizer.micro_batches to {chunks}"
        if not work.checkpointing:
            return "set model.loading.gradient_checkpointing: true"
    return "lower model.rollout.sampling.max_new_tokens and data.demonstrations.max_tokens"


def without_room(plan: Plan, moment: Moment) -> str:
    """What helps where what is always there is too much."""
    if not plan.work.sharded:
        return "shard the weights: trainer.strategy ModelParallelStrategy (FSDP2), on more GPUs"
    whole = moment.name in ("generation", "scoring", "evaluation")
    shards = sum(moment.parts[name] for name in ("weights", "gradients", "optimizer", "importance", "reference"))
    if moment.total - shards > shards:
        why = "gathers all fp32 weights while it samples" if whole else "holds more than its share of the weights"
        return f"every GPU {why}: no number of GPUs helps, a smaller model does"
    return "more GPUs (--gpus) make every shard smaller"
