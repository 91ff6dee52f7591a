"""What optimizer steps train on, of either kind: sequences, and what each of their tokens counts in each term."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mifo_lightning.policy.policy import Sequences
from mifo_lightning.steps.cutting import by_tokens


class Stream(NamedTuple):
    """What each token counts in one term of the loss: the term is `scale * sum(weight * value) / total`.

    Attributes:
        weight: [B, L] fp32 or bool, 0 where a token does not count.
        total: What the sum is divided by, over all chunks and ranks of the optimizer step.
        scale: Weight of the term in the loss.
    """

    weight: Tensor
    total: float = 1.0
    scale: float = 1.0

    def mean(self, values: Tensor) -> Tensor:
        """`sum(weight * values) / total` of [B, L] values; sums over chunks and ranks to that of the whole step."""
        return (values * self.weight).sum() / self.total


@dataclass
class Batch:
    """B sequences of this rank: an RL step with all its updates, or the demonstrations of one SFT step.

    A term of the loss that has no stream is not there: an SFT step has no `rl`, an RL step that mixes nothing in no
    `ce`. Everything here stands still while the policy moves; what follows the running forward is in `Objective`.

    Attributes:
        sequences: Prompts with responses.
        question: [B] int64, id of the question.
        minibatch: [B] int64, which optimizer step of a pass over the rollout the sequence belongs to.
        active: [B] bool, whether the sequence can give a gradient.
        demonstrated: [B, L] bool, tokens that the policy did not draw; None where all are its own.
        rl: Of the policy loss.
        ce: Of the cross-entropy on demonstrations.
        kl: Of the KL to the reference.
        bonus: Of the policy's entropy, which is taken off the loss.
        advantages: [B] fp32; None without `rl`.
        logp_old: [B, L] log-probabilities in nats under the policy that sampled; None with one on-policy update.
        logp_ref: [B, L] the same under the reference; None without a KL term.
        charged: [B] fp32, what the KL has taken off each reward; None where it takes nothing off.
        logp_sampler: [B, L] the same as the engine had them where it drew; None where nothing corrects for it.
        keep: [B, L] bool, tokens that push the policy; None without an entropy mask.
        initial: [B] fp32 loss of each demonstration before training, in units of the median; None where no weight
            wants it.
        sed_threshold: tau of SED-SFT's term; None without it.
        teacher: The same responses after the prompts of a teacher that sees demonstrations; None without distillation.
        named: Masks [B, L] bool of tokens that a selection may be told to keep: `eos`, and `answer` where a marker
            (`data.demonstrations.answer_after`) says where answers begin.
        temperature: Logits are divided by it before everything.
        idle: Whether it is one row that weighs nothing, in the place of none.
    """

    sequences: Sequences
    question: Tensor
    minibatch: Tensor
    active: Tensor
    demonstrated: Tensor | None = None
    rl: Stream | None = None
    ce: Stream | None = None
    kl: Stream | None = None
    bonus: Stream | None = None
    advantages: Tensor | None = None
    logp_old: Tensor | None = None
    logp_ref: Tensor | None = None
    charged: Tensor | None = None
    logp_sampler: Tensor | None = None
    keep: Tensor | None = None
    initial: Tensor | None = None
    sed_threshold: float | None = None
    teacher: Sequences | None = None
    named: dict[str, Tensor] = field(default_factory=dict)
    temperature: float = 1.0
    idle: bool = False

    def chunks(self, update: int, count: int, tokens: int | None = None, shared: bool = False) -> list["Batch"]:
        """What optimizer step number `update` of a pass works on, in `count` parts of equally many rows.

        Or in parts of at most `tokens` (`cutting.by_tokens`). Rows that cannot give a gradient, those of advantage 0
        above all, are left out; they still count. Every rank runs every chunk: one without a row is a row that weighs
        nothing, with gradients of exactly 0.
        """
        rows = (self.minibatch == update).nonzero()[:, 0]
        rows = rows[self.active[rows]]
        if tokens is None:
            parts = list(rows.tensor_split(count))
        else:
            parts = by_tokens(self.sequences, self.question, rows, tokens, shared)
        return [self.rows(part) if len(part) else self._nothing() for part in parts]

    def rows(self, chosen: Tensor) -> "Batch":
        """The chosen rows, trimmed to their own longest sequence and response."""
        length = int(self.sequences.response_lengths[chosen].max())

        def pick(tensor: Tensor) -> Tensor:
            return tensor[chosen][..., :length] if tensor.dim() == 2 else tensor[chosen]

        return self._mapped(pick, lambda sequences: sequences.select(chosen))

    def _nothing(self) -> "Batch":
        one = self.rows(torch.zeros(1, dtype=torch.long, device=self.question.device))
        streams = {f.name: v for f in fields(one) if isinstance(v := getattr(one, f.name), Stream)}
        for name, stream in streams.items():
            setattr(one, name, stream._replace(weight=torch.zeros_like(stream.weight)))
        one.idle = True
        return one

    @property
    def demonstrations(self) -> list[int]:
        """Ids of the questions whose demonstration is among the rows."""
        return [] if self.demonstrated is None else self.question[self.demonstrated.any(-1)].tolist()

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return self._mapped(lambda tensor: tensor.to(device), lambda sequences: sequences.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors on the CPU, tuples and numbers, for a checkpoint between two updates of RL (no teacher)."""
        state = vars(self.to(torch.device("cpu")))
        return {k: tuple(v) if isinstance(v, (Stream, Sequences)) else v for k, v in state.items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "Batch":
        """The batch that `state_dict` was taken from."""
        streams = {k: Stream(*v) for k, v in state.items() if isinstance(v, tuple) and k != "sequences"}
        return cls(**{**state, **streams, "sequences": Sequences(*state["sequences"])}).to(device)

    def _mapped(self, change: Callable[[Tensor], Tensor], move: Callable[[Sequences], Sequences]) -> "Batch":
        """With every tensor changed, and sequences moved."""
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, Stream):
                changed[name] = value._replace(weight=change(value.weight))
            elif isinstance(value, Sequences):
                changed[name] = move(value)
            elif isinstance(value, dict):
                changed[name] = {key: change(tensor) for key, tensor in value.items()}
        return Batch(**{**vars(self), **changed})
