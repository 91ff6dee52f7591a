"""`configs/protections/` over a method: what each switches on and nothing else, and that it has an effect."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIGS, SHORT, fitted, flat, layers, refused, settings

from mifo_lightning.cli.command_line import MifoCLI, make_cli

IMPORTANCE = {"class_path": "mifo_callbacks.ImportanceEMA", "init_args.alpha": 0.5}
METHODS = "mifo_lightning.methods"
# over methods/interleave, but for `random_anchor`, which is over methods/rpsft
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "low_gain": {
        "importance": IMPORTANCE,
        "freeze": {
            "class_path": "mifo_callbacks.GradientFreezing",
            "init_args.fraction": 0.5,
            "init_args.selector.class_path": "mifo_callbacks.LowGain",
            "init_args.scope": "tensor",
        },
    },
    "overlap_shares": {
        "importance": IMPORTANCE,
        "freeze": {
            "class_path": "mifo_callbacks.GradientFreezing",
            "init_args.fraction": 0.5,
            "init_args.selector.class_path": "mifo_callbacks.OverlapShares",
            "init_args.scope": "global",
        },
    },
    "soft": {
        "importance": IMPORTANCE,
        "soft": {"class_path": f"{METHODS}.SoftFreezing", "init_args.quantile": 0.5},
    },
    "sign_conflict": {
        "conflict": {
            "class_path": f"{METHODS}.SignConflict",
            "init_args.fraction": 0.5,
            "init_args.signs": "rl",
        }
    },
    "random_signs": {
        "conflict": {
            "class_path": f"{METHODS}.SignConflict",
            "init_args.fraction": 0.5,
            "init_args.signs": "random",
        }
    },
    "subspace": {
        "subspace": {
            "class_path": f"{METHODS}.SubspaceFreezing",
            "init_args.k": 16,
            "init_args.sides": "either",
            "init_args.selector": "top",
            "init_args.of": "rl",
            "init_args.matrices": None,
        }
    },
    "own_subspace": {
        "subspace": {
            "class_path": f"{METHODS}.SubspaceFreezing",
            "init_args.k": 0.25,
            "init_args.sides": "either",
            "init_args.selector": "top",
            "init_args.of": "weights",
            "init_args.matrices": None,
        }
    },
    "random_subspace": {
        "subspace": {
            "class_path": f"{METHODS}.SubspaceFreezing",
            "init_args.k": 16,
            "init_args.sides": "either",
            "init_args.selector": "random",
            "init_args.of": "rl",
            "init_args.matrices": None,
        }
    },
    "random_anchor": {"anchor": {"class_path": f"{METHODS}.Anchor", "init_args.selector": "random"}},
}


def over(name: str) -> str:
    return "rpsft" if name == "random_anchor" else "interleave"


def test_every_protection_is_tested() -> None:
    assert {path.stem for path in (CONFIGS / "protections").glob("*.yaml")} == CHANGES.keys()


def test_a_control_alone_says_what_it_is_laid_over(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "fit", *layers("tiny", "methods/interleave", "protections/random_anchor"))
    assert "anchor.selector: anchor is off" in line
    assert "--config methods/rpsft" in line


FLAGS = [text for key, value in SHORT.items() for text in (f"--{key}", value)]


@cache
def trained(directory: Path, *names: str) -> MifoCLI:
    """A run on the embedded task of 3 RL steps, with SFT phases of two optimizer steps."""
    return fitted(*layers("tiny", *names), *FLAGS, "--trainer.default_root_dir", str(directory))


@pytest.fixture
def unprotected(tmp_path_factory: pytest.TempPathFactory) -> MifoCLI:
    return trained(tmp_path_factory.getbasetemp() / "unprotected", "methods/interleave")


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, name: str) -> MifoCLI:
    return trained(tmp_path_factory.getbasetemp() / name, f"methods/{over(name)}", f"protections/{name}")


@pytest.mark.parametrize("name", CHANGES)
def test_a_protection_switches_on_its_parts_and_nothing_else(unprotected: MifoCLI, run: MifoCLI, name: str) -> None:
    if over(name) == "interleave":
        method = unprotected
    else:
        method = make_cli([*layers("tiny", f"methods/{over(name)}"), *FLAGS], run=False)
    before, changed = settings(method), settings(run)
    for config in (before, changed):
        del config["trainer"]["default_root_dir"]
    assert {part for part, value in changed.items() if before[part] != value} == CHANGES[name].keys()
    for part, expected in CHANGES[name].items():
        found = flat(changed[part])
        assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", CHANGES)
def test_a_protection_has_an_effect(unprotected: MifoCLI, run: MifoCLI, name: str) -> None:
    found, reference = run.model.state_dict(), unprotected.model.state_dict()
    assert any((found[key] != tensor).any() for key, tensor in reference.items())
