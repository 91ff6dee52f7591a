"""Every shipped method and loss, trained on the embedded task: one run of the command line each."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import CONFIGS, SHORT, TINY, layers
from safetensors.torch import load_file

from mifo_lightning.cli import main

METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
OVERLAYS = [f"methods/{name}" for name in METHODS]
OVERLAYS += sorted(f"losses/{path.stem}" for path in (CONFIGS / "losses").glob("*.yaml"))
# phases of two optimizer steps: in the first of a phase an anchor has no gradient
FLAGS = {
    **SHORT,
    "data.schedule.sft_batch": "4",
    "data.schedule.sft_epochs": "2",
    "data.val.init_args.skills": "[addition]",
    "data.val.init_args.count": "4",
}


def content(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def stages(name: str) -> list[str]:
    return [key for key in ("sft_before", "sft_after") if key in content(name).get("data", {}).get("schedule", {})]


def buffered(name: str) -> bool:
    return "buffer" in content(name) or not name.startswith("methods")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overlays")


@cache
def trained(root: Path, name: str) -> Path:
    """The directory of a run of 3 RL steps; a loss is laid over MIFO."""
    directory = root / name
    pairs = {
        **FLAGS,
        "trainer.default_root_dir": str(directory),
        **{f"data.schedule.{key}": "2" for key in stages(name)},
    }
    pairs = {**pairs, "buffer.size": "4"} if buffered(name) else {k: v for k, v in pairs.items() if k[:6] != "buffer"}
    names = [name] if name.startswith("methods") else ["methods/mifo", name]
    flags = [text for key, value in pairs.items() for text in (f"--{key}", value)]
    main(["fit", "--config", TINY, *layers(*names), *flags])
    return directory


def weights(directory: Path) -> dict[str, Any]:
    return load_file(directory / "model" / "model.safetensors")


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_trains(root: Path, name: str) -> None:
    summary = json.loads((trained(root, name) / "summary.json").read_text())
    phases = summary["sft_phases"]
    assert (phases > 0) == buffered(name)
    assert summary["optimizer_steps"] == 3 + 2 * len(stages(name)) + 2 * phases
    assert summary["before"].keys() == summary["after"].keys() >= {"addition/avg@1"}
    base = load_file(Path(TINY).parents[1] / "mifo_lightning" / "assets" / "base" / "model.safetensors")
    found = weights(trained(root, name))
    assert found.keys() == base.keys()
    assert any((found[key] != value).any() for key, value in base.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_switches_on_its_parts(root: Path, name: str) -> None:
    config = yaml.safe_load((trained(root, f"methods/{name}") / "config.yaml").read_text(encoding="utf-8"))
    assert config["method"] == name
    whole = ("rl", "sft", "sft_then_rl", "rl_then_sft", "luffy", "srft", "chord", "chord_phi", "hpt")
    assert (config["buffer"] is None) == (name in whole)
    assert (config["freeze"] is not None) == (name in ("mifo", "mifo_dagger", "mifo_pf", "cumulative"))
    assert (config["importance"] is None) == (config["freeze"] is None)
    assert (config["entropy"] is not None) == (name in ("mifo", "mifo_dagger", "mifo_es"))
    assert (config["model"]["mixing"] is not None) == name.startswith(("chord", "hpt", "luffy", "srft"))


@pytest.mark.parametrize("name", ["l2_anchor", "cumulative"])
def test_what_a_method_adds_to_interleaving_has_an_effect(root: Path, name: str) -> None:
    found = weights(trained(root, f"methods/{name}"))
    reference = weights(trained(root, "methods/interleave"))
    assert any((found[key] != tensor).any() for key, tensor in reference.items())
