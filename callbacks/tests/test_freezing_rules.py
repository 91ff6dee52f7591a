"""Freezing rules: the four by name, and those that a user brings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from toy import Phases, Recorder, fit

from mifo_callbacks import Coordinates, FreezingRule, GradientFreezing, ImportanceEMA
from mifo_callbacks.freezing_rules import AtRandom, LeastImportant, MostImportant

SCHEDULE = ["rl", "rl", "sft", "sft", "rl", "sft", "sft"]


class Proportional(FreezingRule):
    """A draw without replacement in which importance to a power is the weight."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def score(self, at: Coordinates) -> Tensor:
        return at.importance.pow(self.power) / -at.draw().log()


class Biases(FreezingRule):
    needs_importance = False

    def score(self, at: Coordinates) -> Tensor | None:
        return torch.ones(at.shape) if at.name.endswith("bias") else None


class By(FreezingRule):
    """A score that is a function of the parameter's coordinates."""

    def __init__(self, function: Callable[[Coordinates], Tensor], needs_importance: bool = True) -> None:
        self.function, self.needs_importance = function, needs_importance

    def score(self, at: Coordinates) -> Tensor:
        return self.function(at)


def masks(selector: Any, **options: Any) -> list[dict[str, Tensor]]:
    freezing = GradientFreezing(selector=selector, seed=0, **options)
    recorder = Recorder(lambda: dict(freezing.masks))
    fit([ImportanceEMA(), freezing, recorder], Phases(SCHEDULE))
    return recorder.looks


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize(
    ("name", "rule"), [("rl_topk", MostImportant()), ("rl_bottomk", LeastImportant()), ("random", AtRandom())]
)
def test_a_name_is_its_rule(name: str, rule: FreezingRule, scope: str) -> None:
    for one, two in zip(masks(name, scope=scope), masks(rule, scope=scope), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_rule_of_ones_own_freezes_its_share_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [ImportanceEMA(), GradientFreezing(0.3, Proportional(0.5), seed=1)]

    recorder, save = Recorder(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    straight = callbacks()
    seen = Recorder(lambda: dict(straight[1].masks))
    module = fit([*straight, recorder, seen, save], Phases(SCHEDULE), enable_checkpointing=True)
    first, second = seen.looks[2], seen.looks[5]
    for name, mask in first.items():
        assert mask.sum() == int(0.3 * mask.numel() + 1e-9)
        assert torch.equal(recorder.weights[4][name][mask], recorder.weights[2][name][mask])
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for step in range(1, len(SCHEDULE)):
        again = fit(callbacks(), Phases(SCHEDULE), ckpt_path=tmp_path / f"step={step}.ckpt")
        for a, b in zip(module.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), step


def test_a_rule_may_leave_parameters_or_everything_free() -> None:
    for frozen in masks(Biases(), fraction=1.0)[2:4]:
        assert set(frozen) == {"net.0.bias", "net.2.bias"}
        assert all(mask.all() for mask in frozen.values())
    for scope in ("tensor", "global"):
        nothing: Any = By(lambda at: None)  # type: ignore[arg-type,return-value]
        assert not any(masks(nothing, scope=scope))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda at: at.importance[:1], r"score of 'net.0.weight' is \(1, 6\), torch.float32; allowed: its shape"),
        (lambda at: at.importance.double(), r"torch.float64; allowed: its shape \(16, 6\), torch.float32"),
        (lambda at: at.importance - 1, "is negative or NaN at 96 of 96 coordinates"),
        (lambda at: at.importance * torch.nan, "is negative or NaN at 96 of 96 coordinates"),
    ],
)
def test_a_score_that_cannot_be_ranked_is_one_line(function: Any, text: str) -> None:
    with pytest.raises(MisconfigurationException, match=text) as caught:
        masks(By(function))
    assert "\n" not in str(caught.value)


def test_a_negative_zero_is_a_zero() -> None:
    for one, two in zip(
        masks(By(lambda at: torch.where(at.draw() < 0.7, -0.0, at.importance))),
        masks(By(lambda at: torch.where(at.draw() < 0.7, 0.0, at.importance))),
        strict=True,
    ):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_importance_that_is_not_needed_is_not_there() -> None:
    with pytest.raises(MisconfigurationException, match="needs_importance = False asks for importance"):
        masks(By(lambda at: at.importance, needs_importance=False))


@pytest.mark.parametrize("selector", ["topk", MostImportant, 3, None])
def test_what_is_no_rule_is_refused(selector: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"selector is .*; allowed: rl_topk, .*none, or an object of a"):
        GradientFreezing(selector=selector)


def test_an_order_must_be_one() -> None:
    rule: Any = MostImportant()
    rule.order = "biggest"
    with pytest.raises(MisconfigurationException, match=r"MostImportant\.order is 'biggest'; allowed: largest"):
        GradientFreezing(selector=rule)
