"""The README's blocks run as printed, and its two examples of extensions are short and do what they say."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Phases, Recorder, fit

from mifo_callbacks import GradientFreezing, ImportanceEMA

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, found)
    return found


def test_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "2 torch.Size([3, 6])" in printed
    assert "supervised phase on ['question 0', 'question 1']" in printed


@pytest.mark.parametrize("name", ["Proportional", "SquaredGradients"])
def test_an_extension_is_at_most_15_lines(name: str) -> None:
    example = next(block for block in BLOCKS if f"class {name}" in block)
    assert len([line for line in example.split("\n\n\nfit(")[0].splitlines() if line]) <= 15


@pytest.mark.parametrize("extension", ["Proportional", "SquaredGradients"])
def test_an_extension_freezes_half_and_rather_what_matters(names: dict[str, Any], extension: str) -> None:
    mine = names[extension]()
    source, selector = (ImportanceEMA(), mine) if extension == "Proportional" else (mine, "rl_topk")
    freezing = GradientFreezing(0.5, selector, seed=0)
    recorder = Recorder(lambda: dict(freezing.masks))
    fit([source, freezing, recorder], Phases(["rl", "rl", "sft", "sft"]))
    masks = recorder.looks[3]
    for name, mask in masks.items():
        assert mask.sum() == mask.numel() // 2
        assert torch.equal(recorder.weights[4][name][mask], recorder.weights[2][name][mask])
    chosen = torch.cat([source.importance[name][mask] for name, mask in masks.items()])
    free = torch.cat([source.importance[name][~mask] for name, mask in masks.items()])
    assert chosen.mean() > 1.2 * free.mean()
