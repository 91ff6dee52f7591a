"""Controls laid over a base and a method: each changes what it says, nothing else, and has an effect."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIGS, printed, short
from safetensors.torch import load_file

from mifo_lightning.cli import main
from mifo_lightning.cli.command_line import make_cli

CONTROLS = CONFIGS / "controls"
CHANGES: dict[str, dict[str, Any]] = {
    "random_freeze": {"freeze.init_args.selector": "random"},
    "bottom_freeze": {"freeze.init_args.selector": "rl_bottomk"},
    "half_sft_lr": {"model.optimizer.sft.lr_factor": 0.5},
    "random_tokens": {"entropy.init_args.selector": "random"},
    "bottom_tokens": {"entropy.init_args.selector": "bottom"},
    "damaged_demonstrations": {"data.demonstrations.damaged_share": 0.5},
    "still_embedding": {"model.loading.frozen": ["*embed_tokens*"]},
    "drop_sft_gradients": {"drop.init_args.during": "sft", "drop.init_args.probability": 0.5},
    "drop_rl_gradients": {"drop.init_args.during": "rl", "drop.init_args.probability": 0.5},
}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix[:-1]: config}
    return {key: value for name, inner in config.items() for key, value in flat(inner, f"{prefix}{name}.").items()}


def layers(*names: str) -> list[str]:
    return [text for name in names for text in ("--config", str(CONFIGS / f"{name}.yaml"))]


def test_every_control_is_tested() -> None:
    assert {path.stem for path in CONTROLS.glob("*.yaml")} == CHANGES.keys()


@pytest.mark.parametrize("base", ["tiny", "gsm8k"])
@pytest.mark.parametrize("control", CHANGES)
def test_a_control_changes_what_it_says_and_nothing_else(
    capsys: pytest.CaptureFixture[str], base: str, control: str
) -> None:
    method = flat(printed(capsys, "fit", *layers(base, "methods/mifo")))
    changed = flat(printed(capsys, "fit", *layers(base, "methods/mifo", f"controls/{control}")))
    differs = {key: value for key, value in changed.items() if key not in method or method[key] != value}
    if control.startswith("drop"):
        assert method["drop"] is None
        assert differs.pop("drop.class_path").endswith("GradientDropping")
        assert differs.pop("drop.init_args.phase") == "phase"
    assert differs == CHANGES[control]


@pytest.mark.parametrize("control", ["random_freeze", "random_tokens", "drop_sft_gradients"])
def test_what_a_control_draws_differs_from_seed_to_seed(control: str) -> None:
    added = layers("tiny", "methods/mifo", f"controls/{control}")
    for seed in (0, 4):
        arguments = [*added, "--seed_everything", str(seed), "--trainer.logger", "false"]
        cli = make_cli(arguments, run=False)
        drawn = [getattr(cli.config_init, key) for key in ("entropy", "freeze", "drop")]
        assert {callback.seed.value for callback in drawn if callback is not None} == {seed}


@cache
def trained(directory: Path, control: str | None) -> dict[str, Any]:
    """Weights after a run of 3 RL steps with SFT phases."""
    added = layers(f"controls/{control}") if control else []
    main([*short(directory), *added])
    return load_file(directory / "model" / "model.safetensors")


@pytest.mark.parametrize("control", CHANGES)
def test_a_control_has_an_effect(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, control: str) -> None:
    reference = trained(tmp_path_factory.getbasetemp() / "without", None)
    weights = trained(tmp_path, control)
    assert any((weights[name] != tensor).any() for name, tensor in reference.items())
