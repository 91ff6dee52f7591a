"""What the training loop knows of a question: plain values, tokenised once when the data is loaded."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Question:
    """One question ready for rollouts and, if it has a demonstration, for SFT.

    Attributes:
        id: Position of the question in its set after all filters; stable for the same data and configuration.
        source: Name of the data source; metrics are kept per source.
        text: The prompt as the model sees it, after the chat template.
        prompt: Token ids of the prompt, generation prompt included.
        truth: Ground truth handed to the reward.
        demonstration: Token ids of the verified solution D(q) and one end token; None if there is none.
        answer_start: Index into `demonstration` of the first token of the final answer; None where no marker names it.
        teacher_prompt: Token ids of the prompt with the demonstration in it, for a teacher (SDFT); None where there is
            no demonstration, or no teacher.
        columns: The row's further columns by name, and its `data_source`, for rewards that want them.
    """

    id: int
    source: str
    text: str
    prompt: list[int]
    truth: str
    demonstration: list[int] | None = None
    answer_start: int | None = None
    teacher_prompt: list[int] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
