"""SDFT's teacher: a moving average of the weights that are trained, which sees the demonstration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mifo_callbacks.sharding import full, full_on_first_rank, local, shard_like, trainable
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.policy import Policy, Sequences


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
        """Take the weights of before training."""
        if self.apart:
            self.weights = {name: p.detach().clone() for name, p in trainable(policy).items()}

    @torch.no_grad()
    def follow(self, policy: Policy) -> None:
        """Take in the model after an optimizer step, of either kind of phase."""
        if self.rate and self.apart:
            for name, p in trainable(policy).items():
                local(self.weights[name]).mul_(1 - self.rate).add_(local(p), alpha=self.rate)

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
            began = "below 1" if weights else "1"
            raise InputError(
                f"model.sft_loss.distillation.teacher_rate: {self.rate:g} is not allowed here; the run began with one "
                f"{began}, and a teacher's average begins and ends with a run"
            )
        self.weights = {name: shard_like(weights[name], p) for name, p in trainable(policy).items() if weights}

    @contextmanager
    def _in_place(self, policy: Policy) -> Iterator[None]:
        """Its weights in the policy's place, bit for bit given back; one tensor more is held at a time."""
        self._exchange(policy)
        try:
            yield
        finally:
            self._exchange(policy)

    @torch.no_grad()
    def _exchange(self, policy: Policy) -> None:
        if self.apart:
            for name, p in trainable(policy).items():
                here, there = local(p), local(self.weights[name])
                kept = here.clone()
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
