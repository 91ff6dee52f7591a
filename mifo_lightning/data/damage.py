"""Damaged demonstrations: wrong steps under a right final answer, a control of what SFT learns from."""

import random
import re

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.common.seeds import stable_key

DIGITS = "0123456789"
PROBABILITY = 0.5  # that a digit is replaced


def damage_demonstrations(
    solutions: list[tuple[Question, str]], share: float, seed: int, answer_after: str
) -> dict[int, str]:
    """Damaged texts for a share of the demonstrations, by question id.

    Those without a digit before the answer cannot be damaged and are not counted among them.

    Args:
        solutions: Questions, each with the text of its demonstration.
        share: Share of the demonstrations to damage, in [0, 1].
        seed: Which are chosen, and their wrong digits; the digits of one depend on nothing else but its id.
        answer_after: Marker after which the final answer stands; what follows the last one stays as it is.

    Raises:
        InputError: A demonstration lacks the marker.
    """
    for question, text in solutions:
        if answer_after not in text:
            raise InputError(
                f"data.demonstrations.damaged_share: the demonstration of question {question.id} of "
                f"{question.source!r} lacks data.demonstrations.answer_after {answer_after!r}; damage needs to know "
                "where its answer begins"
            )
    able = [(question, text) for question, text in solutions if re.search("[0-9]", text.rpartition(answer_after)[0])]
    able.sort(key=lambda solution: stable_key(seed, "damaged", solution[0].id))
    return {
        question.id: damage(text, answer_after, stable_key(seed, "damage", question.id))
        for question, text in able[: round(share * len(able))]
    }


def damage(text: str, answer_after: str, seed: int) -> str:
    """`text` with digits before the last `answer_after` replaced by others, each with probability 0.5, at least one."""
    steps, marker, answer = text.rpartition(answer_after)
    draw = random.Random(seed)
    places = [match.start() for match in re.finditer("[0-9]", steps)]
    chosen = [place for place in places if draw.random() < PROBABILITY] or [draw.choice(places)]
    characters = list(steps)
    for place in chosen:
        characters[place] = draw.choice(DIGITS.replace(characters[place], ""))
    return "".join(characters) + marker + answer
