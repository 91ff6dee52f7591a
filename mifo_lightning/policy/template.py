"""The chat template: read from a file or a text, rendered with the date of the run, checked to show every message."""

import json
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.bounded import ends

Messages = list[dict[str, str]]
CLOCK = "strftime_now"
CPU, WALL, MEMORY = 5, 60.0, 2**30  # seconds, seconds and bytes that one prompt may take; a template takes milliseconds


@dataclass
class ChatTemplate:
    """How a conversation becomes the text that the model sees.

    Args:
        tokenizer: The model's.
        source: Jinja text in place of the tokenizer's own; None takes the tokenizer's.
        today: The date that a template prints, at midnight; the same for a whole run.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str | None
    today: date

    def render(self, messages: Messages, where: str, *, prompt: bool = True) -> str:
        """The conversation as text, with the head of the answer if it is a `prompt`.

        Raises:
            InputError: The template refuses it; the message begins with `where`.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.text,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except MemoryError:
            raise
        except Exception as error:
            # Templates raise what they like: Jinja's errors, or Python's from inside an expression.
            raise InputError(f"{where}: the chat template refuses the prompt: {error}") from error

    def check_bounded(self, messages: Messages, where: str) -> None:
        """Raise an InputError that begins with `where` if rendering does not end, or takes more than memory holds."""
        if not ends(lambda: self.render(messages, where), CPU, WALL, MEMORY):
            raise InputError(
                f"{where}: the chat template does not end within {CPU} s and {MEMORY >> 20} MiB; "
                "set data.prompts.chat_template to another"
            )

    def check_shown(self, messages: Messages, where: str) -> None:
        """Raise an InputError that begins with `where` if the text does not depend on one of the messages."""
        text = self.render(messages, where)
        for i, message in enumerate(messages):
            other = [*messages[:i], {**message, "content": message["content"] + "x"}, *messages[i + 1 :]]
            if self.render(other, where) == text:
                raise InputError(
                    f"{where}: the chat template ignores the message of role {message['role']!r}; "
                    "set data.prompts.chat_template to one that prints it"
                )

    @property
    def dated(self) -> bool:
        """Whether the template asks for the date, for which it has one way."""
        return CLOCK in self.tokenizer.get_chat_template(self.source)

    @cached_property
    def text(self) -> str:
        """The template, with `today` as its clock; transformers lets no other clock be given."""
        source = self.tokenizer.get_chat_template(self.source)
        if not self.dated:
            return source
        literals = {text[1:-1] for _, kind, text in Environment().lex(source) if kind == "string"}
        now = datetime.combine(self.today, time())
        table = json.dumps({text: now.strftime(text) for text in sorted(literals) if "%" in text}, ensure_ascii=False)
        unknown = "raise_exception('the format of the date must be written out')"
        body = f"{{% set days = {table} %}}{{{{ days[format] if format in days else {unknown} }}}}"
        return f"{{% macro {CLOCK}(format) %}}{body}{{% endmacro +%}}{source}"


def read_template(given: str | None, tokenizer: PreTrainedTokenizerBase, key: str) -> str | None:
    """The Jinja text that `given` is or names: a template, a file that holds one, or a name of the tokenizer's.

    Raises:
        InputError: It is none of these; the message begins with `key`.
    """
    named = tokenizer.chat_template
    if given is None or _is_template(given) or (isinstance(named, dict) and given in named):
        return given
    what = f"{key}: {given!r:.120}"
    try:
        path = Path(given).expanduser()
        if not path.is_file():
            raise InputError(f"{what} is neither a Jinja template, for it prints nothing ({{{{ }}}}), nor a file")
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise InputError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not _is_template(text):
        raise InputError(f"{what} holds no Jinja template, for it prints nothing ({{{{ }}}})")
    return text


def with_system(messages: Messages, system_prompt: str | None) -> Messages:
    """The messages with `system_prompt` in place of their system message, or put first; as they are if it is None."""
    if system_prompt is None:
        return messages
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system_prompt}, *rest]


def kept_template(source: str, system_prompt: str | None) -> str:
    """The template to keep with a model: from a row's messages it makes the prompt of training.

    Messages that bring a system message keep theirs; the others get `system_prompt`, if there is one.
    """
    if system_prompt is None:
        return source
    message = f"{{'role': 'system', 'content': {json.dumps(system_prompt, ensure_ascii=False)}}}"
    lacking = "not messages or messages[0]['role'] != 'system'"
    return f"{{% if {lacking} %}}{{% set messages = [{message}] + messages %}}{{% endif +%}}{source}"


def _is_template(text: str) -> bool:
    return "{{" in text
