"""What a rollout engine is asked and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mifo_lightning.common.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mifo_lightning.policy.policy import Policy


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        temperature: Logits are divided by it; 0 takes the most likely token (greedy).
        top_p: Keep the smallest set of tokens whose probability reaches it; 1 keeps all. Must be 1 in RL.
        top_k: Keep the k most likely tokens; 0 keeps all. Must be 0 in RL.
        max_new_tokens: Longest response in tokens; one that has not ended by then is truncated and counts as wrong.
        stop: Strings that end a response with the token that completes one; what is graded ends before the string.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    stop: list[str] = field(default_factory=list)

    def check(self, key: str) -> None:
        """Raise an InputError naming `key` where a value is impossible."""
        allowed = [
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ]
        texts = not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop)
        require(f"{key}.stop", repr(self.stop), texts, "a list of texts, none of them empty")
        for name, good, what in allowed:
            require(f"{key}.{name}", getattr(self, name), good, what)


@dataclass(slots=True)
class Completion:
    """One response.

    Attributes:
        tokens: Token ids, with the end token, or those of the stop string, if it came.
        logp: Log-probability in nats of each token under the distribution it was drawn from.
        finished: Whether it ended by itself; False means truncated.
    """

    tokens: list[int]
    logp: list[float]
    finished: bool


class Decoded(NamedTuple):
    """How far one call of an engine is.

    Attributes:
        responses: Responses that are complete and have left the batch.
        asked: Responses that the call was asked for.
        step: Tokens of the longest response in the batch.
        limit: Most tokens that a response may have.
        tokens: Response tokens drawn in this call so far, 0 when it begins.
    """

    responses: int
    asked: int
    step: int
    limit: int
    tokens: int


Listener = Callable[[Decoded], None]


class RolloutEngine(ABC):
    """Draws responses from the current policy; an engine of one's own is a subclass.

    One that has an attribute `listener` tells it, where it is not None, how far a call is, so that long decoding shows.

    One that decodes for long calls `safe_points.poll` now and then, whose exception it lets pass.

    One with weights of its own takes them over at the start of `generate` if `policy.version` is another than when it
    last did. One that has a `close()` is closed when a fit or an evaluation is over, and may be asked again after it.

    Calls are collective: every rank calls with its own prompts, which may be none.

    Attributes:
        own_numerics: Whether its log-probabilities are those of other arithmetic than the policy's forward, or of
            weights of its own. Such an engine is compared with the policy again as weights change
            (`model.rollout.check_every`), by the typical difference alone, and corrected for (`model.loss.correction`).
    """

    own_numerics: bool = False

    @abstractmethod
    def generate(
        self,
        policy: "Policy",
        tokenizer: "PreTrainedTokenizerBase",
        prompts: list[list[int]],
        keys: list[int],
        samples: int,
        sampling: Sampling,
    ) -> list[list[Completion]]:
        """Draw `samples` responses for each prompt.

        Args:
            policy: The model with its current weights.
            tokenizer: Knows the end tokens (`ending.end_tokens`) and padding; decodes for stop strings.
            prompts: Token ids, one list per question.
            keys: One integer per prompt that seeds its randomness: the same key and weights give the same responses,
                whatever else is in the batch and on whichever rank.
            samples: Responses per prompt.
            sampling: How to draw.

        Returns:
            For each prompt its responses, in order.
        """
