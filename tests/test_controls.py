"""Controls laid over a base and a method: each changes what it says, nothing else, and has an effect."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import BASES, CONFIGS, fitted, flat, layers, settings, short

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.cli.command_line import MifoCLI, make_cli
from mifo_lightning.policy.loading import load_policy

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


def test_every_control_is_tested() -> None:
    assert {path.stem for path in CONTROLS.glob("*.yaml")} == CHANGES.keys()


@pytest.mark.parametrize("base", BASES)
def test_no_base_sets_what_a_control_changes(base: str) -> None:
    """So that what a control does over one base it does over each."""
    names = {key.replace("init_args.", "") for changes in CHANGES.values() for key in changes}
    assert not names & flat(yaml.safe_load((CONFIGS / base).read_text(encoding="utf-8"))).keys()


@cache
def trained(directory: Path, control: str | None) -> MifoCLI:
    """A run of MIFO on the embedded task of 3 RL steps, with SFT phases of two optimizer steps."""
    return fitted(*short(directory)[1:], *(layers(f"controls/{control}") if control else []))


@pytest.fixture
def without(tmp_path_factory: pytest.TempPathFactory) -> MifoCLI:
    return trained(tmp_path_factory.getbasetemp() / "without", None)


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, control: str) -> MifoCLI:
    return trained(tmp_path_factory.getbasetemp() / control, control)


@pytest.mark.parametrize("control", CHANGES)
def test_a_control_changes_what_it_says_and_nothing_else(without: MifoCLI, run: MifoCLI, control: str) -> None:
    method, changed = (flat(settings(cli)) for cli in (without, run))
    differs = {key: value for key, value in changed.items() if key not in method or method[key] != value}
    assert Path(differs.pop("trainer.default_root_dir")).name == control
    if control.startswith("drop"):
        assert method["drop"] is None
        assert differs.pop("drop.class_path").endswith("GradientDropping")
        assert differs.pop("drop.init_args.phase") == "phase"
        assert differs.pop("drop.init_args.seed") == 0  # that of the run
    assert differs == CHANGES[control]


@pytest.mark.parametrize("control", ["random_freeze", "random_tokens", "drop_sft_gradients"])
def test_what_a_control_draws_differs_from_seed_to_seed(run: MifoCLI, control: str) -> None:
    other = ["--seed_everything", "4", "--trainer.logger", "false"]
    again = make_cli([*layers("tiny", "methods/mifo", f"controls/{control}"), *other], run=False)
    for cli, seed in ((run, 0), (again, 4)):
        drawn = [getattr(cli.config_init, key) for key in ("entropy", "freeze", "drop")]
        assert {callback.seed.value for callback in drawn if callback is not None} == {seed}


@pytest.mark.parametrize("control", CHANGES)
def test_a_control_has_an_effect(without: MifoCLI, run: MifoCLI, control: str) -> None:
    callbacks: list[Any] = run.trainer.callbacks  # type: ignore[attr-defined]
    phases = next(c for c in callbacks if isinstance(c, BufferPhaseSwitch)).switches
    assert phases > 0
    assert run.trainer.global_step == 3 + 2 * phases
    found, reference = run.model.state_dict(), without.model.state_dict()
    assert any((found[name] != tensor).any() for name, tensor in reference.items())
    base = load_policy("embedded").state_dict()
    assert any((found[f"policy.{name}"] != tensor).any() for name, tensor in base.items())
