"""`configs/protections/` over a method: what each switches on and nothing else, and that it has an effect."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIGS, SHORT, printed, refused
from safetensors.torch import load_file
from test_controls import flat, layers

from mifo_lightning.cli import main

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
            "init_args.selector": "rl_topk",
        }
    },
    "random_subspace": {
        "subspace": {
            "class_path": f"{METHODS}.SubspaceFreezing",
            "init_args.k": 16,
            "init_args.sides": "either",
            "init_args.selector": "random",
        }
    },
    "random_anchor": {"anchor": {"class_path": f"{METHODS}.Anchor", "init_args.selector": "random"}},
}


def over(name: str) -> str:
    return "rpsft" if name == "random_anchor" else "interleave"


def test_every_protection_is_tested() -> None:
    assert {path.stem for path in (CONFIGS / "protections").glob("*.yaml")} == CHANGES.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_a_protection_switches_on_its_parts_and_nothing_else(capsys: pytest.CaptureFixture[str], name: str) -> None:
    method = printed(capsys, "fit", *layers("tiny", f"methods/{over(name)}"))
    changed = printed(capsys, "fit", *layers("tiny", f"methods/{over(name)}", f"protections/{name}"))
    differs = {part for part, value in changed.items() if method[part] != value}
    assert differs == CHANGES[name].keys()
    for part, expected in CHANGES[name].items():
        found = flat(changed[part])
        assert {key: found[key] for key in expected} == expected


def test_a_control_alone_says_what_it_is_laid_over(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "fit", *layers("tiny", "methods/interleave", "protections/random_anchor"))
    assert "anchor.selector: anchor is off" in line
    assert "--config methods/rpsft" in line


@cache
def trained(directory: Path, *names: str) -> dict[str, Any]:
    """Weights after a run of 3 RL steps with SFT phases of two optimizer steps."""
    flags = {**SHORT, "trainer.default_root_dir": str(directory)}
    main(["fit", *layers("tiny", *names), *(text for key, value in flags.items() for text in (f"--{key}", value))])
    return load_file(directory / "model" / "model.safetensors")


@pytest.mark.parametrize("name", [*CHANGES, "l2_anchor", "cumulative"])
def test_a_protection_has_an_effect(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    reference = trained(tmp_path_factory.getbasetemp() / "unprotected", "methods/interleave")
    added = [f"methods/{over(name)}", f"protections/{name}"] if name in CHANGES else [f"methods/{name}"]
    weights = trained(tmp_path, *added)
    assert any((weights[key] != tensor).any() for key, tensor in reference.items())
