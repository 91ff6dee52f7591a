"""Multiple choice: the letter or the text of an option, as in MMLU-Pro, GPQA and ARC."""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.marker import MarkedReward, MissingMarker

SAID = re.compile(r"\b(?:answer|option|choice)\b\s*(?:is|:)[\s:]*(.+)", re.IGNORECASE)
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
ALONE = re.compile(r"\(?([A-Za-z0-9])\)?")
LABELLED = re.compile(r"\(?([A-Z0-9])(?:[.:),;]+(?:\s.*)?|\s+(?:because|since|as|which)\b.*)", re.DOTALL)


class ChoiceReward(MarkedReward):
    r"""1 if the chosen option is the right one, else 0.

    The choice is, of these, the first that a response has: the last `\boxed{}`, the last `<answer>`, what follows the
    last `answer is` or `Answer:`, the last line. It is read as a letter, `(B)`, `B. its text`, or the text of an
    option. The truth is a letter or a text, too. Texts need the row's column of options; without it, only equal letters
    or texts are right. A place in the list, as 2 for the third option, is no truth.

    Args:
        answer_after: Only the text after the last such marker is graded; all of it if this is None or absent.
        missing_marker: zero or whole, for a thought that never ended.
        options: The row's column of options: a list of texts, {label: text}, or {label: [...], text: [...]}.

    Raises:
        InputError: From a call, a ground truth that names none of the options.
    """

    isolate = False

    def __init__(
        self,
        answer_after: str | None = "</think>",
        missing_marker: MissingMarker = "zero",
        options: str = "options",
    ) -> None:
        super().__init__(answer_after, missing_marker)
        self.options = options

    def check_truth(self, truth: str, columns: Mapping[str, Any]) -> None:
        """Raise an InputError where the options have no such truth, or are none, or a text has none to be found in."""
        if self.options != "options" and self.options not in columns and not ALONE.fullmatch(truth.strip()):
            there = ", ".join(columns) or "none"
            raise InputError(f"ChoiceReward: options: there is no column `{self.options}`; there are {there}")
        is_choice("", truth, labelled(columns.get(self.options)))

    def __call__(
        self,
        responses: list[str],
        truths: list[str],
        prompts: list[str] | None = None,
        columns: list[Mapping[str, Any]] | None = None,
    ) -> list[float]:
        answers = self.answers(responses, prompts)
        given = [(row or {}).get(self.options) for row in columns or [{}] * len(responses)]
        return [
            float(answer is not None and is_choice(chosen(answer), truth, labelled(options)))
            for answer, truth, options in zip(answers, truths, given, strict=True)
        ]


def chosen(response: str) -> str:
    """The part of a response that names its choice."""
    if "\\boxed{" in response:
        return _inside(response.rpartition("\\boxed{")[2])
    if tagged := TAGGED.findall(response):
        return str(tagged[-1])
    lines = response.strip().splitlines()
    said = [match[1] for line in lines if (match := SAID.search(line))]
    return said[-1] if said else (lines or [""])[-1]


def labelled(options: Any) -> dict[str, str]:
    """Options by label, A, B, C, ... where they have none; InputError for what lists none, such as a text of a CSV."""
    if (
        options is not None
        and not isinstance(options, Mapping)
        and (isinstance(options, str) or not isinstance(options, Sequence))
    ):
        raise InputError(
            f"ChoiceReward: options are {options!r:.80}, allowed is a list of texts or a mapping of labels"
        )
    if isinstance(options, Mapping) and isinstance(options.get("text"), Sequence) and "label" in options:
        return {str(label): str(text) for label, text in zip(options["label"], options["text"], strict=True)}
    if isinstance(options, Mapping):
        return {str(label): str(text) for label, text in options.items() if text is not None}
    return dict(zip(ascii_uppercase, map(str, options or []), strict=False))


def is_choice(choice: str, truth: str, options: Mapping[str, str]) -> bool:
    """Whether `choice` names the same option as `truth`; a text that two options share names neither.

    Raises:
        InputError: The truth names none of the options.
    """
    given, right = _label(choice, options), _label(truth, options)
    if options and right is None:
        listed = ", ".join(f"{label}: {text!r:.40}" for label, text in options.items())
        allowed = f"the label or the text of one option of {listed:.400}"
        raise InputError(f"ChoiceReward: ground truth is {truth!r:.80}, allowed is {allowed}")
    if options:
        return given is not None and given == right
    return (given is not None and given == right) or _plain(choice) == _plain(truth) != ""


def _label(text: str, options: Mapping[str, str]) -> str | None:
    """The label of the option that `text` names."""
    plain = _plain(text)
    same = [label for label, option in options.items() if _plain(option) == plain]
    if same:
        return same[0] if len(same) == 1 else None
    bare = WRAPPED.sub(r"\1", text).strip(" \n\t$*.")
    match = ALONE.fullmatch(bare) or LABELLED.fullmatch(bare)
    label = match[1].upper() if match else None
    return label if label in options or not options else None


def _plain(text: str) -> str:
    return " ".join(WRAPPED.sub(r"\1", text).strip(" \n\t$*.").casefold().split())


def _inside(text: str) -> str:
    """What stands before the brace that closes."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[:place]
    return text
