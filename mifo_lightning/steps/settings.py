"""Settings of RL steps: the policy loss, and how demonstrations are mixed in."""

import math
from dataclasses import dataclass
from typing import Literal

from mifo_lightning.errors import InputError
from mifo_lightning.losses.advantages import Advantage
from mifo_lightning.losses.policy import Aggregation, Ratio, Surrogate
from mifo_lightning.losses.sft import SFTWeight
from mifo_lightning.rollout.engine import Sampling


@dataclass
class RLSettings:
    """The policy loss; the default is GRPO, `configs/losses/` has the others.

    Args:
        advantage: group_std (GRPO), group_mean (Dr.GRPO) or leave_one_out (RLOO).
        surrogate: clipped, unclipped, truncated (CISPO) or reinforce.
        ratio: One probability ratio per token, or one per sequence (GSPO).
        aggregation: Mean over sequences of their token means, over all tokens, the sum over a constant (Dr.GRPO), or
            the sum over the longest possible response alone (ReLIFT, LUFFY, HPT); see `token_weights`.
        sum_sequences: Sequences that `aggregation: sum` adds up. A GPU of its authors holds 64, and gradients are
            averaged over GPUs: a number of its own keeps the loss the same on any number of ranks.
        clip_low: Lower clip range of the probability ratio.
        clip_high: Upper clip range of the probability ratio.
        ratio_cap: Largest ratio of the truncated surrogate.
        kl_coefficient: Weight of the KL to the initial model (estimator k3); 0 loads no reference.
        entropy_bonus: Weight of the entropy of the policy, which is added to the objective; aggregated as the loss is,
            with `sum` as its authors do, by the mean over tokens.
        entropy_fraction: Share of tokens, those of highest entropy under the policy that sampled, that push the policy;
            1 takes all. The denominator stays all tokens (arXiv 2506.01939 takes 0.2).
        dynamic_sampling: 0 keeps all groups. N drops groups of equal rewards (where the reward names a `solved_by`:
            those all right or all wrong by it) and draws further questions, at most N batches per RL step with the
            first, until `rl_questions` groups are left (DAPO).
        mask_truncated: Whether responses that did not end by themselves push nothing (DAPO's overlong filtering): they
            stay in the mean of their group, and are in no denominator of the loss.
    """

    advantage: Advantage = "group_std"
    surrogate: Surrogate = "clipped"
    ratio: Ratio = "token"
    aggregation: Aggregation = "sequence"
    sum_sequences: float = 64.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float = 5.0
    kl_coefficient: float = 0.0
    entropy_bonus: float = 0.0
    entropy_fraction: float = 1.0
    dynamic_sampling: int = 0
    mask_truncated: bool = False

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        allowed = [
            ("clip_low", 0 < self.clip_low < 1, "in (0, 1)"),
            ("clip_high", self.clip_high > 0, "above 0"),
            ("ratio_cap", self.ratio_cap > 0, "above 0"),
            ("sum_sequences", self.sum_sequences > 0, "above 0"),
            ("kl_coefficient", self.kl_coefficient >= 0, "at least 0"),
            ("entropy_bonus", self.entropy_bonus >= 0, "at least 0"),
            ("entropy_fraction", 0 < self.entropy_fraction <= 1, "in (0, 1]"),
            ("dynamic_sampling", self.dynamic_sampling >= 0, "at least 0"),
        ]
        for name, good, what in allowed:
            if not good:
                raise InputError(f"{key}.{name}: {getattr(self, name)} is not allowed; it must be {what}")


@dataclass
class Mixing:
    """Demonstrations inside RL steps: LUFFY, SRFT, CHORD and HPT are settings of it (docs/methods.md).

    The SFT part is the mean over the demonstration tokens of the step; where all questions lend one, times the share of
    those that have one.

    Args:
        questions: Which questions lend their demonstration: all, or only the failed ones, whose rollouts then do not
            train (HPT).
        gate: A question has failed if at most this many of its rollouts are correct.
        in_group: Grade the demonstration like a rollout, in the place of one of the group; its tokens get the
            objective `A f(p)`, f(x) = x / (x + shape) (LUFFY).
        shape: The constant in f.
        own: What pushes the policy's own rollouts: the advantage of their group, or the sign of their correctness:
            `positive_weight exp(H)` if correct, else -1, H the mean entropy of the response (SRFT; take the reinforce
            surrogate with it).
        positive_weight: Factor of correct rollouts with `own: sign`.
        sft: Weight of the SFT loss on the demonstrations.
        sft_end: Weight to which `sft` goes along half a cosine (CHORD's mu).
        sft_decay: RL steps that this takes; 0 keeps `sft`.
        convex: Whether the policy loss weighs one minus the weight of the SFT loss (CHORD).
        token_weight: What multiplies each demonstration token's cross-entropy, as `model.sft_weight`.
    """

    questions: Literal["all", "failed"] = "all"
    gate: int = 0
    in_group: bool = False
    shape: float = 0.1
    own: Literal["advantage", "sign"] = "advantage"
    positive_weight: float = 0.1
    sft: float = 0.0
    sft_end: float = 0.0
    sft_decay: int = 0
    convex: bool = False
    token_weight: SFTWeight = "uniform"

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        for name in ("gate", "positive_weight", "sft", "sft_end", "sft_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{key}.{name}: {getattr(self, name)} is not allowed; it must be at least 0")
        if self.shape <= 0:
            raise InputError(f"{key}.shape: {self.shape} is not allowed; it must be above 0")
        if self.convex and max(self.sft, self.sft_end) > 1:
            raise InputError(f"{key}.sft: {self.sft} to {self.sft_end} is not allowed; convex needs at most 1")
        if self.in_group and self.questions == "failed":
            raise InputError(
                f"{key}.in_group: true is not allowed with questions failed; whether they failed is known "
                f"only after the rollouts"
            )
        if self.token_weight == "flow":
            raise InputError(f"{key}.token_weight: flow is not allowed; it is a weight of SFT phases")

    def sft_at(self, step: int) -> float:
        """Weight of the SFT loss in RL step number `step`, from 0."""
        done = min(1.0, step / self.sft_decay) if self.sft_decay else 0.0
        return self.sft_end + (self.sft - self.sft_end) * (1 + math.cos(math.pi * done)) / 2


MOST_ROLLOUTS = 2**16  # per question; a rollout's first tokens alone would fill the memory long before


def check_rl(group_size: int, sampling: Sampling, settings: RLSettings, mixing: Mixing | None) -> None:
    """Raise an InputError unless these settings of a module fit together."""
    sampling.check("model.sampling")
    settings.check("model.policy")
    least = 2
    if mixing is not None:
        mixing.check("model.mixing")
        least = 3 if mixing.in_group else 2
    if group_size > MOST_ROLLOUTS:
        raise InputError(f"model.group_size: {group_size} is not allowed; it must be at most {MOST_ROLLOUTS}")
    if group_size < least:
        raise InputError(
            f"model.group_size: {group_size} is not allowed; group advantages need at least 2 rollouts"
            + (" beside the demonstration" if least == 3 else "")
        )
    if mixing is not None and settings.dynamic_sampling:
        raise InputError(
            f"model.policy.dynamic_sampling: {settings.dynamic_sampling} is not allowed with model.mixing; it would "
            f"drop the groups whose demonstrations are wanted most"
        )
    if sampling.temperature == 0 or sampling.top_p != 1 or sampling.top_k != 0:
        raise InputError(
            f"model.sampling: temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k} is "
            f"not allowed in RL; temperature > 0, top_p 1, top_k 0 are: the loss sees the whole vocabulary"
        )
