"""The chat template: text or file, every message in it, and the date of the day on which the run began."""

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALONE, make_data, make_module, weights
from lightning import Trainer
from question_rows import CHAT, build, make_tokenizer, one, row

from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.ending import end_tokens
from mifo_lightning.policy.loading import load_tokenizer
from mifo_lightning.policy.template import read_template

BASE = Path(__file__).parents[1] / "mifo_lightning" / "assets" / "base"
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
DATED = "{{ strftime_now('%d') }}" + PLAIN


@pytest.mark.parametrize("written", [CHAT, CHAT.replace("\n", "\r\n"), "\ufeff" + CHAT])
def test_a_template_is_a_text_or_a_file(tmp_path: Path, written: str) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(written.encode())
    tokenizer = make_tokenizer()
    for given in (str(path), CHAT):
        assert read_template(given, tokenizer, "data.prompts.chat_template") == CHAT
    data = make_data(**ALONE, chat_template=str(path), max_prompt_tokens=99)
    data.setup("validate")
    assert data._template == CHAT
    assert read_template(None, tokenizer, "data.prompts.chat_template") is None


def test_a_template_by_the_tokenizers_name_for_it() -> None:
    tokenizer = make_tokenizer(chat_template={"default": CHAT, "bare": PLAIN})
    assert read_template("bare", tokenizer, "data.prompts.chat_template") == "bare"
    assert one([row("2+2?")], tokenizer, chat_template="bare").text == "2+2?"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.jinja", "'absent.jinja' is neither a Jinja template"),
        ("", "'' is neither a Jinja template"),
        ("Question: what?", "is neither a Jinja template, for it prints nothing"),
        ("x" * 5000, "x.* (is neither|cannot be read)"),
        ("a\0b", "is neither"),
        (".", "is neither a Jinja template"),
        ("latin.jinja", r"latin\.jinja' is not UTF-8 text \(byte 11\)"),
        ("bare.jinja", r"bare\.jinja' holds no Jinja template"),
    ],
)
def test_what_is_neither_template_nor_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.jinja").write_bytes(b"{{ x }} caf\xe9")
    Path("bare.jinja").write_text("Question:")
    with pytest.raises(InputError, match=rf"^data\.prompts\.chat_template: .*{message}") as caught:
        make_data(**ALONE, chat_template=given).setup("fit")
    assert len(str(caught.value)) < 300


SKIPS = "{% for m in messages %}{% if m.role == ROLE %}{{ m.content }}{% endif %}{% endfor %}"


def test_a_template_that_ignores_a_message_is_refused() -> None:
    with pytest.raises(InputError, match=r"^data\.train, row 1: the chat template ignores the message of role 'user'"):
        build([row()], chat_template="{{ eos_token }}How many?")
    users = SKIPS.replace("ROLE", "'user'")
    assert one([row("2+2?")], chat_template=users).text == "2+2?"
    other = row() | {"prompt": [{"role": "human", "content": "2+2?"}]}
    with pytest.raises(InputError, match="row 3: the chat template ignores the message of role 'human'"):
        build([row(), row("9?"), other], chat_template=users)
    for rows, system in (([row(system="Be brief.")], None), ([row()], "Be brief.")):
        with pytest.raises(InputError, match="row 1: the chat template ignores the message of role 'system'"):
            build(rows, chat_template=users, system_prompt=system)


def test_one_beginning_of_sequence(tmp_path: Path) -> None:
    """The template prints it; a tokenizer that would add another is not asked to."""
    tokenizer = make_tokenizer(bos_token="<|start|>", chat_template="{{ bos_token }}" + PLAIN)
    question = one([row("2+2?", solution=">4")], tokenizer)
    assert question.prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in (question.demonstration or [])


def days(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Today is that day of the month, on each call the next."""
    today = iter(numbers)

    class Calendar(date):
        @classmethod
        def today(cls) -> "date":  # type: ignore[override]
            return date(2026, 1, next(today))

    monkeypatch.setattr("mifo_lightning.data.datamodule.date", Calendar)


def test_a_run_that_is_resumed_on_another_day_keeps_its_date(
    monkeypatch: pytest.MonkeyPatch, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    path, runs = tmp_path / "a.ckpt", []
    for number, (begin, end, template) in enumerate([(None, 4, DATED), (None, 2, DATED), (path, 4, DATED)]):
        days(monkeypatch, 13 + number // 2)
        data = make_data(**ALONE, chat_template=template, max_prompt_tokens=20)
        module, trainer = make_module(), make_trainer(max_epochs=-1, max_steps=end)
        if begin:
            with pytest.warns(UserWarning, match=r"data\.prompts\.chat_template prints the date; it stays 2026-01-13"):
                trainer.fit(module, data, ckpt_path=begin)
        else:
            trainer.fit(module, data)
        trainer.save_checkpoint(path)
        assert all(q.text.startswith("13") for q in data.train_dataloader().questions)
        runs.append(weights(module))
    assert all(torch.equal(value, runs[2][name]) for name, value in runs[0].items())


def test_the_date_is_all_that_changes_in_a_template() -> None:
    template = "\n{%- macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}\n {{ day() }} {{ bos_token }}|" + CHAT
    template += '{% set form = "%Y-%m-%d %H" %}{% if strftime_now is defined %}{{ strftime_now(form) }}{% endif %}'
    text = one([row("2+2?")], chat_template=template, today=date(2026, 1, 9)).text
    plain = template.replace("strftime_now('%d %b %Y')", "'09 Jan 2026'").replace(
        "strftime_now(form)", "'2026-01-09 00'"
    )
    assert text == one([row("2+2?")], chat_template=plain).text
    with pytest.raises(InputError, match=r"row 1: .* the format of the date must be written out"):
        build([row()], chat_template="{{ strftime_now('%d' ~ '%m') }}" + CHAT)


def test_a_template_without_a_date_says_nothing_of_the_day(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    days(monkeypatch, 13)
    data = make_data(**ALONE)
    data.setup("validate")
    data.load_state_dict({"loader": None, "today": "2026-01-12"})
    assert not [w for w in recwarn if "date" in str(w.message) and "template" in str(w.message)]
    assert data._today == date(2026, 1, 13)


# --- the tokenizer's own file -----------------------------------------------------------------------------------------


def test_a_tokenizer_that_gives_other_ids_than_its_file_is_said_and_the_file_taken(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    load_tokenizer(str(tmp_path / "model"))
    assert not [w for w in recwarn if "tokenizer" in str(w.message)]
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"Qwen2Tokenizer of .* otherwise than its tokenizer\.json, which is taken"):
        tokenizer: Any = load_tokenizer(str(tmp_path / "model"))
    for text in ("12 > 7", "system user assistant: how many apples"):
        assert tokenizer(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
    assert end_tokens(tokenizer) == {1}


def test_a_tokenizer_of_another_class_is_one_line(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GemmaTokenizer"}))
    with pytest.raises(InputError, match=r"model\.model: .* has no tokenizer .*<unk>"):
        load_tokenizer(str(tmp_path))
