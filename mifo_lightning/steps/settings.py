"""Settings of the losses of both phases."""

from dataclasses import dataclass
from typing import Literal

from mifo_lightning.common.errors import InputError, require
from mifo_lightning.losses.advantages import Advantage, AdvantageName, as_advantage
from mifo_lightning.losses.corrections import Correction, CorrectionName, as_correction
from mifo_lightning.losses.named import named
from mifo_lightning.losses.policy import Aggregation, Ratio
from mifo_lightning.losses.sft_weights import SFTWeight, SFTWeightName, as_sft_weight
from mifo_lightning.losses.surrogates import Clipped, Reinforce, Surrogate, Truncated, Unclipped
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.rollout.settings import Rollout

SurrogateName = Literal["clipped", "unclipped", "truncated", "reinforce"]


@dataclass
class PolicyLoss:
    """The policy loss; the default is GRPO, `configs/losses/` has the others.

    Args:
        advantage: group_std (GRPO), group_mean (Dr.GRPO), leave_one_out (RLOO), or an `Advantage` by class_path.
        surrogate: clipped, unclipped, truncated (CISPO), reinforce, or a `Surrogate` by class_path.
        ratio: One probability ratio per token, or one per sequence (GSPO).
        aggregation: Mean over sequences of their token means, over all tokens, the sum over a constant (Dr.GRPO), or
            the sum over the longest possible response alone (ReLIFT, LUFFY, HPT); see `token_weights`.
        sum_sequences: Sequences that `aggregation: sum` adds up. A GPU of ReLIFT, LUFFY and HPT holds 64, and
            gradients are averaged over GPUs: a number of its own keeps the loss the same on any number of ranks.
        clip_low: Lower clip range of the probability ratio.
        clip_high: Upper clip range of the probability ratio.
        ratio_cap: Largest ratio of the truncated surrogate.
        kl_coefficient: Weight of the KL to the initial model (estimator k3); 0 loads no reference.
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
    ratio_cap: float = 5.0
    kl_coefficient: float = 0.0
    entropy_bonus: float = 0.0
    entropy_fraction: float = 1.0
    dynamic_sampling: int = 0
    mask_truncated: bool = False
    correction: CorrectionName | Correction | None = "auto"

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
            require(f"{key}.{name}", getattr(self, name), good, what)
        as_advantage(self.advantage)
        as_correction(self.correction)
        self.objective()

    def objective(self) -> Surrogate:
        """The surrogate that is named, with the settings that it has here."""
        table = {
            "clipped": lambda: Clipped(self.clip_low, self.clip_high),
            "unclipped": Unclipped,
            "truncated": lambda: Truncated(self.ratio_cap),
            "reinforce": Reinforce,
        }
        return named(self.surrogate, table, Surrogate, "model.loss.surrogate")


@dataclass
class SFTLoss:
    """The loss of SFT phases: cross-entropy on demonstrations.

    Args:
        weight: What multiplies each demonstration token's cross-entropy: uniform, dft, chord, low_entropy,
            high_entropy, flow, or an `SFTWeight` by class_path.
        entropy_bonus: Weight of the policy's mean entropy on demonstration tokens, which is taken off the loss
            (ReLIFT).
        demonstrations: What a buffered question is learned from: the data's solution, or the model's own correct
            rollout.
    """

    weight: SFTWeightName | SFTWeight = "uniform"
    entropy_bonus: float = 0.0
    demonstrations: Literal["data", "own"] = "data"

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        if self.demonstrations == "own" and as_sft_weight(self.weight).needs_initial_losses:
            raise InputError(f"{key}.weight: flow is not allowed with demonstrations own; it weighs the data's")
        require(f"{key}.entropy_bonus", self.entropy_bonus, self.entropy_bonus >= 0, "at least 0")


def check_rl(rollout: Rollout, loss: PolicyLoss, mixing: Mixing | None) -> None:
    """Raise an InputError unless these settings of a module's RL steps are possible and fit together."""
    loss.check("model.loss")
    rollout.check("model.rollout", least=3 if mixing is not None and mixing.in_group else 2)
    if mixing is not None and loss.dynamic_sampling:
        raise InputError(
            f"model.loss.dynamic_sampling: {loss.dynamic_sampling} is not allowed with model.mixing; it would "
            f"drop the groups whose demonstrations are wanted most"
        )
