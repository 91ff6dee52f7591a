"""Bytes on one process at each moment of a run, by component."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedModel

from mifo_lightning.monitors.costs import multiplying
from mifo_lightning.planning.trace import Bytes, Tracer
from mifo_lightning.planning.workload import Workload
from mifo_lightning.policy.prefix import SHARED_FROM, cannot_share
from mifo_lightning.policy.scoring import SCORING_TOKENS
from mifo_lightning.rollout.engine import Sampling

FP32 = 4
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
    """Numbers of weights.

    Args:
        total: All of them.
        layer: Of the largest part that FSDP2 gathers by itself.
        root: Of what is in no such part: embedding, head, last norm.
    """

    total: int
    layer: int
    root: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sizes":
        """As `shard_policy` cuts the model."""
        names = model._no_split_modules or []
        layers = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
        total = sum(p.numel() for p in model.parameters())
        return cls(total, max(layers, default=0), total - sum(layers))


def cache_bytes(rows: int, tokens: int, per_token: int, layers: int) -> int:
    """Of the keys and values of `rows` sequences of `tokens`.

    transformers' growing cache: a longer tensor is made beside the old one, of the keys or the values of one layer at a
    time.

    Args:
        rows: Sequences decoded at once.
        tokens: Of the prompt and of the longest response.
        per_token: Bytes of a token of one sequence over all layers: 2 x layers x key-value heads x width x bytes.
        layers: Of the model.
    """
    return rows * tokens * per_token * (2 * layers + 1) // (2 * layers)


class Plan:
    """The memory of one process.

    Args:
        work: What it does.
        model: On the meta device; it belongs to the plan from now on.

    Attributes:
        sizes: Numbers of weights.
        multiplying: Weights that a token is multiplied with.
        attention: Layers x query heads x width.
        cache_per_token: Bytes of a token of one sequence in the cache, over all layers.
        shared: Whether the prompt of a group runs once.

    Raises:
        InputError: If the model cannot be traced.
    """

    def __init__(self, work: Workload, model: PreTrainedModel) -> None:
        self.work = work
        config = model.config.get_text_config(decoder=True)
        self.sizes, self.multiplying = Sizes.of(model), multiplying(model)
        self.layers = int(config.num_hidden_layers)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention = self.layers * config.num_attention_heads * width
        wanted = work.share_prompts is not False and not work.checkpointing
        large = work.share_prompts or self.sizes.total >= SHARED_FROM
        self.shared = bool(wanted and large and cannot_share(model) is None)
        shards = work.ranks if work.sharded else 1
        self.tracer = Tracer(model, work.bf16, work.checkpointing, shards)
        self.cache_per_token = self.tracer.cache_per_token()
        self._share = FP32 * self.sizes.total / shards  # bytes of one fp32 copy of the weights

    @cached_property
    def moments(self) -> list[Moment]:
        """All moments of a run, in the order of a step."""
        work = self.work
        found = [self.generation("generation", work.decoded, work.group, Sampling(max_new_tokens=work.response))]
        if work.scored or work.reference:
            found.append(self.scoring())
        found += [self.update(), self.step("RL step", sft=False)]
        if work.demonstrations:
            found += [self.sft_update(), self.step("SFT step", sft=True)]
        if work.evaluated:
            rows = min(work.engine_rows, work.evaluated)
            found.append(self.generation("evaluation", rows, work.samples, work.sampling))
        return found

    @property
    def peak(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total)

    # --- moments ------------------------------------------------------------------------------------------------

    def generation(self, name: str, rows: int, group: int, sampling: Sampling) -> Moment:
        """Where the last token is drawn, or where the prompts are read, whichever needs more."""
        work, tokens = self.work, self.work.prompt + sampling.max_new_tokens
        questions = max(1, rows // group)
        kept = 8 * rows * tokens * 2 + 12 * rows * sampling.max_new_tokens  # masks, and what was drawn
        step = self.tracer.step(rows, tokens - 1, sampling)
        prefill = self.tracer.prefill(questions, work.prompt)
        late = step | {"cache": cache_bytes(rows, tokens, self.cache_per_token, self.layers)}
        early = prefill | {"cache": cache_bytes(questions, work.prompt, self.cache_per_token, self.layers)}
        parts = max(late, early, key=lambda found: sum(found.values()))
        parts["activations"] = parts.get("activations", 0) + kept
        return self._moment(name, parts, whole=True)

    def scoring(self) -> Moment:
        """Log-probabilities without a gradient of as many rows at once as the policy scores."""
        work = self.work
        rows = min(work.prompts * work.group, max(1, SCORING_TOKENS // (work.prompt + work.response)))
        prompts = -(-rows // work.group) if self.shared else None
        return self._moment("scoring", self.tracer.scoring(rows, prompts, work.prompt, work.response), whole=True)

    def update(self) -> Moment:
        """The passes of an RL optimizer step."""
        work, (rows, prompts) = self.work, self.work.chunk()
        shared = prompts if self.shared else None
        traced = self.tracer.update(rows, shared, work.prompt, work.response, work.micro_batches, work.entropy_gradient)
        return self._moment("RL update", traced)

    def sft_update(self) -> Moment:
        """The passes of an SFT optimizer step, each row with its own prompt."""
        work = self.work
        rows = -(-work.demonstrations // work.micro_batches)
        traced = self.tracer.update(rows, None, work.prompt, work.demonstration, work.micro_batches, False)
        return self._moment("SFT update", traced, sft=True)

    def step(self, name: str, sft: bool) -> Moment:
        """The optimizer's step: all gradients, and what callbacks copy."""
        moment = self._moment(name, {"gradients": int(self._share)}, sft=sft)
        if self.work.movement:
            moment.parts["importance"] += int(self._share)
        return moment

    # --- what is always there -----------------------------------------------------------------------------------

    def _moment(self, name: str, traced: Bytes, whole: bool = False, sft: bool = False) -> Moment:
        """What a trace found, with what lies beside it; `whole` weights are gathered at once under FSDP2."""
        work, share = self.work, self._share
        copies = {"optimizer": 2.0, "weights": 1.0, "reference": float(work.reference)}
        if work.demonstrations and (work.moments == "keep" or (sft and work.moments == "reset")):
            copies["optimizer"] += 2  # the moments of the other kind of phase are parked beside these
        copies["importance"] = 2.0 * work.importance  # the map, and the weights where the phase began
        if sft:  # the map; a mask of a byte a weight, and the frozen values
            copies["importance"] = work.importance + 1.25 * work.freezing
        if work.ranks > 1 and not work.sharded:
            copies["gradients"] = 1.0  # DDP's buckets, which stay
        parts = dict.fromkeys(COMPONENTS, 0) | traced
        for component, count in copies.items():
            parts[component] += int(count * share)
        if work.sharded:
            parts["gathered"] = FP32 * (self.sizes.total if whole else 2 * self.sizes.root + 3 * self.sizes.layer)
        return Moment(name, parts)
