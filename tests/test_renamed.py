"""Names of an earlier version: one line says the new one, and a saved configuration is translated to the same run."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import MIFO, TINY, printed, refused

from mifo_lightning.cli import main
from mifo_lightning.cli.renamed import RENAMED, new_name, translated
from mifo_lightning.common.errors import InputError
from mifo_lightning.methods import HPT, SRFT, Chord, Luffy

OLD = {
    "trainer": {
        "accumulate_grad_batches": 2,
        "val_check_interval": 8,
        "callbacks": [{"class_path": "mifo_callbacks.BufferPhaseSwitch", "init_args": {"size": 4, "p": 0.5}}],
    },
    "model": {
        "solved_at": 0.5,
        "policy": {"surrogate": "reinforce", "clip_low": 0.1},
        "mixing": {"convex": True, "sft": 0.9, "sft_end": 0.05, "sft_decay": 200, "token_weight": "chord"},
        "group_size": 6,
        "sampling": {"max_new_tokens": 9},
        "sft_weight": "dft",
        "sft": {"lr": 0.5},
        "gradient_checkpointing": False,
    },
    "data": {
        "schedule": {"rl_questions": 16, "passes": 2},
        "max_prompt_tokens": 9,
        "answer_after": ">",
        "fit_sizes": False,
        "reward": {"class_path": "LastAnswerReward", "init_args": {"answer_after": ">"}},
        "tokenizer": None,
        "group_size": 6,
        "solved_at": None,
    },
    "importance": {"class_path": "mifo_callbacks.ImportanceEMA", "init_args": {"alpha": 0.5, "g": "abs"}},
    "switch": {"class_path": "mifo_callbacks.BufferPhaseSwitch", "init_args": {"size": 64, "p": 0.25}},
}


def test_every_old_key_has_a_new_name() -> None:
    assert translated(deepcopy(OLD)) == {
        "trainer": {
            "val_check_interval": 4,
            "callbacks": [
                {"class_path": "mifo_callbacks.BufferPhaseSwitch", "init_args": {"size": 4, "max_accuracy": 0.5}}
            ],
        },
        "model": {
            "optimizer": {"micro_batches": 2, "sft": {"lr": 0.5}},
            "rollout": {"success_threshold": 0.5, "group_size": 6, "sampling": {"max_new_tokens": 9}},
            "sft_loss": {"weight": "dft"},
            "loading": {"gradient_checkpointing": False},
            "loss": {"surrogate": "reinforce", "clip_low": 0.1},
            "mixing": {
                "class_path": "mifo_lightning.methods.Chord",
                "init_args": {"mu": 0.9, "convex": True, "token_weight": "chord", "mu_end": 0.05, "decay_steps": 200},
            },
        },
        "data": {
            "schedule": {"prompts_per_step": 16, "epochs_per_rollout": 2, "fit_sizes": False},
            "prompts": {"max_tokens": 9},
            "demonstrations": {"answer_after": ">"},
        },
        "importance": {"class_path": "mifo_callbacks.ImportanceEMA", "init_args": {"alpha": 0.5, "movement": "abs"}},
        "buffer": {"class_path": "mifo_callbacks.BufferPhaseSwitch", "init_args": {"size": 64, "max_accuracy": 0.25}},
    }
    assert all(new_name(old) == new for old, new in RENAMED.items())
    assert new_name("data.group_size") == "model.rollout.group_size"
    assert new_name("model.loss.clip_low") is None
    assert new_name("model.mixing.init_args.sft") is None


@pytest.mark.parametrize(
    ("knobs", "kind", "settings"),
    [
        ({"in_group": True, "shape": 0.2}, Luffy, {"shape": 0.2}),
        ({"in_group": True, "own": "sign", "sft": 0.5, "token_weight": "low_entropy"}, SRFT, {"sft": 0.5}),
        ({"in_group": True, "own": "sign", "sft": 0.0}, SRFT, {"sft": 0.0}),
        ({"questions": "failed", "sft": 0.0}, HPT, {"sft": 0.0}),
        ({"questions": "failed", "gate": 1, "sft": 0.3}, HPT, {"gate": 1, "sft": 0.3}),
        ({"convex": True, "sft": 0.1, "token_weight": "chord"}, Chord, {"mu": 0.1, "mu_end": None, "convex": True}),
        ({"convex": False, "sft": 1.0}, Chord, {"mu": 1.0, "convex": False}),
    ],
)
def test_the_knobs_of_a_mixture_become_its_method(knobs: dict[str, Any], kind: type, settings: dict[str, Any]) -> None:
    found = translated({"model": {"mixing": knobs}})["model"]["mixing"]
    assert found["class_path"] == f"mifo_lightning.methods.{kind.__name__}"
    method = kind(**found["init_args"])
    assert {name: getattr(method, name) for name in settings} == settings


@pytest.mark.parametrize(
    "knobs",
    [
        {"sft": 0.3},
        {"in_group": True, "sft": 0.5},
        {"own": "sign", "sft": 0.5},
        {"questions": "failed", "sft": 1.0, "convex": True},
        {"in_group": True, "own": "sign", "sft": 0.5, "sft_end": 0.1, "sft_decay": 9},
    ],
)
def test_a_mixture_that_no_method_is_is_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"model\.mixing: .*(part of a mixture|is no method)"):
        translated({"model": {"mixing": knobs}})


@pytest.mark.parametrize(
    "config",
    [{"model": {"mixing": {"convex": False}}}, {"model": {"mixing": {"in_group": True, "own": "sign", "shape": 0.2}}}],
)
def test_a_mixture_without_its_weight_is_a_part_of_one(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="part of a mixture"):
        translated(config)


def test_batches_that_were_micro_batches_become_steps_or_are_refused() -> None:
    trainer = {"accumulate_grad_batches": 4, "limit_train_batches": 0, "fast_dev_run": 8, "overfit_batches": 0.5}
    found = translated({"trainer": trainer, "model": {}})["trainer"]
    assert found == {"limit_train_batches": 0, "fast_dev_run": 2, "overfit_batches": 0.5}
    with pytest.raises(InputError, match=r"trainer\.val_check_interval: .* 4 of them"):
        translated({"trainer": {"accumulate_grad_batches": 4, "val_check_interval": 6}})
    assert translated({"trainer": None, "model": None}) == {"trainer": None, "model": None}
    empty = {"trainer": {"accumulate_grad_batches": None, "val_check_interval": 8}}
    assert translated(empty)["trainer"] == {"val_check_interval": 8}


def test_values_that_follow_other_keys_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text("model: {group_size: 4}\ndata: {eval_batch: '${..model.group_size}'}\n")
    main(["translate", str(tmp_path / "old.yaml")])
    assert "by hand: data.eval_batch may name other keys" in capsys.readouterr().err


def test_an_old_key_is_one_line_that_says_the_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(OLD))
    line = refused(capsys, "fit", "--config", TINY, "--config", str(path))
    assert "old.yaml, line " in line
    assert " is now " in line
    assert "mifo translate FILE" in line
    line = refused(capsys, "fit", "--config", TINY, "--data.schedule.passes", "2")
    assert "data.schedule.passes is now data.schedule.epochs_per_rollout" in line
    line = refused(capsys, "fit", "--config", TINY, "--model.sft.weight", "dft")  # never was a key
    assert "did you mean --model.sft_loss.weight?" in line
    line = refused(capsys, "fit", "--config", TINY, "--model.mixing.in_group", "true")
    assert "class_path of a method such as mifo_lightning.methods.Luffy" in line


@pytest.mark.parametrize("text", ["a: [", "- 1", "model: {mixing: {sft: 0.3}}", b"\xff"])
def test_what_cannot_be_translated_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Any) -> None:
    path = tmp_path / "old.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stop:
        main(["translate", str(path)])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.startswith(f"error: {path}: ")
    assert said.err.count("\n") == 1


def test_a_translated_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(yaml.safe_dump({key: value for key, value in OLD.items() if key != "trainer"}))
    program = [sys.executable, "-W", "error", "-m", "mifo_lightning", "translate", str(old)]
    new.write_text(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    config = printed(capsys, "fit", *MIFO, "--config", str(new))
    assert config["data"]["schedule"]["prompts_per_step"] == 16
    assert config["buffer"]["init_args"]["max_accuracy"] == 0.25
    assert config["model"]["mixing"]["init_args"]["decay_steps"] == 200
