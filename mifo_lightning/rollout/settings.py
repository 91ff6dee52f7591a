"""How rollouts are drawn, and which of them are correct."""

from dataclasses import dataclass, field

from mifo_lightning.common.errors import InputError, require
from mifo_lightning.rollout.engine import RolloutEngine, Sampling

MOST_ROLLOUTS = 2**16  # per question; a rollout's first tokens alone would fill the memory long before


@dataclass(frozen=True)
class Rollout:
    """How rollouts are drawn, and which of them are correct.

    Args:
        group_size: G, rollouts per question.
        success_threshold: Reward from which a rollout counts as correct.
        sampling: How they are drawn.
        engine: Draws them, and responses of evaluations; null decodes in the training process.
        self_check: Whether to compare the engine with a teacher-forced forward before a run; false is for an engine
            whose log-probabilities are not the model's.
        check_every: An engine of its own numerics, such as vLLM, is compared again with changed weights: at the first
            such rollout or evaluation, and then at every so-many-th.
    """

    group_size: int = 8
    success_threshold: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    engine: RolloutEngine | None = None
    self_check: bool = True
    check_every: int = 1

    def check(self, key: str, least: int = 2) -> None:
        """Raise an InputError that names the key, its value and what is allowed.

        Args:
            key: Names these settings.
            least: Responses that a group needs, a demonstration in it included.
        """
        self.sampling.check(f"{key}.sampling")
        require(f"{key}.check_every", self.check_every, self.check_every >= 1, "at least 1")
        most = self.group_size <= MOST_ROLLOUTS
        require(f"{key}.group_size", self.group_size, most, f"at most {MOST_ROLLOUTS}")
        if self.group_size < least:
            raise InputError(
                f"{key}.group_size: {self.group_size} is not allowed; group advantages need at least 2 rollouts"
                + (" beside the demonstration" if least == 3 else "")
            )
        t, top_p, top_k = self.sampling.temperature, self.sampling.top_p, self.sampling.top_k
        if t == 0 or top_p != 1 or top_k != 0:
            raise InputError(
                f"{key}.sampling: temperature {t}, top_p {top_p}, top_k {top_k} is not allowed in RL; temperature > 0, "
                "top_p 1, top_k 0 are: the loss sees the whole vocabulary"
            )
