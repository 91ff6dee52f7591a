"""Check first, log then: a command that is refused leaves nothing behind."""

from pathlib import Path

import pytest
from command_line import CONFIGS, MIFO, SHORT, TINY, refused

BASE = Path(__file__).parents[1] / "mifo_lightning" / "assets" / "base"
LOGGERS: dict[str, list[str]] = {
    "wandb": ["--trainer.logger.init_args.save_dir"],
    "csv": ["--config", str(CONFIGS / "logger" / "csv.yaml"), "--trainer.logger.init_args.save_dir"],
}


@pytest.mark.parametrize("logger", LOGGERS)
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
    logger: str,
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "broken"
    model.mkdir()
    for path in BASE.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "model.safetensors").write_bytes(b"not a model")
    pairs = {name: value for name, value in SHORT.items() if name != "trainer.logger"}
    base = ["fit", *MIFO, *(text for key, value in pairs.items() for text in (f"--{key}", value))]
    places = [*LOGGERS[logger], str(tmp_path / "logs"), "--trainer.default_root_dir", str(tmp_path / "run")]
    assert says in refused(capsys, *base, *places, *[str(model) if flag == "broken" else flag for flag in flags])
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_test_without_rows_leaves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--trainer.logger.init_args.save_dir", str(tmp_path / "logs"), "--trainer.default_root_dir", str(tmp_path)]
    assert "data.test: null" in refused(capsys, "test", "--config", TINY, *flags)
    assert list(tmp_path.iterdir()) == []
