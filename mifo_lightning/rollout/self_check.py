"""Before a run, and as weights change: what an engine says of its tokens must be what a teacher-forced forward says."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedConfig

from mifo_callbacks.collectives import gather_ranks
from mifo_lightning.common.errors import InputError, TrainingError
from mifo_lightning.common.seeds import stable_key
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.respond import Responder

PROMPTS, SAMPLES, TOKENS = 4, 2, 8  # few, so that the check costs less than a second on a small model
EXACT = 1e-3  # nats: largest difference in fp32
WARN, REFUSE = 0.01, 0.05  # nats: typical difference at the run's precision; bf16 is right at a mean of .001


class SelfCheck:
    """Compares a run's engine with its model, once in each precision, and keeps what it found until it is logged.

    An engine of its own numerics may hold weights of its own, which can stay old without a word: it is compared again
    with the first weights that have changed, and then with every `every`-th.

    Args:
        responder: Has the run's engine.
        sampling: How the run draws rollouts.
        every: Rollouts, and evaluations, with changed weights from one comparison to the next.
    """

    def __init__(self, responder: Responder, sampling: Sampling, every: int = 1) -> None:
        self.responder, self.sampling, self.every = responder, sampling, every
        self._precision: str | None = None  # in which they were compared last
        self._prompts: list[list[int]] = []
        self._version: int | None = None  # of the weights that were looked at last
        self._changes = 0  # weights that were others than those before, where the engine was about to draw
        self._found: dict[str, float] = {}

    def run(self, policy: Policy, prompts: list[list[int]], precision: str | int) -> None:
        """As `self_check`, unless that was done in this precision, or there is nothing to ask."""
        if prompts and self._precision != str(precision):
            self._precision, self._version = str(precision), policy.version
            self._prompts = _spread(prompts)
            self._compare(policy)

    def again(self, policy: Policy) -> None:
        """The same where the engine is about to draw, if its weights may be old; collective."""
        if not self.responder.own_numerics or not self._prompts or policy.version == self._version:
            return
        self._version = policy.version
        if self._changes % self.every == 0:
            self._compare(policy)
        self._changes += 1

    def _compare(self, policy: Policy) -> None:
        mixed = self._precision != "32-true"
        self._found = self_check(self.responder, policy, self._prompts, self.sampling, mixed)

    def take(self) -> dict[str, float]:
        """What it found and nobody has taken."""
        found, self._found = self._found, {}
        return found


def self_check(
    responder: Responder, policy: Policy, prompts: list[list[int]], sampling: Sampling, mixed: bool = False
) -> dict[str, float]:
    """Compare the engine with a teacher-forced forward on a few prompts; collective, the same on every rank.

    Nothing of the run changes: randomness comes from keys, and no state or counter is touched.

    Args:
        responder: Has the run's engine.
        policy: The model.
        prompts: Token ids, as many as there are; a few of unequal length are taken.
        sampling: How the run draws rollouts.
        mixed: Whether the run's precision (`policy.numerics`) is another than the weights' own fp32.

    Returns:
        `mean` and `max` difference of log-probabilities in nats, at the run's precision.

    Raises:
        InputError: If they differ too much, or the engine cannot decode this model.
    """
    asked, own = unequal_prompts(prompts), responder.own_numerics
    short = replace(sampling, top_p=1.0, top_k=0, max_new_tokens=min(TOKENS, sampling.max_new_tokens))
    family, name = type(policy.model).__name__, type(responder.engine).__name__
    advice = "give another model.rollout.engine or another model.model"
    try:
        with policy.in_own_precision() if not own else nullcontext():
            exact = differences(responder, policy, asked, short)
        found = differences(responder, policy, asked, short) if mixed and not own else exact
    except (InputError, TrainingError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's own code raises
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.model: {name} cannot decode {family} ({type(error).__name__}: {text}); {advice}"
        ) from error
    worst, mean, largest = (max(gather_ranks(float(x))) for x in (exact.max(), found.mean(), found.max()))
    typical = max(gather_ranks(float(found.median()))) if mixes_experts(policy.model.config) else mean
    if own and not typical <= REFUSE:
        raise InputError(
            f"model.rollout.engine: log-probabilities of {family} by {name} differ by {typical:.2g} nats from a "
            f"teacher-forced forward, allowed is {REFUSE:g}: its weights are not those that train (version "
            f"{policy.version}), or its numerics are too coarse; give it another dtype, or another engine"
        )
    if not own and not worst <= EXACT:
        raise InputError(
            f"model.model: log-probabilities of {family} by {name} differ by up to {worst:.2g} nats from a "
            f"teacher-forced forward in fp32, allowed is {EXACT:g}; {advice}"
        )
    if not typical <= REFUSE:
        raise InputError(
            f"model.model: log-probabilities of {family} by {name} differ by {typical:.2g} nats from a teacher-forced "
            f"forward at the run's precision, allowed is {REFUSE:g}; set trainer.precision 32-true, or {advice}"
        )
    if typical > WARN and not own:  # which is corrected for
        rank_zero_warn(
            f"self-check: log-probabilities of {family} by {name} differ by {typical:.2g} nats from a teacher-forced "
            "forward at the run's precision; ratios of the first update are that far from 1, trainer.precision 32-true "
            "mends it"
        )
    return {"mean": mean, "max": largest}


def unequal_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """A few prompts from the shortest to the longest, no two of equal length where they have tokens enough."""
    chosen = _spread(prompts)
    return [prompt[min(len(chosen) - 1 - i, len(prompt) - 1) :] for i, prompt in enumerate(chosen)]


def differences(responder: Responder, policy: Policy, prompts: list[list[int]], sampling: Sampling) -> Tensor:
    """[N] fp32 absolute differences in nats of the engine's log-probabilities to a teacher-forced forward, by token."""
    keys = [stable_key(0, "self-check", i) for i in range(len(prompts))]
    drawn = responder.draw(policy, prompts, keys, SAMPLES, sampling)
    pairs = [(prompt, c) for prompt, group in zip(prompts, drawn, strict=True) for c in group]
    sequences = Sequences.pack([p for p, _ in pairs], [c.tokens for _, c in pairs], padding(responder.tokenizer))
    sequences = sequences.to(policy.device)
    with policy.sampling():
        logp, _ = policy(sequences, sampling.temperature or 1.0)
    sampled = torch.tensor([x for _, c in pairs for x in c.logp], device=logp.device)
    gaps: Tensor = logp[sequences.mask()] - sampled
    return gaps.abs().nan_to_num(nan=torch.inf)


def _spread(prompts: list[list[int]]) -> list[list[int]]:
    """A few of them, by length."""
    ordered = sorted(prompts, key=len)
    n = min(PROMPTS, len(ordered))
    return [ordered[i * (len(ordered) - 1) // max(n - 1, 1)] for i in range(n)]


def mixes_experts(config: PreTrainedConfig) -> bool:
    """Whether the model routes tokens to experts: rounding may send one another way."""
    values = config.get_text_config(decoder=True).to_dict()
    return any("expert" in name and isinstance(value, int) and value > 1 for name, value in values.items())
