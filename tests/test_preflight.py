"""Check first, log then: a command that is refused leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIGS, MIFO, SHORT, TINY, refused

BASE = Path(__file__).parents[1] / "mifo_lightning" / "assets" / "base"
SAVE_DIR = "--trainer.logger.init_args.save_dir"
CSV = ["--config", str(CONFIGS / "logger" / "csv.yaml")]
FLAGS = [text for key, value in SHORT.items() if key != "trainer.logger" for text in (f"--{key}", value)]


def two_loggers(directory: Path) -> list[str]:
    """What is left behind would be of one of them."""
    loggers: list[dict[str, Any]] = [
        {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"mode": "offline"}},
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {}},
    ]
    for logger in loggers:
        logger["init_args"]["save_dir"] = str(directory)
    return ["--trainer.logger", json.dumps(loggers)]


def nothing_is_left(
    capsys: pytest.CaptureFixture[str], directory: Path, monkeypatch: pytest.MonkeyPatch, says: str, *flags: str
) -> None:
    monkeypatch.chdir(directory)
    before = sorted(directory.iterdir())
    assert says in refused(capsys, "fit", *MIFO, *FLAGS, "--trainer.default_root_dir", str(directory / "run"), *flags)
    assert sorted(directory.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data.train", "no_such.parquet"], "no_such.parquet"),
        (["--data.prompts.chat_template", "{{ raise_exception('no') }}"], "the chat template refuses the prompt"),
        (["--data.prompts.max_tokens", "2"], "data.train"),
        (["--model.rollout.sampling.max_new_tokens", "60"], "model.rollout.sampling.max_new_tokens"),
        (["--model.evaluation.sampling.max_new_tokens", "60"], "model.evaluation.sampling.max_new_tokens"),
        (["--trainer.gradient_clip_val", "1.0"], "gradient_clip_val"),
        (["--importance", "null"], "ImportanceEMA"),
        (["--data.val", "null", "--forgetting", "{}"], "forgetting"),
        (["--data.val", "null", "--retention", "{}"], "retention"),
        (["--retention.prompts", "no_such.jsonl"], "retention.prompts"),
        (["--retention.others", "{x: no/such/model}"], "retention.others.x"),
        (["--model.model", "broken"], "cannot be loaded"),
    ],
)
def test_what_is_refused_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    says: str,
) -> None:
    model = tmp_path / "broken"
    model.mkdir()
    for path in BASE.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "model.safetensors").write_bytes(b"not a model")
    flags = [str(model) if flag == "broken" else flag for flag in flags]
    nothing_is_left(capsys, tmp_path, monkeypatch, says, *two_loggers(tmp_path / "logs"), *flags)


@pytest.mark.parametrize("logger", [[], CSV], ids=["wandb", "csv"])
def test_a_logger_alone_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: list[str]
) -> None:
    last = ["--retention.others", "{x: no/such/model}"]  # refused after all else
    flags = [*logger, SAVE_DIR, str(tmp_path / "logs"), *last]
    nothing_is_left(capsys, tmp_path, monkeypatch, "retention.others.x", *flags)


def test_a_test_without_rows_leaves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = [SAVE_DIR, str(tmp_path / "logs"), "--trainer.default_root_dir", str(tmp_path)]
    assert "data.test: null" in refused(capsys, "test", "--config", TINY, *flags)
    assert list(tmp_path.iterdir()) == []
