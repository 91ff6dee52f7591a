"""The tiny GSM8K model: a tokenizer that loses nothing, stock classes load it, bad paths get one line."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.make_gsm8k_model import HELD_OUT, main

SOLUTION = "<think>\nShe has {0}+{1} shells.\n</think>\n\\boxed{{{2}}}"


def write_rows(path: Path, count: int) -> None:
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "Think between <think> and </think>."},
                {"role": "user", "content": f"Ann finds {i} shells and then {i * 7} more. How many?"},
            ],
            "target": [{"role": "assistant", "content": SOLUTION.format(i, i * 7, i * 8)}],
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["make_gsm8k_model", *map(str, arguments)])
    main()


def test_tokenizer_and_model_load_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.parquet", HELD_OUT + 64)
    run(monkeypatch, "--data", tmp_path / "rows.parquet", "--out", tmp_path / "model", "--steps", 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert model.dtype == torch.float32
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id

    text = SOLUTION.format("é→中", "🐚", 12)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert len(tokenizer.encode("</think>", add_special_tokens=False)) == 1
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": text}], tokenize=False)
    assert whole.startswith(f"{prompt}{text}{tokenizer.eos_token}")


@pytest.mark.parametrize("case", ["absent", "text", "too few", "no target"])
def test_bad_data_is_one_line_and_status_2(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.parquet"
    if case == "text":
        path.write_text("prompt,target")
    elif case == "too few":
        write_rows(path, HELD_OUT)
    elif case == "no target":
        pq.write_table(pa.table({"prompt": ["x"] * (HELD_OUT + 1)}), path)
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, "--data", path, "--out", tmp_path / "model")
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert message.count("\n") == 1
    assert not (tmp_path / "model").exists()
