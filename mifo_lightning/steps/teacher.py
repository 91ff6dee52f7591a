"""SDFT's teacher: a moving average of the weights that are trained, which sees the demonstration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mifo_callbacks.sharding import full, full_on_first_rank, local, trainable
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.steps.reference import follow, take

PIECE = 2**22  # weights that are exchanged at once, 16 MiB


class Shown(NamedTuple):
    """What a teacher makes of the response tokens of a chunk.

    Attributes:
        states: [N, D] hidden states without gradient, response after response; logits [N, V] where there is no head.
        head: Makes outputs [n, V] of states; None is the model's own.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor] | None


class Teacher:
    """Weights that follow the trained ones (SDFT, arXiv 2601.19897, section 3).

    Args:
        rate: Share of the model that it takes in after each optimizer step, in [0, 1]; at 1 it is the running model
            and nothing is held, at 0 the model before training.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.weights: dict[str, Tensor] = {}  # fp32 by name in the policy, laid out as its parameters are

    @property
    def apart(self) -> bool:
        """Whether it has weights of its own."""
        return self.rate < 1

    def begin(self, policy: Policy) -> None:
        """Take the weights of before training; a weight that is trained only later is the running model's."""
        if self.apart:
            self.weights = {name: p.detach().clone() for name, p in trainable(policy).items()}
            largest = max((p.numel() for w in self.weights.values() for p in _pieces(local(w))), default=0)
            self._scratch = torch.empty(largest, device=policy.device)

    def follow(self, policy: Policy) -> None:
        """Take in the model after an optimizer step, of either kind of phase."""
        if self.rate:
            follow(self.weights, dict(policy.named_parameters()), self.rate)

    def shown(self, policy: Policy, sequences: Sequences) -> Shown:
        """Its states for responses after its own prompts, by way of the policy's modules; collective under FSDP2."""
        with self._in_place(policy), policy.sampling():
            states = policy.states(sequences)
        return Shown(states, self._head(policy))

    def state_dict(self) -> dict[str, Tensor]:
        """Full weights by name, on the first rank; collective if they are sharded."""
        return full_on_first_rank(self.weights)

    def load_state_dict(self, policy: Policy, weights: dict[str, Tensor]) -> None:
        """Go on with the weights of a checkpoint.

        Raises:
            InputError: The run had a teacher of another kind.
        """
        if bool(weights) != self.apart:
            allowed = "below 1, since the run began with" if weights else "1, since the run began without"
            raise InputError(
                f"model.sft_loss.distillation.teacher_rate: {self.rate:g} is not allowed here; it must be {allowed} "
                "a moving average for a teacher"
            )
        self.begin(policy)
        take(self.weights, weights)

    @contextmanager
    def _in_place(self, policy: Policy) -> Iterator[None]:
        """Its weights in the policy's place, which are given back bit for bit, whatever happens in between.

        By way of memory that is there already: after an error for want of memory there is none for copies.
        """
        exchanged: list[tuple[Tensor, Tensor]] = []
        try:
            for name, own in self.weights.items():
                for pair in zip(_pieces(local(policy.get_parameter(name))), _pieces(local(own)), strict=True):
                    self._exchange(*pair)
                    exchanged.append(pair)
            yield
        finally:
            for pair in exchanged:
                self._exchange(*pair)

    def _exchange(self, here: Tensor, there: Tensor) -> None:
        kept = self._scratch[: here.numel()].view(here.shape).copy_(here)
        here.copy_(there)
        there.copy_(kept)

    def _head(self, policy: Policy) -> Callable[[Tensor], Tensor] | None:
        """Its head, whole on every rank; None where that is the model's own."""
        names = {id(p): name for name, p in policy.named_parameters()}
        own = {part: names[id(p)] for part, p in policy.head.named_parameters()}
        if not any(name in self.weights for name in own.values()):
            return None
        parts = {part: full(self.weights.get(own[part], p)).detach() for part, p in policy.head.named_parameters()}
        return lambda states: torch.func.functional_call(policy.head, parts, (states,))


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """Views of some of its rows, of `PIECE` numbers or of one row."""
    rows = torch.atleast_1d(weight)
    return torch.split(rows, max(1, PIECE * len(rows) // max(1, rows.numel())))
