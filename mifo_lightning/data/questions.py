"""Rows become questions: chat template, token ids, length limits, verified demonstrations; all counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.common.terminal import table_text
from mifo_lightning.data.settings import Demonstrations, Prompts
from mifo_lightning.data.source import Row
from mifo_lightning.losses.distillation import fill_template
from mifo_lightning.policy.ending import end_texts, end_tokens, response_texts, turn_end
from mifo_lightning.policy.template import ChatTemplate, with_system
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.grading import FailureWatch, grade_answers

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import BatchEncoding, PreTrainedTokenizerBase

EMPTY_PROMPT, LONG_PROMPT = "empty prompt", "prompt too long"
EMPTY_DEMO, LONG_DEMO, WRONG_DEMO = "demonstration empty", "demonstration too long", "demonstration wrong"
ENDED_DEMO = "end token inside demonstration"  # no rollout could go on after it
REASONS = (EMPTY_PROMPT, LONG_PROMPT, EMPTY_DEMO, LONG_DEMO, ENDED_DEMO, WRONG_DEMO)

# questions, each with the text of its demonstration, if any -> other texts for some of them, by question id
Rewrite = Callable[[list[tuple[Question, str | None]]], dict[int, str]]

THINK = "<think>"
TAKEN = ("prompt", "reward_model", "target")  # columns that a question holds in another form
CHUNK = 512  # responses encoded at once: an encoding takes many times the memory of its ids


@dataclass
class Drops:
    """What became of the rows, per data source.

    A dropped prompt takes its question with it; a dropped demonstration leaves the question without one.

    Attributes:
        where: Name of the data, for messages.
        rows: Rows read, by source.
        questions: Questions kept, by source.
        demonstrations: Demonstrations kept, by source.
        damaged: Demonstrations among them that are damaged on purpose, by source.
        dropped: Prompts and demonstrations dropped, by (source, reason); the reasons are `REASONS`.
    """

    where: str
    rows: Counter[str] = field(default_factory=Counter)
    questions: Counter[str] = field(default_factory=Counter)
    demonstrations: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)

    def by_reason(self) -> dict[str, int]:
        """Counts over all sources of the reasons that occurred."""
        counts = {reason: sum(self.dropped[source, reason] for source in self.rows) for reason in REASONS}
        return {reason: count for reason, count in counts.items() if count}

    def table(self) -> Table:
        """One line per source: rows read, drops by reason, what is kept."""
        from rich.table import Table

        reasons = self.by_reason()
        table = Table("source", title=f"Questions of {table_text(self.where)}")
        damaged = ("of these damaged",) if self.damaged.total() else ()
        for header in ("rows", *reasons, "questions", "with demonstration", *damaged):
            table.add_column(header, justify="right")
        for source in self.rows:
            drops = (self.dropped[source, reason] for reason in reasons)
            counts = [self.rows[source], *drops, self.questions[source], self.demonstrations[source]]
            counts += [self.damaged[source]] if damaged else []
            table.add_row(table_text(source), *map(str, counts))
        return table

    def print(self) -> None:
        """Print the table to the console."""
        import rich

        rich.print(self.table())


def build_questions(
    rows: list[Row],
    template: ChatTemplate,
    prompts: Prompts,
    demonstrations: Demonstrations,
    *,
    reward: Reward,
    success_threshold: float = 1.0,
    damage: Rewrite | None = None,
    teacher: str | None = None,
    where: str,
) -> tuple[list[Question], Drops]:
    """Questions in the order of `rows`, and an account of what was dropped (MIFO, demonstrations D(q)).

    Nothing is ever truncated: a cut prompt asks something else, a cut demonstration teaches to stop in
    mid-thought.

    Args:
        rows: Rows as `read_rows` returns them.
        template: How messages become text; its tokenizer must have a pad and an end-of-sequence token.
        prompts: System message and longest prompt.
        demonstrations: Which demonstrations are kept.
        reward: Verifies demonstrations, as it will grade rollouts.
        success_threshold: Reward from which a response counts as correct.
        damage: Other texts for some demonstrations, by question id; None leaves all as they are.
        teacher: Template of a teacher's prompt (`SelfDistillation`); None: there is no teacher.
        where: Name of the data, for messages.

    Raises:
        InputError: The tokenizer lacks a token or template, the template refuses a prompt or ignores a message, what
            would end demonstrations ends no response, or no question is left.
    """
    tokenizer = template.tokenizer
    _check_tokenizer(tokenizer, template.source, where)
    texts = prompt_texts(rows, template, prompts.system_prompt, where)
    drops = Drops(where)
    kept = _keep_prompts(rows, texts, _encode(tokenizer, texts), prompts.max_tokens, drops)
    questions = [question for question, _ in kept]
    if not questions:
        reasons = ", ".join(f"{reason} {count}" for reason, count in drops.by_reason().items()) or "no rows"
        raise InputError(
            f"{where}: no question left of {len(rows)} ({reasons}); data.prompts.max_tokens is {prompts.max_tokens}"
        )
    pairs = [(question, row["target"][0]["content"] if row["target"] else None) for question, row in kept]
    damaged = damage(pairs) if damage else {}
    pairs = [(question, damaged.get(question.id, text)) for question, text in pairs]
    given = [(question, text) for question, text in pairs if text is not None]
    if given:
        end = _turn_end(template, where)
        _attach_demonstrations(given, tokenizer, end, demonstrations, drops)
    if demonstrations.verify:
        _verify_demonstrations(questions, tokenizer, reward, success_threshold, drops, where)
    if teacher is not None:
        _show_to_teacher(kept, template, prompts.system_prompt, teacher, where)
    shown = [question for question in questions if question.demonstration]
    drops.demonstrations.update(question.source for question in shown)
    drops.damaged.update(question.source for question in shown if question.id in damaged)
    return questions, drops


def prompt_texts(rows: list[Row], template: ChatTemplate, system_prompt: str | None, where: str) -> list[str]:
    """Each row's prompt as the model sees it; an empty text where nothing but a system message is in it.

    Raises:
        InputError: The template refuses a prompt, or ignores one of its messages; the message names the row.
    """
    texts, checked = [], set()
    for number, row in enumerate(rows, 1):
        messages, place = row["prompt"], f"{where}, row {number}"
        if not any(message["content"].strip() for message in messages if message["role"] != "system"):
            texts.append("")
            continue
        messages = with_system(messages, system_prompt)
        roles = tuple(message["role"] for message in messages)
        if roles not in checked:  # what a template prints depends on the roles, not on the words
            checked.add(roles)
            template.check_bounded(messages, place)
            template.check_shown(messages, place)
        texts.append(template.render(messages, place))
    return texts


def _keep_prompts(
    rows: list[Row], texts: list[str], encoded: list[list[int]], max_prompt_tokens: int, drops: Drops
) -> list[tuple[Question, Row]]:
    """The questions whose prompt is neither empty nor too long, each with its row."""
    pairs: list[tuple[Question, Row]] = []
    for row, text, ids in zip(rows, texts, encoded, strict=True):
        source, truth = row["data_source"], row["reward_model"]["ground_truth"]
        drops.rows[source] += 1
        if not text or len(ids) > max_prompt_tokens:
            drops.dropped[source, LONG_PROMPT if text else EMPTY_PROMPT] += 1
            continue
        drops.questions[source] += 1
        columns = {name: value for name, value in row.items() if name not in TAKEN}
        question = Question(len(pairs), source, text, ids, truth, columns=columns)
        pairs.append((question, row))
    return pairs


def _attach_demonstrations(
    pairs: list[tuple[Question, str]],
    tokenizer: PreTrainedTokenizerBase,
    end: int,
    settings: Demonstrations,
    drops: Drops,
) -> None:
    """Give each question its demonstration, unless that is empty, too long or holds an end token before its `end`."""
    ends, written = end_tokens(tokenizer), end_texts(tokenizer)
    given = [(question, _response_text(text, question.text, written)) for question, text in pairs]
    encoded = _encode_responses(tokenizer, [text for _, text in given], settings.answer_after)
    for (question, text), (ids, answer_start) in zip(given, encoded, strict=True):
        if not text.strip() or len(ids) >= settings.max_tokens:
            drops.dropped[question.source, LONG_DEMO if text.strip() else EMPTY_DEMO] += 1
        elif not ends.isdisjoint(ids):
            drops.dropped[question.source, ENDED_DEMO] += 1
        else:
            question.demonstration, question.answer_start = [*ids, end], answer_start


def _show_to_teacher(
    kept: list[tuple[Question, Row]], template: ChatTemplate, system_prompt: str | None, teacher: str, where: str
) -> None:
    """Give each question with a demonstration the prompt of a teacher that sees it: in its last message."""
    shown = [(question, row) for question, row in kept if question.demonstration]
    solutions = response_texts(template.tokenizer, [question.demonstration or [] for question, _ in shown])
    texts = []
    for (_, row), solution in zip(shown, solutions, strict=True):
        *before, last = with_system(row["prompt"], system_prompt)
        content = fill_template(teacher, last["content"], solution)
        texts.append(template.render([*before, {**last, "content": content}], where))
    for (question, _), ids in zip(shown, _encode(template.tokenizer, texts), strict=True):
        question.teacher_prompt = ids


def _verify_demonstrations(
    questions: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    reward: Reward,
    success_threshold: float,
    drops: Drops,
    where: str,
) -> None:
    """Take the demonstration away from each question where it scores below `success_threshold`; say so if all do."""
    shown = [question for question in questions if question.demonstration]
    responses = [question.demonstration or [] for question in shown]
    watch = FailureWatch(reward)
    scores = grade_answers(reward, shown, response_texts(tokenizer, responses), [len(ids) for ids in responses])
    watch.end(len(shown), "demonstrations")
    judged = torch.tensor(scores.judged, dtype=torch.float32)  # as rollouts are: a sum of tenths reaches 1
    for question, right in zip(shown, (judged >= success_threshold).tolist(), strict=True):
        if not right:
            question.demonstration = question.answer_start = None
            drops.dropped[question.source, WRONG_DEMO] += 1
    if shown and not (judged >= success_threshold).any():
        best = max(scores.judged)
        rank_zero_warn(
            f"{where}: none of {len(shown)} demonstrations is right: the highest score is {best:g}, "
            f"model.rollout.success_threshold {success_threshold:g}; lower it if no response can score that much"
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, where: str) -> None:
    name = f"{where}: tokenizer `{tokenizer.name_or_path or type(tokenizer).__name__}`"
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name} has no eos_token; set it in its tokenizer_config.json")
    if chat_template is None and tokenizer.chat_template is None:
        raise InputError(
            f"{name} has no chat template; set data.prompts.chat_template to a Jinja text, see docs/data.md"
        )


def _turn_end(template: ChatTemplate, where: str) -> int:
    """Id of the token that ends demonstrations; raises an InputError that names `where` if it ends no response."""
    question, answer = "How many?", "Forty-two."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        conversation = template.render(messages, where, prompt=False)
    except InputError:  # a template for prompts alone
        conversation = ""
    try:
        return turn_end(template.tokenizer, conversation, answer)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _response_text(demonstration: str, prompt: str, ends: list[str]) -> str:
    """The demonstration as a rollout's text: without end tokens, and without a `<think>` that the prompt has opened."""
    while found := next((end for end in ends if demonstration.rstrip().endswith(end)), None):
        demonstration = demonstration.rstrip().removesuffix(found)
    _, opened, space = prompt.rpartition(THINK)
    if opened and not space.strip() and demonstration.lstrip().startswith(THINK):
        return demonstration.lstrip().removeprefix(THINK).removeprefix(space)
    return demonstration


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return _batch_encoding(tokenizer, texts)["input_ids"] if texts else []


def _encode_responses(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], answer_after: str | None
) -> Iterator[tuple[list[int], int | None]]:
    """Ids, and the index of the first token that holds text after the last marker."""
    for begin in range(0, len(texts), CHUNK):
        chunk = texts[begin : begin + CHUNK]
        encoded = _batch_encoding(tokenizer, chunk)
        for index, text in enumerate(chunk):
            ids = encoded["input_ids"][index]
            head, marker, answer = text.rpartition(answer_after) if answer_after else ("", "", "")
            start = None
            if marker and encoded.is_fast:
                places = range(len(text) - len(answer), len(text))
                tokens = (encoded.char_to_token(index, place) for place in places)
                start = next((token for token in tokens if token is not None), len(ids))
            elif marker:  # a tokenizer in pure Python knows no positions
                start = min(len(_encode(tokenizer, [head + marker])[0]), len(ids))
            yield ids, start


def _batch_encoding(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    # Special tokens stand in the text already; `verbose` would warn of long texts, which are dropped anyway.
    encoded: BatchEncoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded
