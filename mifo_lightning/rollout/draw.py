"""Drawing responses so that all ranks leave it together."""

from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from mifo_lightning.errors import Interrupted
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from mifo_lightning.stopping.safe_points import agree


def draw(
    engine: RolloutEngine,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    keys: list[int],
    samples: int,
    sampling: Sampling,
) -> list[list[Completion]]:
    """`RolloutEngine.generate`, which an engine may leave by `poll`; collective.

    Raises:
        Interrupted: On all ranks, or on none.
    """
    drawn: list[list[Completion]] = []
    with suppress(Interrupted):  # the others learn of it where all meet
        drawn = engine.generate(policy, tokenizer, prompts, keys, samples, sampling)
    agree(policy.device)
    return drawn
