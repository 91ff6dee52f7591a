"""Self-distillation (SDFT, arXiv 2601.19897): the model learns from itself with the demonstration in its prompt."""

import re
from dataclasses import dataclass

from torch import Tensor

from mifo_lightning.common.errors import require

TEMPLATE = "{prompt}\n\nA correct solution:\n{demonstration}\n\nNow solve it yourself."


@dataclass(frozen=True)
class SelfDistillation:
    """`L = mean_t KL(p(. | x, y_<t) || sg p(. | x with c, y_<t))`, y drawn by the model, c the demonstration.

    Args:
        template: What the last message of x becomes for the teacher; `{prompt}` is what it was, `{demonstration}` is c.
        teacher_rate: Share of the model in the moving average that is the teacher's weights, after each optimizer step
            of either kind; 1: it has the running weights, 0: those of before training.
    """

    template: str = TEMPLATE
    teacher_rate: float = 0.01

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        named = all(place in self.template for place in ("{prompt}", "{demonstration}"))
        require(f"{key}.template", repr(self.template)[:80], named, "a text with {prompt} and {demonstration}")
        require(f"{key}.teacher_rate", self.teacher_rate, 0 <= self.teacher_rate <= 1, "in [0, 1]")


def fill_template(template: str, prompt: str, demonstration: str) -> str:
    """The template with both in their places; braces inside of either are text."""
    texts = {"{prompt}": prompt, "{demonstration}": demonstration}
    return re.sub(r"\{prompt\}|\{demonstration\}", lambda place: texts[place[0]], template)


def reverse_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """`KL(softmax(logits) || softmax(teacher))` over the whole vocabulary, in nats.

    Args:
        logits: [N, V] of the student.
        teacher: [N, V] of the teacher, without gradient.

    Returns:
        [N], with the exact gradient by `logits`.
    """
    student = logits.log_softmax(-1)
    return (student.exp() * (student - teacher.detach().log_softmax(-1))).sum(-1)
