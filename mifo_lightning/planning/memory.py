"""Bytes on one process at each moment of a run, by component."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from mifo_lightning.monitors.costs import multiplying
from mifo_lightning.planning.speed import FP32, Shape
from mifo_lightning.planning.trace import Bytes, Tracer
from mifo_lightning.planning.workload import DecodingBatch, Workload
from mifo_lightning.policy.adapter import put_beside
from mifo_lightning.policy.prefix import SHARED_FROM, cannot_share
from mifo_lightning.policy.scoring import SCORING_TOKENS
from mifo_lightning.rollout.engine import Sampling

COMPONENTS = (
    *("weights", "gathered", "casts", "gradients", "optimizer", "importance", "reference"),
    *("activations", "cache", "logits"),
)


class Moment(NamedTuple):
    """What a process holds at one moment.

    Attributes:
        name: Generation, scoring, RL update, step, SFT update, evaluation.
        parts: Bytes by component, of `COMPONENTS`.
    """

    name: str
    parts: Bytes

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights, those of adapters included.

    Args:
        total: All of them.
        trained: Those that are trained.
        layer: Of the largest part that FSDP2 gathers by itself.
        root: Of what is in no such part: embedding, head, last norm.
    """

    total: int
    trained: int
    layer: int
    root: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sizes":
        """As `shard_policy` cuts the model."""
        names = model._no_split_modules or []
        layers = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return cls(total, trained, max(layers, default=0), total - sum(layers))


class Plan:
    """The memory of one process.

    Args:
        work: What it does.
        model: On the meta device; it belongs to the plan from now on.

    Attributes:
        sizes: Numbers of weights.
        shape: What of the model decides its speed. Whether it decodes in slots and shares prompts is read off its
            structure; a run also tries both on the loaded weights.

    Raises:
        InputError: If the model cannot be traced, or `Adapter.layers` refuses a setting.
    """

    def __init__(self, work: Workload, model: PreTrainedModel) -> None:
        self.work = work
        config = model.config.get_text_config(decoder=True)
        slots = cannot_share(model) is None
        wanted = slots and work.share_prompts is not False and not work.checkpointing
        large = work.share_prompts or sum(p.numel() for p in model.parameters()) >= SHARED_FROM
        if work.adapter is not None:
            with torch.device("meta"):
                put_beside(model, work.adapter)
        self.sizes = Sizes.of(model)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shards = work.ranks if work.sharded else 1
        weights, trained = multiplying(model), self.sizes.trained
        self.tracer = Tracer(model, work.bf16, work.checkpointing, shards, work.cpu)
        self.shape = Shape(
            multiplying=weights,
            trained=weights if work.adapter is None else trained,
            attention=int(config.num_hidden_layers) * config.num_attention_heads * width,
            cache_per_token=self.tracer.cache_per_token(slots),
            shared=bool(wanted and large),
            slots=slots,
        )
        # bytes of one fp32 copy of all weights, and of those that are trained
        self._share, self._trained = FP32 * self.sizes.total / shards, FP32 * trained / shards

    @cached_property
    def moments(self) -> list[Moment]:
        """All moments of a run, in the order of a step."""
        work = self.work
        found = [self.decoding("generation")]
        if work.scored or work.reference:
            found.append(self.scoring())
        found += [self.update(), self.step("RL step", sft=False)]
        if work.demonstrations and work.shown:
            found.append(self.teaching())
        if work.demonstrations:
            found += [self.sft_update(), self.step("SFT step", sft=True)]
        if work.evaluated:
            found.append(self.decoding("evaluation"))
        return found

    @property
    def peak(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total)

    # --- moments ------------------------------------------------------------------------------------------------

    def batch(self, name: str) -> DecodingBatch:
        """Rows decoded at once in `generation` or `evaluation`."""
        work = self.work
        if name == "generation":
            return work.batch(work.prompts, work.group, work.response)
        return work.batch(work.evaluated // work.samples, work.samples, work.sampling.max_new_tokens)

    def decoding(self, name: str) -> Moment:
        """`generation` or `evaluation`: where the last token is drawn, or where the prompts are read."""
        batch, work = self.batch(name), self.work
        sampling = Sampling(max_new_tokens=work.response) if name == "generation" else work.sampling
        drawn = self.tracer.slots if self.shape.slots else self.tracer.growing
        parts = drawn(batch, self.work.prompt, sampling)
        parts["activations"] += 12 * batch.slots * sampling.max_new_tokens  # what was drawn
        return self._moment(name, parts, whole=True)

    def scoring(self) -> Moment:
        """Log-probabilities without a gradient of as many rows at once as the policy scores."""
        work = self.work
        rows = min(work.prompts * work.group, max(1, SCORING_TOKENS // (work.prompt + work.response)))
        prompts = -(-rows // work.group) if self.shape.shared else None
        return self._moment("scoring", self.tracer.scoring(rows, prompts, work.prompt, work.response), whole=True)

    def update(self) -> Moment:
        """The passes of an RL optimizer step."""
        work, (rows, prompts, count) = self.work, self.work.chunk(self.shape.shared)
        shared = prompts if self.shape.shared else None
        traced = self.tracer.update(rows, shared, work.prompt, work.response, count, work.entropy_gradient)
        return self._moment("RL update", traced)

    def teaching(self) -> Moment:
        """The pass of SDFT's teacher over a chunk, whose prompts hold the demonstrations too."""
        work, (rows, _, _) = self.work, self.work.sft_chunk()
        traced = self.tracer.scoring(rows, None, work.prompt + work.shown, work.demonstration)
        return self._moment("SFT teacher", {**traced, "gradients": int(self._trained)}, whole=True, sft=True)

    def sft_update(self) -> Moment:
        """The passes of an SFT optimizer step, each row with its own prompt."""
        work, (rows, _, count) = self.work, self.work.sft_chunk()
        traced = self.tracer.update(rows, None, work.prompt, work.demonstration, count, False)
        return self._moment("SFT update", traced, sft=True)

    def step(self, name: str, sft: bool) -> Moment:
        """The optimizer's step: all gradients, and what callbacks copy."""
        moment = self._moment(name, {"gradients": int(self._trained)}, sft=sft)
        if self.work.movement:
            moment.parts["importance"] += int(self._trained)
        return moment

    # --- what is always there -----------------------------------------------------------------------------------

    def _moment(self, name: str, traced: Bytes, whole: bool = False, sft: bool = False) -> Moment:
        """What a trace found, with what lies beside it; `whole` weights are gathered at once under FSDP2."""
        work = self.work
        copies = {"optimizer": 2.0}
        if work.demonstrations and (work.moments == "keep" or (sft and work.moments == "reset")):
            copies["optimizer"] += 2  # the moments of the other kind of phase are parked beside these
        copies["importance"] = work.importance / 4
        if sft:  # a mask of a bit a weight, and the frozen values, as many numbers as weights
            copies["importance"] += (1 + 1 / 32) * work.freezing
        elif work.importance:  # the weights where the phase began
            copies["importance"] += 1
        copies["importance"] += work.protection[sft]
        copies["reference"] = float(work.teacher)
        if work.ranks > 1 and not work.sharded:
            copies["gradients"] = 1.0  # DDP's buckets, which stay
        parts = dict.fromkeys(COMPONENTS, 0) | traced
        parts["weights"] = int(self._share)
        if work.reference and work.adapter is None:  # with an adapter it is the model without it
            parts["reference"] = int(self._share)
        for component, count in copies.items():
            parts[component] += int(count * self._trained)
        if work.sharded:
            parts["gathered"] = FP32 * (self.sizes.total if whole else 2 * self.sizes.root + 3 * self.sizes.layer)
        return Moment(name, parts)
