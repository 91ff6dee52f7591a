"""Configuration and command lines that are hostile: data files stay data, and what cannot be read is one line."""

import json
import os
from pathlib import Path

import pytest
from command_line import TINY, printed, refused, short

from mifo_lightning.cli.command_line import make_cli

ROW = {
    "data_source": "own",
    "prompt": [{"role": "user", "content": "a:12+34="}],
    "reward_model": {"style": "rule", "ground_truth": "46"},
}


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a module `evil` makes when it is imported; the module can be found."""
    trace = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass X: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return trace


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"class_path": "evil.X"}'),
        ("rows.txt", "class_path: evil.X"),
        ("rows.json", '[{"class_path": "evil.X"}]'),
        ("evil.jsonl", json.dumps(ROW)),  # as a dotted path it would name a module
    ],
)
def test_data_names_no_class_to_import(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, imported: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    shown = printed(capsys, *short(tmp_path), "--data.train", name)
    assert shown["data"]["train"] == name
    over = tmp_path / "over.yaml"
    over.write_text(f"data: {{train: {name}, val: [{name}]}}")
    shown = printed(capsys, "fit", "--config", TINY, "--config", str(over))
    assert (shown["data"]["train"], shown["data"]["val"]) == (name, [name])
    assert not imported.exists()


def test_a_line_of_data_that_is_a_path_is_not_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text("{}")
    source = tmp_path / "rows.jsonl"
    source.write_text(str(tmp_path / "secret.jsonl"))
    assert "rows.jsonl, line 1: not JSON" in refused(capsys, *short(tmp_path / "run"), "--data.train", str(source))


def test_one_row_of_jsonl_is_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROW) + "\n")
    cli = make_cli(short(tmp_path / "run", data__train=str(source))[1:], run=False)
    cli.datamodule.trainer = cli.trainer
    cli.trainer.strategy.connect(cli.model)
    cli.datamodule.setup("fit")
    assert cli.datamodule.sources["train"] == str(source)


def test_brackets_without_end_are_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("[" * 200_000)
    assert "rows.jsonl, line 1: not JSON" in refused(capsys, *short(tmp_path / "run"), "--data.train", str(source))


@pytest.mark.parametrize("key", ["model", "data", "reward", "freeze"])
def test_only_config_reads_a_file_as_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, imported: Path, key: str
) -> None:
    (tmp_path / "part.yaml").write_text("class_path: evil.X\n")
    assert refused(capsys, "fit", "--config", TINY, f"--{key}", "part.yaml")
    assert not imported.exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BOMB.encode(), "aliases written out"),
        (b"a: " + b"[" * 200_000, "levels deep"),
        (b"a: " + b"[" * 3_000 + b"]" * 3_000, "levels deep"),
        (b"data: &a\n  train: *a", "inside its own value"),
        (b"\x7fELF\x02\x01\x01\x00", "over.yaml"),
        (b"model: {model: !!binary gIGC}", "model.model"),
        (b'data: {train: "a\\0b"}', "U+0000"),
        (b'data: {train: "a\\ud800b"}', "not YAML"),
        (b"seed_everything: " + b"9" * 10_000, "digits"),
        (b"# " + b"x" * 2**21, "allowed"),
        (b"model: !!python/object/apply:os.system [true]", "os.system"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_hostile_configuration_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, expected: str
) -> None:
    over = tmp_path / "over.yaml"
    over.write_bytes(content)
    assert expected in refused(capsys, *short(tmp_path / "run"), "--config", str(over))


@pytest.mark.parametrize("where", ["", "    def __init__(self):\n        "])
def test_code_that_ends_the_program_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its status would be that of a run that has ended well."""
    source = "import sys\nfrom mifo_lightning.rewards.last_answer import LastAnswerReward\n"
    name = "exits_in_constructor" if where else "exits_at_import"
    (tmp_path / f"{name}.py").write_text(f"{source}class R(LastAnswerReward):\n    x = 1\n{where}sys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(capsys, *short(tmp_path, reward=f"{name}.R"))
    assert f"{name}.py, line " in line
    assert "sys.exit(0)" in line


def test_a_configuration_that_is_no_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        assert "not a regular file" in refused(capsys, *short(tmp_path / "run"), "--config", str(path))
    assert refused(capsys, *short(tmp_path / "run"), "--config", "a\0b")


@pytest.mark.parametrize(
    "changes",
    [
        *({"seed_everything": "-1"}, {"seed_everything": str(2**32)}, {"seed_everything": str(2**70)}),
        *(
            {"trainer.accumulate_grad_batches": "0"},
            {"model.rollout.group_size": "100000000000"},
            {"model.rollout.group_size": "0"},
        ),
        *({"data.train": "a\0b"}, {"model.model": "a\0b"}, {"data.train": "a\ud800b"}, {"model.model": "\udcff"}),
        *(
            {"trainer.default_root_dir": "a\0b"},
            {"data.prompts.chat_template": "a\0b"},
            {"data.prompts.chat_template": "{{ \ud800 }}"},
        ),
        *({"trainer.max_steps": "1" * 5_000}, {"data.train": "[" * 50_000}, {"trainer.devices": "-7"}),
        *(
            {"ckpt_path": "a\0b"},
            {"data.prompts.system_prompt": "\ud800"},
            {"data.eval_batch": "1e99"},
            {"model.optimizer.rl": "[1"},
        ),
    ],
    ids=str,
)
def test_a_hostile_value_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, str]
) -> None:
    refused(capsys, *short(tmp_path), *(text for k, v in changes.items() for text in (f"--{k}", v)))
