"""What the command line refuses: bad input is one line that names key, value and what is allowed."""

import json
from pathlib import Path

import pytest
from command_line import CONFIGS, MIFO, TINY, printed, refused, short, write_rows

from mifo_lightning.cli import main


def test_interpolation_that_cannot_be_followed_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("data:\n  eval_batch: ${model.rollout.group_size}\n")
    assert "data.eval_batch" in refused(capsys, "fit", "--config", TINY, "--config", str(over))


@pytest.mark.parametrize(
    "text", ["freeze:\n  fraction: ", "model:\n  optimizer:\n    rl:\n      lr: ", "data:\n  holdout: "]
)
def test_the_hint_of_an_interpolation_can_be_followed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    over = tmp_path / "over.yaml"
    over.write_text(text + "${model.rollout.group_size}\n")
    hint = refused(capsys, "fit", "--config", TINY, "--config", str(over)).partition("write ")[2].split()[0]
    over.write_text(text + hint.replace("group.key", "data.schedule.sft_before") + "\n")
    assert printed(capsys, "fit", "--config", TINY, "--config", str(over))


def test_a_subcommand_alone_asks_for_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config tiny --config methods/mifo" in refused(capsys, "fit")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model.nmae": "1"}, ["--model.nmae", "did you mean"]),
        ({"freeze.fracton": "1"}, ["--freeze.fracton"]),
        ({"freeze.seed": "5"}, ["--freeze.seed", "--seed_everything"]),
        ({"model.seed": "5"}, ["model.seed", "seed_everything"]),
        ({"model.optimizer.rl.lr": "abc"}, ["model.optimizer.rl.lr", "abc", "float"]),
        ({"config": "absent.yaml"}, ["absent.yaml"]),
        ({"model.model": "absent/dir/x"}, ["model.model", "absent/dir/x", "directory"]),
        ({"model.rollout.group_size": "1"}, ["model.rollout.group_size: 1", "at least 2"]),
        ({"model.rollout.success_threshold": "0"}, ["model.rollout.success_threshold: 0", "(0, 1]"]),
        ({"model.rollout.sampling.top_p": "0.9"}, ["model.rollout.sampling", "top_p 0.9"]),
        ({"model.loss.entropy_fraction": "1.5"}, ["entropy_fraction: 1.5", "(0, 1]"]),
        ({"model.loss.sum_sequences": "0"}, ["sum_sequences: 0", "above 0"]),
        ({"model.sft_loss.entropy_bonus": "-0.1"}, ["model.sft_loss.entropy_bonus: -0.1", "at least 0"]),
        ({"buffer.max_age": "-1"}, ["max_age is -1", "0 or more"]),
        ({"model.evaluation.samples": "-1"}, ["model.evaluation.samples: -1"]),
        ({"buffer.max_accuracy": "1.5"}, ["max_accuracy is 1.5", "0 to 1"]),
        ({"buffer.size": "0"}, ["size", "0"]),
        ({"buffer.size": "4096", "data.schedule.fit_sizes": "false"}, ["buffer.size: 4096", "64"]),
        ({"buffer.size": "7", "data.schedule.fit_sizes": "false"}, ["sft_batch: 8", "7"]),
        ({"freeze.fraction": "0"}, ["fraction is 0", "above 0"]),
        ({"entropy.fraction": "1.2"}, ["fraction is 1.2", "at most 1"]),
        ({"importance": "null"}, ["GradientFreezing", "ImportanceEMA"]),
        ({"importance.alpha": "1.0"}, ["alpha is 1.0"]),
        ({"trainer.precision": "bf16-true"}, ["trainer.precision: bf16-true", "bf16-mixed"]),
        ({"trainer.accumulate_grad_batches": "5"}, ["accumulate_grad_batches: 5", "model.optimizer.micro_batches"]),
        ({"trainer.gradient_clip_val": "1.0"}, ["trainer.gradient_clip_val: 1.0", "model.optimizer.rl.clip"]),
        ({"trainer.strategy": "nonsense"}, ["nonsense"]),
        ({"data.train": "absent.parquet"}, ["data.train", "absent.parquet"]),
        ({"data.train.init_args.skills": "[juggling]"}, ["juggling", "addition"]),
        ({"data.prompts.max_tokens": "3"}, ["no question left", "prompt too long"]),
        ({"data.demonstrations.max_tokens": "2"}, ["buffer.size: 8", "0 training questions"]),
        ({"data.holdout": "64", "data.schedule.fit_sizes": "false"}, ["data.holdout: 64"]),
        ({"data.schedule.prompts_per_step": "0"}, ["prompts_per_step: 0", "at least 1"]),
        ({"data.eval_batch": "0"}, ["data.eval_batch: 0"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, str], parts: list[str]
) -> None:
    line = refused(capsys, *short(tmp_path), *(text for k, v in changes.items() for text in (f"--{k}", v)))
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            b"model: {optimizer: {rl: {\nlr: }}}\n",
            ["model.optimizer.rl.lr", "float", "over.yaml, line 2", "left empty"],
        ),
        (b"model:\n  evaluation:\n    samples: null\n", ["over.yaml, line 3: `model.evaluation.samples` is null)"]),
        (b"model:\n  rollout:\n    group_size:\n", ["model.rollout.group_size", "int", "over.yaml, line 3"]),
        (b"data:\n  schedule:\n    prompts_per_step: ~\n", ["data.schedule.prompts_per_step", "over.yaml, line 3"]),
        (b"data:\n  columns:\n", ["data.columns: null is not allowed", "prompt, truth", "over.yaml, line 2"]),
        (b"model:\n  evaluation: [1]\n", ["model.evaluation: [1] is not allowed", "samples"]),
        (b"model:\n  optimizer: {rl: null}\n", ["model.optimizer.rl: null is not allowed", "weight_decay"]),
        (b"model:\n  rollout: {sampling: 3}\n", ["model.rollout.sampling: 3 is not allowed", "top_p"]),
        (b"buffer:\n  init_args:\n    size:\n", ["size", "over.yaml, line 3"]),
        (b"data:\n  # caf\xe9\n  eval_batch: 3\n", ["over.yaml, line 2", "not UTF-8", "0xe9"]),
        (b"data:\n  eval_batch: [1\n", ["over.yaml, line 3", "not YAML"]),
    ],
)
def test_a_key_left_empty_and_a_file_that_is_no_text_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    (tmp_path / "over.yaml").write_bytes(content)
    plain = ["fit", *MIFO, "--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path)]
    for flag in (["--config", str(tmp_path / "over.yaml")], [f"--config={tmp_path / 'over.yaml'}"]):
        line = refused(capsys, *plain, *flag)
        assert all(part in line for part in parts), line


def test_a_flag_over_an_empty_key_is_not_called_empty(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As in a printed configuration, where every key that is not set is null."""
    (tmp_path / "over.yaml").write_text("trainer:\n  min_steps: null\n", encoding="utf-8")
    line = refused(capsys, *short(tmp_path), "--config", str(tmp_path / "over.yaml"), "--trainer.min_steps", "5")
    assert "trainer.min_steps: 5" in line
    assert "left empty" not in line


def test_a_damaged_model_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = Path(__file__).parents[1] / "mifo_lightning" / "assets" / "base"
    model = tmp_path / "model"
    model.mkdir()
    for path in base.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "model.safetensors").write_bytes(b"not a model")
    assert "cannot be loaded" in refused(capsys, *short(tmp_path / "run"), "--model.model", str(model))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["eos_token"] = None
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert "has no eos_token" in refused(capsys, *short(tmp_path), "--model.model", str(model))
    (model / "config.json").unlink()
    assert "no config.json" in refused(capsys, *short(tmp_path), "--model.model", str(model))


@pytest.mark.parametrize("method", ["luffy", "srft", "chord", "hpt"])
def test_mixing_needs_demonstrations(capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str) -> None:
    write_rows(tmp_path / "rows.jsonl", demonstrated=False)
    overlay = str(CONFIGS / "methods" / f"{method}.yaml")
    data = ["--data.train", str(tmp_path / "rows.jsonl"), "--data.val", "null", "--trainer.logger", "false"]
    line = refused(capsys, "fit", "--config", TINY, "--config", overlay, *data)
    assert "data.train: no question has a demonstration" in line


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("model.optimizer.rl.lr", ".nan", "model.optimizer.rl.lr: nan is not allowed"),
        ("seconds.every", "0", "seconds.every: 0 is not allowed"),
        ("heldout", '{"class_path": "HeldOutLoss", "init_args": {"questions": -3}}', "heldout.questions: -3"),
        ("model.sft_loss.demonstrations", "own", "model.sft_loss.weight: flow is not allowed with demonstrations own"),
    ],
)
def test_impossible_values_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, value: str, text: str
) -> None:
    assert text in refused(capsys, *short(tmp_path), "--model.sft_loss.weight", "flow", f"--{key}", value)


def test_a_run_does_not_go_on_with_other_demonstrations_or_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [*short(tmp_path / "a", trainer__enable_checkpointing="true"), "--checkpoint.dirpath", str(tmp_path)]
    main(arguments)
    resumed = [*arguments, "--ckpt_path", str(tmp_path / "last.ckpt"), "--data.schedule.rl_steps", "4"]
    assert "damaged_share" in refused(capsys, *resumed, "--data.demonstrations.damaged_share", "1.0")
    assert "model.sft_loss.weight: flow" in refused(capsys, *resumed, "--model.sft_loss.weight", "flow")
    assert "model.sft_loss.sed: top_k 2" in refused(capsys, *resumed, "--model.sft_loss.sed.strength", "1")


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--lr", "--model.optimizer.rl.lr or --model.optimizer.sft.lr?"),
        ("--model.rollout.groupsize", "--model.rollout.group_size?"),
        ("--max_new_tokens", "--model.evaluation.sampling.max_new_tokens or --model.rollout.sampling.max_new_tokens?"),
    ],
)
def test_a_misspelt_key_is_told_from_its_last_part(capsys: pytest.CaptureFixture[str], flag: str, near: str) -> None:
    assert f"did you mean {near}" in refused(capsys, "fit", "--config", TINY, flag, "3")


def test_a_misspelt_key_in_a_file_is_told_with_its_place(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text("data: {eval_batch: 4}\nmodel: {rollout: {grup_size: 4}}\n")
    line = refused(capsys, "fit", "--config", TINY, "--config", str(tmp_path / "over.yaml"))
    assert "over.yaml, line 2: " in line
    assert "did you mean model.rollout.group_size?" in line


def test_a_setting_of_what_is_null_says_to_name_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "fit", "--config", TINY, "--model.rollout.engine.rows", "4")
    assert "model.rollout.engine.rows: model.rollout.engine is null" in line
    assert "--model.rollout.engine CLASS" in line
