"""Settings of the losses of both phases."""

import math
from dataclasses import dataclass, field
from typing import Literal

from mifo_lightning.common.errors import InputError, require, require_choices
from mifo_lightning.losses.advantages import Advantage, AdvantageName, BatchStd, as_advantage
from mifo_lightning.losses.corrections import Correction, CorrectionName, as_correction
from mifo_lightning.losses.distillation import SelfDistillation
from mifo_lightning.losses.kl import KLName
from mifo_lightning.losses.named import named
from mifo_lightning.losses.policy import Aggregation, Ratio
from mifo_lightning.losses.sed import SED
from mifo_lightning.losses.sft_weights import SFTWeight, SFTWeightName, as_sft_weight
from mifo_lightning.losses.surrogates import Clipped, Reinforce, Surrogate, Truncated, Unclipped
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.rollout.settings import Rollout

SurrogateName = Literal["clipped", "unclipped", "truncated", "reinforce"]


@dataclass(frozen=True)
class PolicyLoss:
    """The policy loss; the default is GRPO, `configs/losses/` has the others.

    Args:
        advantage: group_std (GRPO), group_mean (Dr.GRPO), leave_one_out (RLOO), batch_std (the deviation of all
            responses of the step), or an `Advantage` by class_path.
        surrogate: clipped, unclipped, truncated (CISPO), reinforce, or a `Surrogate` by class_path.
        ratio: One probability ratio per token, or one per sequence (GSPO).
        aggregation: Mean over sequences of their token means, over all tokens, the sum over a constant (Dr.GRPO), or
            the sum over the longest possible response alone (ReLIFT, LUFFY, HPT); see `token_weights`.
        sum_sequences: Sequences that `aggregation: sum` adds up. A GPU of ReLIFT, LUFFY and HPT holds 64, and
            gradients are averaged over GPUs: a number of its own keeps the loss the same on any number of ranks.
        clip_low: Lower clip range of the probability ratio.
        clip_high: Upper clip range of the probability ratio.
        clip_dual: Largest ratio that the clipped surrogate lets push where the advantage is below 0 (dual clip), above
            1 + clip_high; None: however large.
        ratio_cap: Largest ratio of the truncated surrogate.
        kl_coefficient: Weight of the KL to the reference, which begins as the initial model; 0 loads none.
        kl_estimator: k1, k2 or k3 (`losses.kl`).
        kl_in_reward: Whether the KL is no term of the loss, but is taken off the reward before advantages: of each
            response `kl_coefficient` times the sum over its tokens, under the policy that sampled.
        reference_sync_steps: RL optimizer steps after which the reference follows the policy, again and again; 0: it
            stays the initial model.
        reference_mixup: Share of the policy in the reference then: a * policy + (1 - a) * reference (TR-DPO).
        entropy_bonus: Weight of the entropy of the policy, which is added to the objective; aggregated as the loss is,
            with `sum` as in the code of ReLIFT, LUFFY and HPT, by the mean over tokens.
        entropy_fraction: Share of tokens, those of highest entropy under the policy that sampled, that push the policy;
            1 takes all. The denominator stays all tokens (arXiv 2506.01939 takes 0.2).
        dynamic_sampling: 0 keeps all groups. N drops groups of equal rewards (where the reward names a `solved_by`:
            those all right or all wrong by it) and draws further questions, at most N batches per RL step with the
            first, until `prompts_per_step` groups are left (DAPO).
        mask_truncated: Whether responses that did not end by themselves push nothing (DAPO's overlong filtering): they
            stay in the mean of their group, and are in no denominator of the loss.
        correction: For an engine whose numerics are not those that train: auto takes the truncated importance of each
            token (cap 2) for an engine of its own numerics, such as vLLM, and for any under bf16-mixed; a `Correction`
            by class_path, such as mifo_lightning.losses.corrections.TruncatedImportance, is taken for every engine;
            null corrects nothing.
    """

    advantage: AdvantageName | Advantage = "group_std"
    surrogate: SurrogateName | Surrogate = "clipped"
    ratio: Ratio = "token"
    aggregation: Aggregation = "sequence"
    sum_sequences: float = 64.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float | None = None
    ratio_cap: float = 5.0
    kl_coefficient: float = 0.0
    kl_estimator: KLName = "k3"
    kl_in_reward: bool = False
    reference_sync_steps: int = 0
    reference_mixup: float = 0.6
    entropy_bonus: float = 0.0
    entropy_fraction: float = 1.0
    dynamic_sampling: int = 0
    mask_truncated: bool = False
    correction: CorrectionName | Correction | None = "auto"

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        require_choices(key, self)
        without, dual = "unless kl_coefficient is above 0", math.inf if self.clip_dual is None else self.clip_dual
        allowed = [
            ("clip_low", 0 < self.clip_low < 1, "in (0, 1)"),
            ("clip_high", self.clip_high > 0, "above 0"),
            ("clip_dual", dual > 1 + self.clip_high, "above 1 + clip_high, or null"),
            ("clip_dual", self.clip_dual is None or self.surrogate == "clipped", "null unless surrogate is clipped"),
            ("ratio_cap", self.ratio_cap > 0, "above 0"),
            ("sum_sequences", self.sum_sequences > 0, "above 0"),
            ("kl_coefficient", self.kl_coefficient >= 0, "at least 0"),
            ("kl_in_reward", self.kl_coefficient > 0 or not self.kl_in_reward, f"false {without}"),
            ("reference_sync_steps", self.reference_sync_steps >= 0, "at least 0"),
            ("reference_sync_steps", self.kl_coefficient > 0 or not self.reference_sync_steps, f"0 {without}"),
            ("reference_mixup", 0 < self.reference_mixup <= 1, "in (0, 1]"),
            ("entropy_bonus", self.entropy_bonus >= 0, "at least 0"),
            ("entropy_fraction", 0 < self.entropy_fraction <= 1, "in (0, 1]"),
            ("dynamic_sampling", self.dynamic_sampling >= 0, "at least 0"),
        ]
        for name, good, what in allowed:
            require(f"{key}.{name}", getattr(self, name), good, what)
        as_advantage(self.advantage)
        as_correction(self.correction)
        self.objective()

    @property
    def kl_in_loss(self) -> float:
        """Weight of the KL as a term of the loss."""
        return 0.0 if self.kl_in_reward else self.kl_coefficient

    def objective(self) -> Surrogate:
        """The surrogate that is named, with the settings that it has here."""
        table = {
            "clipped": lambda: Clipped(self.clip_low, self.clip_high, self.clip_dual),
            "unclipped": Unclipped,
            "truncated": lambda: Truncated(self.ratio_cap),
            "reinforce": Reinforce,
        }
        return named(self.surrogate, table, Surrogate, "model.loss.surrogate")


@dataclass(frozen=True)
class SFTLoss:
    """The loss of SFT phases: cross-entropy on demonstrations, or self-distillation.

    Args:
        weight: What multiplies each demonstration token's cross-entropy: uniform, dft, chord, low_entropy,
            high_entropy, flow, eaft, or an `SFTWeight` by class_path.
        sed: SED-SFT's term beside the cross-entropy of the same tokens; a weight multiplies the latter alone.
        entropy_bonus: Weight of the policy's mean entropy on demonstration tokens, which is taken off the loss
            (ReLIFT).
        demonstrations: What a buffered question is learned from: the data's solution; own, the first correct rollout
            of the group that it was buffered for; initial, a right response of the model before training (Self-SFT, to
            which SFT stages go by too); refreshed, the same, drawn anew for the questions of each phase as it begins.
        attempts: Most responses that are drawn for a question until one is right, where initial or refreshed.
        distillation: What makes SFT phases SDFT, in place of cross-entropy; null: they are not.
    """

    weight: SFTWeightName | SFTWeight = "uniform"
    sed: SED = field(default_factory=SED)
    entropy_bonus: float = 0.0
    demonstrations: Literal["data", "own", "initial", "refreshed"] = "data"
    attempts: int = 8
    distillation: SelfDistillation | None = None

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        require_choices(key, self)
        others = self.demonstrations
        if others != "data" and as_sft_weight(self.weight).needs_initial_losses:
            raise InputError(f"{key}.weight: flow is not allowed with demonstrations {others}; it weighs the data's")
        require(f"{key}.sed", repr(self.sed)[:80], isinstance(self.sed, SED), "a SED")
        self.sed.check(f"{key}.sed")
        data = not self.sed.strength or others == "data"
        require(f"{key}.sed.strength", self.sed.strength, data, f"0 with demonstrations {others}: tau is of the data's")
        require(f"{key}.entropy_bonus", self.entropy_bonus, self.entropy_bonus >= 0, "at least 0")
        require(f"{key}.attempts", self.attempts, self.attempts >= 1, "at least 1")
        if self.distillation is not None:
            self._check_distillation(key, self.distillation)

    def _check_distillation(self, key: str, distillation: SelfDistillation) -> None:
        kind = isinstance(distillation, SelfDistillation)
        require(f"{key}.distillation", repr(distillation)[:80], kind, "a SelfDistillation, or null")
        distillation.check(f"{key}.distillation")
        plain = {
            "demonstrations": (self.demonstrations, "data"),
            "weight": (self.weight, "uniform"),
            "sed.strength": (self.sed.strength, 0.0),
        }
        for name, (value, only) in plain.items():
            what = f"{only} with distillation, which has no cross-entropy on demonstrations"
            require(f"{key}.{name}", value, value == only, what)


def check_rl(rollout: Rollout, loss: PolicyLoss, mixing: Mixing | None) -> None:
    """Raise an InputError unless these settings of a module's RL steps are possible and fit together."""
    loss.check("model.loss")
    rollout.check("model.rollout", least=3 if mixing is not None and mixing.in_group else 2)
    if mixing is not None and loss.dynamic_sampling:
        raise InputError(
            f"model.loss.dynamic_sampling: {loss.dynamic_sampling} is not allowed with model.mixing; it would "
            f"drop the groups whose demonstrations are wanted most"
        )
    if mixing is not None and loss.kl_in_reward:
        raise InputError(
            "model.loss.kl_in_reward: True is not allowed with model.mixing; the policy has not drawn demonstrations"
        )
    if mixing is not None and mixing.in_group and isinstance(as_advantage(loss.advantage), BatchStd):
        raise InputError(
            "model.loss.advantage: batch_std is not allowed with demonstrations in groups (model.mixing); groups "
            "with and without one have no deviation in common"
        )
