"""One AdamW whose moments and settings change with the phase."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import AdamW

from mifo_callbacks.phase import other_number
from mifo_callbacks.sharding import full, local, shard_like
from mifo_lightning.common.errors import InputError, require, require_choices
from mifo_lightning.common.restoring import check_moment

Phase = Literal["rl", "sft"]


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW and learning-rate schedule of one phase kind; the schedule counts that kind's own optimizer steps.

    Args:
        lr: Learning rate after warm-up.
        lr_factor: Multiplies `lr`, so that a control can halve a rate without knowing it.
        betas: Decay of the first and second moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        clip: Largest L2 norm of the gradient, after frozen coordinates are masked; 0 does not clip.
        warmup_steps: Optimizer steps of linear warm-up.
        schedule: constant, or linear or cosine decay to `min_ratio` at `decay_steps`.
        decay_steps: Optimizer step at which the decay ends; needed unless the schedule is constant.
        min_ratio: Share of `lr` that is left when the decay has ended.
    """

    lr: float = 1e-6
    lr_factor: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: int | None = None
    min_ratio: float = 0.0

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        require_choices(key, self)
        for name in ("lr", "lr_factor", "eps", "weight_decay", "clip", "warmup_steps", "min_ratio"):
            value = getattr(self, name)
            require(f"{key}.{name}", value, 0 <= value < math.inf, "at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"{key}.betas: {list(self.betas)} is not allowed; both must be in [0, 1)")
        if self.schedule != "constant" and (self.decay_steps or 0) <= self.warmup_steps:
            raise InputError(
                f"{key}.decay_steps: {self.decay_steps} is not allowed; a {self.schedule} schedule needs more steps "
                f"than the {self.warmup_steps} of warm-up"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step number `step` (from 0) of this phase kind."""
        peak = self.lr * self.lr_factor
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant" or self.decay_steps is None:
            return peak
        done = min(1.0, (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps))
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return peak * (self.min_ratio + (1 - self.min_ratio) * left)


@dataclass(frozen=True)
class OptimizerSettings:
    """How weights are updated: an AdamW for each kind of phase, and what an optimizer step is made of.

    Args:
        rl: AdamW of RL phases.
        sft: AdamW of SFT phases.
        moments: Those of SFT: reset at the start of each phase, keep from one to the next, or shared with RL.
        skip_zero_gradient: Whether an optimizer step whose gradient is exactly 0 over all ranks moves nothing; without
            it momentum and weight decay go on moving the weights. Steps and schedules advance either way.
        micro_batches: Chunks that each rank cuts an optimizer step into; more need less memory, the step is the same.
        micro_batch_tokens: Instead, most tokens of a chunk, padding included: as many chunks as that takes, of
            sequences of like length, groups whole where they share their prompt; null goes by `micro_batches`.
    """

    rl: AdamWSettings = field(default_factory=AdamWSettings)
    sft: AdamWSettings = field(default_factory=AdamWSettings)
    moments: Literal["reset", "keep", "shared"] = "reset"
    skip_zero_gradient: bool = False
    micro_batches: int = 1
    micro_batch_tokens: int | None = None

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        require_choices(key, self)
        self.rl.check(f"{key}.rl")
        self.sft.check(f"{key}.sft")
        require(f"{key}.micro_batches", self.micro_batches, self.micro_batches >= 1, "at least 1")
        tokens = self.micro_batch_tokens
        require(f"{key}.micro_batch_tokens", tokens, tokens is None or tokens >= 1, "at least 1, or null")
        alone = tokens is None or self.micro_batches == 1
        require(f"{key}.micro_batches", self.micro_batches, alone, "1 with micro_batch_tokens")


class PhaseAdamW:
    """Gives each phase kind its own moments, learning rate and weight decay on one torch AdamW (MIFO, SFT optimizer).

    Lightning's automatic optimization allows one optimizer; the moments of the phase that is not running are parked
    here. RL moments survive an SFT phase in every mode but `shared`.

    Args:
        optimizer: The AdamW that Lightning steps.
        parameters: Its parameters by name.
        settings: Of both phases, and what becomes of the moments.

    Attributes:
        phase: The kind of the phase under way; None before the first.
        zero_gradients: Optimizer steps so far whose gradient was exactly 0, by phase kind.
    """

    def __init__(self, optimizer: AdamW, parameters: dict[str, nn.Parameter], settings: OptimizerSettings) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.moments, self.skip_zero_gradient = settings.moments, settings.skip_zero_gradient
        self.settings: dict[str, AdamWSettings] = {"rl": settings.rl, "sft": settings.sft}
        self.phase: str | None = None
        self.zero_gradients: dict[str, int] = {"rl": 0, "sft": 0}
        self._number: int | None = None  # of the phase: two SFT phases may follow each other
        self._parked: dict[str, dict[Tensor, dict[str, Any]]] = {}
        self._fresh = False  # whether there are no moments yet; FSDP2 makes some where it saves

    def enter(self, phase: Phase, step: int, number: int | None = None) -> float:
        """Make the optimizer ready for an optimizer step; returns the learning rate.

        Args:
            phase: The kind of its phase.
            step: Number of the step among all of that kind.
            number: Differs between two phases of one kind that follow each other.
        """
        if phase != self.phase or other_number(self._number, number):
            self._switch(phase)
        self._number = number
        self.look()
        settings = self.settings[phase]
        lr = settings.lr_at(step)
        for group in self.optimizer.param_groups:
            group.update(lr=lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        return lr

    def _switch(self, phase: Phase) -> None:
        state = self.optimizer.state
        if self.phase is not None and self.moments != "shared":
            if self.phase == "rl" or self.moments == "keep":
                self._parked[self.phase] = dict(state)
            # in place: Lightning's wrapper holds the same dictionary
            state.clear()
            state.update(self._parked.pop(phase, {}))
        self.phase = phase

    def look(self) -> None:
        """Note whether there are moments; call it after every step."""
        self._fresh = not self.optimizer.state

    def meet_norm(self, norm: float) -> int:
        """Count a gradient of exactly 0 and, where it is to be skipped, let go of it before the step.

        Args:
            norm: L2 norm of the gradient over all ranks, frozen coordinates left out.

        Returns:
            Optimizer steps of this phase kind so far whose gradient was exactly 0.
        """
        phase = self.phase or "rl"
        if norm == 0:
            self.zero_gradients[phase] += 1
            if self.skip_zero_gradient:
                self.optimizer.zero_grad(set_to_none=True)  # AdamW leaves a parameter without a gradient alone
        return self.zero_gradients[phase]

    def state_dict(self) -> dict[str, Any]:
        """Phase, counts, and the parked moments by parameter name as full tensors (collective if they are sharded)."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}
        parked = {
            phase: {
                names[p]: {k: full(v) if isinstance(v, Tensor) else v for k, v in slots.items()}
                for p, slots in state.items()
            }
            for phase, state in self._parked.items()
        }
        return {
            "phase": self.phase,
            "number": self._number,
            "zero_gradients": dict(self.zero_gradients),
            "parked": parked,
            "fresh": self._fresh and not any(local(s["exp_avg"]).any() for s in self.optimizer.state.values()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; call once the parameters are where they will stay."""
        self.phase, self._number = state["phase"], state.get("number")
        self.zero_gradients |= state.get("zero_gradients", {})
        if state.get("fresh"):
            self.optimizer.state.clear()
        self._parked = {
            phase: {
                self.parameters[name]: {k: _place(v, self.parameters[name]) for k, v in slots.items()}
                for name, slots in parked.items()
            }
            for phase, parked in state["parked"].items()
        }


def _place(value: Any, parameter: nn.Parameter) -> Any:
    """A moment goes where its parameter is, sharded alike; AdamW's step counter (a scalar) likewise."""
    check_moment(parameter, "a moment", value)
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        return shard_like(value, parameter)
    return value.to(parameter.device)
