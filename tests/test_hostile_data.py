"""Data that is no file, never ends or would speak to the terminal: one line, within seconds."""

import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import date
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from rich.console import Console

from mifo_lightning.common import hub
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail, one_line_warning, printable
from mifo_lightning.data.questions import Drops, prompt_texts
from mifo_lightning.data.rows import read_rows
from mifo_lightning.lab.report.page import _plain
from mifo_lightning.monitors.summary import before_and_after
from mifo_lightning.policy.loading import load_policy, load_tokenizer
from mifo_lightning.policy.template import ChatTemplate

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\x7f\r[/x][red]"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_a_pipe_device_or_socket_is_refused_unopened(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / f"socket{suffix}"))
        for name, what in (("pipe", "a pipe"), ("zero", "a device"), ("socket", "a socket")):
            with pytest.raises(InputError, match=f"{what}, not a regular file"):
                read_rows(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("name", ["a\0b.jsonl", "\ud800.jsonl", "x" * 5000, "~nobody-there/rows.jsonl", "", "/", "~"])
def test_a_name_that_is_no_path_is_one_line(name: str) -> None:
    with pytest.raises(InputError):
        read_rows(name)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "PATIENCE", 0.5)
        yield endpoint


@pytest.mark.parametrize("load", [read_rows, load_tokenizer, load_policy])
def test_a_hub_that_does_not_answer_is_one_line(silent_hub: str, load: Any) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=r"owner/name: the hub .* has not answered .* HF_HUB_OFFLINE=1"):
        load("owner/name")
    assert time.monotonic() - began < 10


LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{{ 9**(9**9) }}",
        "{{ 'x' * 10**10 }}",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ],
    ids=["loop", "power", "repeated", "doubled"],
)
def test_a_template_without_end_is_one_line(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr("mifo_lightning.policy.template.CPU", 1)
    rows = [{"prompt": [{"role": "user", "content": "hello"}]}]
    chat = ChatTemplate(tokenizer, template + "{{ messages[0].content }}", date.today())
    with pytest.raises(InputError, match="data, row 1: the chat template does not end within"):
        prompt_texts(rows, chat, None, "data")


def shown(table: Any) -> str:
    out = StringIO()
    Console(file=out, width=200, force_terminal=False).print(table)
    return out.getvalue()


def test_tables_show_a_hostile_name_as_it_is() -> None:
    drops = Drops("data.train")
    drops.rows[HOSTILE] = drops.questions[HOSTILE] = 1
    for text in (shown(drops.table()), shown(before_and_after({}, {f"{HOSTILE}/avg@1": 0.5}))):
        assert printable(text) == text
        assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\x7f" in text
        assert "[/x][red]" in text


def test_errors_warnings_and_pages_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(f"data: column {HOSTILE}")
    said = capsys.readouterr().err.rstrip("\n")
    warned = one_line_warning(HOSTILE, UserWarning, hub.__file__, 1).rstrip("\n")
    for text in (said, warned, _plain(HOSTILE + "|\n| x")):
        assert printable(text) == text
        assert "\n" not in text
    assert "\\|" in _plain("a|b")


def test_text_of_other_languages_is_printable() -> None:
    text = "été 答案 🦆 שלום\tx\ny"
    assert printable(text) == text


def test_a_row_with_escape_sequences_in_its_error_is_printable(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"data_source": "a", HOSTILE: 1}))
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / "rows.jsonl")
    assert printable(str(caught.value)).isprintable()
