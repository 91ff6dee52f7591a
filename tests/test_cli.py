"""The command line: merging, overrides, printed configurations, what a run leaves behind."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import BASES, CONFIGS, SHORT, TINY, fitted, flat, layers, printed, refused, short, write_rows
from transformers import AutoModelForCausalLM

import mifo_callbacks
import mifo_lightning
from mifo_lightning.cli import main
from mifo_lightning.cli.parts import METHOD
from mifo_lightning.common.question import Question
from mifo_lightning.common.terminal import quiet
from mifo_lightning.data.loader import PhaseLoader
from mifo_lightning.data.schedule import Schedule


def test_later_files_and_flags_win_and_null_switches_a_callback_off(capsys: pytest.CaptureFixture[str]) -> None:
    method = str(CONFIGS / "methods" / "mifo_dagger.yaml")
    config = printed(
        capsys, "fit", "--config", TINY, "--config", method, "--freeze.fraction", "0.3", "--entropy", "null"
    )
    assert config["importance"]["init_args"]["alpha"] == 0
    assert config["freeze"]["init_args"]["fraction"] == 0.3
    assert config["entropy"] is None
    assert config["buffer"]["init_args"] == {
        "size": 128,
        "max_accuracy": 0.125,
        "order": "fifo",
        "leftovers": "keep",
        "max_age": None,
        "drop_solved": False,
    }


def on_a_base(capsys: pytest.CaptureFixture[str], base: str, method: str) -> dict[str, Any]:
    longer = ["--model.rollout.sampling.max_new_tokens", "24"]
    return printed(capsys, "fit", "--config", str(CONFIGS / base), *layers(f"methods/{method}"), *longer)


# what each method switches on, on one base: test_overlays.py
@pytest.mark.parametrize("method", ["mifo", "luffy"])
@pytest.mark.parametrize("base", BASES)
def test_methods_fit_every_base(capsys: pytest.CaptureFixture[str], base: str, method: str) -> None:
    config = on_a_base(capsys, base, method)
    mifo = method == "mifo"
    assert [config[part] is not None for part in ("buffer", "freeze", "importance", "entropy")] == [mifo] * 4
    assert (config["model"]["mixing"] is None) == mifo
    if not mifo:  # it sets some of the keys of a group of which the base sets others
        rl = config["model"]["optimizer"]["rl"]
        own = yaml.safe_load((CONFIGS / base).read_text())["model"].get("optimizer", {}).get("rl", {})
        assert (rl["betas"], rl["weight_decay"], rl["clip"]) == ([0.9, 0.999], 0.01, 1.0)
        assert rl["lr"] == own.get("lr", rl["lr"])


@pytest.mark.parametrize("base", BASES)
def test_a_method_says_the_same_on_every_base(base: str) -> None:
    """Both set plain values or different keys, so one method on every base and every method on one show all pairs."""
    own = flat(yaml.safe_load((CONFIGS / base).read_text()))
    assert not {key.partition(".")[0] for key in own} & {*METHOD, "method"}
    for path in (CONFIGS / "methods").glob("*.yaml"):
        over = flat(yaml.safe_load(path.read_text()))
        nested = [(a, b) for a in own for b in over if a.startswith(f"{b}.") or b.startswith(f"{a}.")]
        assert nested == []
        assert not [key for key in own.keys() & over.keys() if "class_path" in key or "init_args" in key]
        assert all(own.get(key) is not None for key in own.keys() & over.keys())


@pytest.mark.parametrize("base", BASES)
def test_every_base_divides_its_batches(capsys: pytest.CaptureFixture[str], base: str) -> None:
    config = on_a_base(capsys, base, "mifo")
    trainer, schedule, size = config["trainer"], config["data"]["schedule"], config["buffer"]["init_args"]["size"]
    questions = [Question(i, "s", "", [1], "", [2]) for i in range(256)]
    loader = PhaseLoader(
        questions,
        Schedule(**schedule),
        world_size=trainer["devices"] * trainer["num_nodes"],
    )
    loader.push([{"id": i} for i in range(size)])
    assert next(loader)["phase"] == "sft"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_key_has_a_comment(path: Path) -> None:
    groups = ("trainer", "model", "data", "init_args", "logger", "drop")
    if path.name != "defaults.yaml":  # it says what these groups are
        groups = (*groups, "loss", "mixing", "rollout", "sampling", "sft_loss", "optimizer", "rl", "sft", "evaluation")
        groups = (*groups, "loading", "prompts", "demonstrations", "schedule")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.split("#")[0].strip()
        is_key = ":" in text and not text.startswith(("-", "class_path:"))
        assert not is_key or "#" in line or text in [f"{group}:" for group in groups], f"{path.name}:{number}: {line}"


def test_interpolation_follows_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("data:\n  eval_batch: ${..model.rollout.group_size}\n  holdout: ${oc.env:NOT_SET,7}\n")
    config = printed(capsys, "fit", "--config", TINY, "--config", str(over), "--model.rollout.group_size", "5")
    assert config["data"]["eval_batch"] == 5
    assert config["data"]["holdout"] == 7


def test_a_printed_configuration_runs_and_leaves_model_summary_samples_and_metrics(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = short(tmp_path)
    at = arguments.index("--trainer.logger")
    csv = [*layers("logger/csv"), "--trainer.logger.init_args.save_dir", str(tmp_path)]
    config = printed(capsys, *arguments[:at], *arguments[at + 2 :], *csv)
    path = tmp_path / "printed.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path)])
    out = capsys.readouterr().out
    assert "before → after" in out
    for skill in ("addition", "mirrored", "sorting", "reversal"):
        assert skill in out
    (run,) = (path.parent for path in tmp_path.rglob("metrics.csv"))
    AutoModelForCausalLM.from_pretrained(run / "model")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"].keys() == summary["after"].keys() >= {"addition/avg@1", "avg@1"}
    assert summary["sft_phases"] >= 1
    assert summary["seconds"]["rollout"] > 0
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"rl", "val"}
    assert len([row for row in rows if row["stage"] == "val" and row["step"] == 0]) == 16
    header = set((run / "metrics.csv").read_text().splitlines()[0].split(","))
    assert header >= {
        "buffer/size",
        "entropy/share",
        "entropy/threshold",
        "freeze/share",
        "importance/q0.5",
        "phase/is_sft",
        "rl/clip_share",
        "rl/grad_norm",
        "rl/update_norm",
        "rollout/entropy",
        "rollout/reward",
        "rollout/truncated",
        "sft/loss",
        "sft/update_norm",
        "val/addition/avg@1",
    }


def test_the_command_line_wins_over_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(short(tmp_path / "a", trainer__enable_checkpointing="true", trainer__max_steps="2"))
    (ckpt,) = (tmp_path / "a").rglob("*.ckpt")
    stored = torch.load(ckpt, weights_only=True)
    assert stored["global_step"] == 2
    arguments = short(
        tmp_path / "b", model__optimizer__rl__lr="0.0", model__optimizer__sft__lr="0.0", data__schedule__rl_steps="3"
    )
    main([*arguments, "--ckpt_path", str(ckpt)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model")
    for name, value in model.named_parameters():
        assert (value == stored["state_dict"][f"policy.model.{name}"]).all()
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    first = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["before"] == first["before"]
    assert summary["optimizer_steps"] > 2


def test_evaluation_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = short(tmp_path)
    main(["validate", *arguments[1:], "--model.evaluation.samples", "4", "--model.evaluation.greedy", "true"])
    out = capsys.readouterr().out
    for name in ("greedy", "avg@4", "pass@2", "pass@4", "sorting", "mean of sources"):
        assert name in out
    assert "Validate metric" not in out  # one table
    assert "data.test: null" in refused(capsys, "test", *arguments[1:])


def test_fitted_sizes_are_recorded_and_their_record_fits_no_more(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    changes = {
        "buffer__size": "128",
        "data__schedule__sft_batch": "64",
        "data__holdout": "100",
        "buffer__max_accuracy": "1.0",
    }
    with pytest.warns(UserWarning, match=r"buffer\.size: 128 → 52, fitted to the 52 training questions"):
        main(short(tmp_path / "a", **changes, data__schedule__prompts_per_step="512", data__schedule__rl_steps="1"))
    asked_taken = {
        "data.holdout": [100, 12],
        "data.schedule.prompts_per_step": [512, 52],
        "data.schedule.sft_batch": [64, 26],
        "buffer.size": [128, 52],
    }
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["fitted"] == asked_taken
    assert (summary["optimizer_steps"], summary["sft_phases"]) == (5, 1)
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert (config["data"]["holdout"], config["buffer"]["init_args"]["size"]) == (12, 52)
    assert (config["data"]["schedule"]["prompts_per_step"], config["data"]["schedule"]["sft_batch"]) == (52, 26)
    again = ["--data.schedule.fit_sizes", "false", "--trainer.default_root_dir", str(tmp_path / "b")]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*fitted to.*")
        main(["fit", "--config", str(tmp_path / "a" / "config.yaml"), *again])
    same = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert (same["after"], same["fitted"]) == (summary["after"], {})


def test_own_warnings_are_one_line_without_a_path() -> None:
    quiet()
    for package in (mifo_lightning, mifo_callbacks):
        assert warnings.formatwarning("set x", UserWarning, str(package.__file__), 3) == "warning: set x\n"
    assert "other.py" in warnings.formatwarning("set x", UserWarning, "/elsewhere/other.py", 3)


def test_bytes_that_editors_add_and_numbers_in_short_do_not_matter(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """YAML 1.1 takes 1e-6, without a point, for a text."""
    over = tmp_path / "over.yaml"
    text = "\ufeffmodel:\r\n  optimizer:\r\n    rl:\r\n      lr: 1e-6\r\n    sft:\r\n      lr: 2E-5\r\n"
    over.write_bytes(text.encode())
    config = printed(
        capsys, "fit", "--config", TINY, "--config", str(over), "--model.optimizer.rl.weight_decay", "1e-2"
    )
    rates = config["model"]["optimizer"]
    assert (rates["rl"]["lr"], rates["sft"]["lr"], rates["rl"]["weight_decay"]) == (1e-6, 2e-5, 0.01)


@pytest.mark.parametrize("base", BASES)
def test_longer_rollouts_are_evaluated_at_their_length(capsys: pytest.CaptureFixture[str], base: str) -> None:
    config = on_a_base(capsys, base, "mifo")
    assert config["model"]["rollout"]["sampling"]["max_new_tokens"] == 24
    assert config["model"]["evaluation"]["sampling"]["max_new_tokens"] is None
    assert config["model"]["evaluation"]["sampling"]["stop"] is None


def test_a_jsonl_file_is_training_data(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", demonstrated=True)
    changes = {"data.train": str(tmp_path / "rows.jsonl"), "data.val": "null", "data.schedule.rl_steps": "1"}
    pairs = {key: value for key, value in {**SHORT, **changes}.items() if "init_args" not in key}
    pairs["trainer.default_root_dir"] = str(tmp_path / "run")
    fitted("--config", TINY, *(text for key, value in pairs.items() for text in (f"--{key}", value)))
    groups = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["source"] for row in groups} <= {"addition", "mirrored"}
    assert groups
