"""The loss of optimizer steps of either kind: one formula over the streams of a `Batch`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mifo_lightning.losses.corrections import Corrected, Correction
from mifo_lightning.losses.policy import Ratio, policy_loss
from mifo_lightning.losses.sed import SED, sed_term
from mifo_lightning.losses.sft import sft_loss
from mifo_lightning.losses.sft_weights import SFTWeight, Uniform
from mifo_lightning.losses.surrogates import Clipped, Surrogate
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.policy.scoring import kl_k3
from mifo_lightning.steps.batch import Batch


@dataclass
class Objective:
    """`rl.scale (L_policy + kl.scale KL - bonus.scale H) + ce.scale L_SFT`, each a weighted sum over tokens.

    L_SFT is the KL to the teacher, if there is one; otherwise the weighted cross-entropy and, where it is on, SED-SFT's
    term on the same tokens, which no weight multiplies. What depends on the running forward is worked out here, once,
    from scores without a gradient: the weight of each demonstration token, SED-SFT's mask, and SRFT's factor of the
    policy's own rollouts.

    Args:
        surrogate: Objective of the policy's own tokens.
        ratio: One probability ratio per token, or one per sequence.
        sft_weight: What multiplies each demonstration token's cross-entropy.
        sed: SED-SFT's term.
        correction: For an engine whose numerics are not the policy's; None where they are.
        mixing: How demonstrations are mixed into the batch; None if they are not.
        kl: Estimate of the KL per token, by log-probabilities under policy and reference.
    """

    surrogate: Surrogate = field(default_factory=Clipped)
    ratio: Ratio = "token"
    sft_weight: SFTWeight = field(default_factory=Uniform)
    sed: SED = field(default_factory=SED)
    correction: Correction | None = None
    mixing: Mixing | None = None
    kl: Callable[[Tensor, Tensor], Tensor] = kl_k3

    @property
    def top_k(self) -> int:
        """How many of each position's largest log-probabilities it wants."""
        return max(self.sft_weight.top_k, self.sed.top_k if self.sed.strength else 0)

    def __call__(
        self, batch: Batch, logp: Tensor, entropy: Tensor, top: Tensor | None = None, kl: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one chunk of an optimizer step, and what is logged of it.

        Args:
            batch: The chunk.
            logp: [B, L] log-probabilities in nats, with gradient.
            entropy: [B, L] entropies in nats, with gradient if `bonus.scale` is above 0.
            top: [B, L, top_k] the largest log-probabilities in nats, the largest first, without gradient; fewer where
                the vocabulary is smaller. Needed if `top_k` is above 0.
            kl: [B, L] KL(policy || teacher) in nats, with gradient. Needed if the batch has a teacher.

        Returns:
            The scalar loss and scalars without gradient; both sum over chunks and ranks to those of the whole step.
        """
        loss, metrics = logp.new_zeros(()), dict[str, Tensor]()
        if batch.rl is not None:
            loss, metrics = self._policy_loss(batch, logp, entropy)
        if batch.kl is not None and batch.logp_ref is not None:
            to_reference = batch.kl.mean(self.kl(logp, batch.logp_ref))
            loss, metrics["kl_ref"] = loss + batch.kl.scale * to_reference, to_reference.detach()
        if batch.bonus is not None:
            bonus = batch.bonus.mean(entropy)
            metrics["entropy"] = bonus.detach()
            if batch.bonus.scale:
                loss = loss - batch.bonus.scale * bonus
            if batch.rl is None:
                metrics["nll"] = -batch.bonus.mean(logp.detach())
        if batch.rl is not None:
            loss = batch.rl.scale * loss
        if batch.ce is not None:
            sft, described = self._sft_loss(batch, logp, entropy, top) if kl is None else _distillation(batch, kl)
            metrics["loss" if batch.rl is None else "sft_loss"] = described.pop("loss")
            metrics |= described
            loss = loss + batch.ce.scale * sft
        return loss, metrics

    def _policy_loss(self, batch: Batch, logp: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.rl is not None
        assert batch.advantages is not None, "a policy loss needs advantages"
        advantages, weight = batch.advantages, batch.rl.weight
        own = weight > 0 if batch.demonstrated is None else (weight > 0) & ~batch.demonstrated
        logp_old = logp.detach() if batch.logp_old is None else batch.logp_old
        if self.mixing is not None:
            advantages = self.mixing.reweigh(advantages, entropy.detach(), own)
        described = {}
        if self.correction is not None and batch.logp_sampler is not None:
            corrected = self.correction(logp_old, batch.logp_sampler, own)
            advantages = advantages[:, None] * corrected.factor
            described = _describe(corrected, own)
        loss, metrics = policy_loss(
            logp,
            logp_old,
            advantages,
            weight,
            surrogate=self.surrogate,
            ratio=self.ratio,
            keep=batch.keep,
            demonstrated=batch.demonstrated,
            lent=None if self.mixing is None else self.mixing.lent_objective,
        )
        return loss, metrics | described

    def _sft_loss(
        self, batch: Batch, logp: Tensor, entropy: Tensor, top: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.ce is not None
        assert batch.demonstrated is not None, "an SFT loss is on demonstrations"
        asked = {"initial": batch.initial} if self.sft_weight.needs_initial_losses else {}
        if self.sft_weight.top_k:
            assert top is not None, "the weight wants the largest log-probabilities"
            asked["top"] = top[..., : self.sft_weight.top_k]
        weight = self.sft_weight(logp.detach(), entropy.detach(), batch.demonstrated, **asked)
        loss, metrics = sft_loss(logp, batch.ce.weight, batch.ce.total, weight)
        if self.sed.strength:
            assert top is not None, "SED-SFT's term wants the largest log-probabilities"
            assert batch.sed_threshold is not None, "its threshold is measured before training"
            term, is_open = sed_term(logp, top[..., : self.sed.top_k], batch.sed_threshold)
            penalty = batch.ce.mean(term)
            loss = loss + self.sed.strength * penalty
            metrics |= {"sed": penalty.detach(), "sed_share": batch.ce.mean(is_open.float())}
        return loss, metrics


def _distillation(batch: Batch, kl: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of SDFT: the mean over its tokens of the KL to the teacher."""
    assert batch.ce is not None
    loss = batch.ce.mean(kl)
    return loss, {"loss": loss.detach()}


def _describe(corrected: Corrected, own: Tensor) -> dict[str, Tensor]:
    """What is logged of a correction: means over the tokens `own` that the engine drew, and the largest ratio."""

    def mean(values: Tensor) -> Tensor:
        return torch.stack([(values * own).sum(), own.sum()])

    return {
        "sampler_ratio": mean(corrected.ratio),
        "sampler_ratio_max": (corrected.ratio * own).max(),
        "sampler_gap": mean((corrected.factor - 1).abs()),
        "sampler_cut": mean(corrected.cut),
    }
