"""What the RL updates of one RL step share."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mifo_lightning.policy.policy import Policy, Sequences

SCORING_TOKENS = 2**15  # tokens scored at once where no gradient is needed; bounds memory, does not change results


@dataclass
class Rollout:
    """What this rank's updates of one RL step train on: responses, and demonstrations where they are mixed in.

    Attributes:
        sequences: [B] prompts with responses.
        advantages: [B] fp32.
        weight: [B, L] fp32 weights of the policy loss, over the whole optimizer step.
        minibatch: [B] int64, which optimizer step of a pass the sequence belongs to.
        active: [B] bool, whether the sequence can give a gradient.
        question: [B] int64, id of the question.
        logp_old: [B, L] log-probabilities in nats under the policy that sampled; None with one on-policy update.
        logp_ref: [B, L] the same under the reference; None without a KL term.
        keep: [B, L] bool, tokens that push the policy; None without an entropy mask.
        demonstrated: [B] bool, which sequences are demonstrations; None where none are mixed in.
        sft_weight: [B, L] fp32 weights of the SFT loss on demonstrations; None where none are mixed in.
        bonus_weight: [B, L] fp32 weights of the entropy bonus; None where they are those of the policy loss.
    """

    sequences: Sequences
    advantages: Tensor
    weight: Tensor
    minibatch: Tensor
    active: Tensor
    question: Tensor
    logp_old: Tensor | None = None
    logp_ref: Tensor | None = None
    keep: Tensor | None = None
    demonstrated: Tensor | None = None
    sft_weight: Tensor | None = None
    bonus_weight: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors on the CPU, for a checkpoint between two updates."""
        plain = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in vars(self).items() if k != "sequences"}
        return {**plain, "sequences": self.sequences.to(torch.device("cpu"))._asdict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "Rollout":
        """The rollout that `state_dict` was taken from."""
        place: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items() if k != "sequences"
        }
        return cls(sequences=Sequences(**state["sequences"]).to(device), **place)

    def rows(self, chosen: Tensor) -> "Rollout":
        """The chosen rows, trimmed to their own longest sequence and response."""
        sequences = self.sequences.select(chosen)
        length = int(sequences.response_lengths.max())
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sequences"}
        picked: dict[str, Any] = {
            k: v if v is None else v[chosen][..., :length] if v.dim() == 2 else v[chosen] for k, v in rest.items()
        }
        return Rollout(sequences=sequences, **picked)


def score_without_gradient(policy: Policy, sequences: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B, L] in nats of all sequences, in evaluation mode; collective under FSDP2."""
    rows = max(1, SCORING_TOKENS // sequences.tokens.shape[1])
    length = int(sequences.response_lengths.max())
    logp = torch.zeros(len(sequences.tokens), length, device=sequences.tokens.device)
    entropy = torch.zeros_like(logp)
    with policy.sampling():
        for chosen in torch.arange(len(logp), device=logp.device).split(rows):
            part_logp, part_entropy = policy(sequences.select(chosen), temperature)
            logp[chosen, : part_logp.shape[1]] = part_logp
            entropy[chosen, : part_entropy.shape[1]] = part_entropy
    return logp, entropy
