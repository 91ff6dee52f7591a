"""What is frozen once stays frozen in every later SFT phase, up to the cap, across checkpoints."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_resume import SCHEDULE, every_step
from torch import Tensor
from toy import Phases, Recorder, fit

from mifo_callbacks import CumulativeFreezing, ImportanceEMA, LowGain, freezing_masks
from mifo_callbacks.cumulative_freezing import united

LONG = (["rl"] * 2 + ["sft"] * 2) * 4 + ["rl"]
FIRST = range(2, 16, 4)  # step of each SFT phase


def run(schedule: list[str], fraction: float, cap: float, scope: Any = "tensor", **options: Any) -> Recorder:
    freezing = CumulativeFreezing(fraction, cap, options.pop("selector", "rl_topk"), scope)
    importance = ImportanceEMA(alpha=0.0)
    recorder = Recorder(
        lambda: (
            {name: mask.clone() for name, mask in freezing.masks.items()},
            {name: c.clone() for name, c in (importance.importance or {}).items()},
        )
    )
    fit([importance, freezing, recorder, *options.pop("extra", [])], Phases(schedule), **options)
    return recorder


def test_the_union_is_that_of_sets_and_the_cap_keeps_the_earlier_and_then_the_best() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    earlier = torch.zeros(10, dtype=torch.bool)
    earlier[[4, 9]] = True
    cases: list[tuple[float, float, set[int]]] = [
        (0.3, 1.0, {0, 1, 2, 4, 9}),
        (0.3, 0.4, {0, 1, 4, 9}),
        (0.2, 0.2, {4, 9}),
        (0.5, 1.0, {0, 1, 2, 3, 4, 9}),
    ]
    for fraction, cap, expected in cases:
        found = united([("w", scores)], {"w": earlier}, fraction, cap)
        assert set(found.masks["w"].nonzero().flatten().tolist()) == expected
        assert (found.frozen, found.total) == (len(expected), 10)
    assert torch.equal(
        united([("w", scores)], {}, 0.3, 1.0).masks["w"], freezing_masks([("w", scores)], 0.3).masks["w"]
    )


@pytest.mark.parametrize("selector", ["rl_topk", "random"])
def test_masks_are_the_union_of_all_and_hold_the_weights(selector: Any) -> None:
    seen = run(LONG, 0.2, 1.0, selector=selector)
    union: dict[str, Tensor] = {}
    for start in FIRST:
        masks, importance = seen.looks[start]
        if selector == "rl_topk":
            asked = freezing_masks(list(importance.items()), 0.2).masks
            union = {name: mask | union.get(name, torch.zeros_like(mask)) for name, mask in asked.items()}
            assert all(torch.equal(masks[name], mask) for name, mask in union.items())
        for name, mask in masks.items():
            for step in (start, start + 1):
                assert torch.equal(seen.weights[step + 1][name][mask], seen.weights[step][name][mask])
                assert (seen.weights[step + 1][name] != seen.weights[step][name])[~mask].all()
    shares = [sum(int(mask.sum()) for mask in seen.looks[start][0].values()) for start in FIRST]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0]
    assert not seen.looks[4][0], "all is free in RL"


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_cap_is_reached_and_never_passed_and_nothing_is_let_go(scope: Any) -> None:
    seen = run(LONG, 0.2, 0.3, scope, selector="random")
    masks = [seen.looks[start][0] for start in FIRST]
    for before, after in pairwise(masks):
        assert all((after[name] | ~mask).all() for name, mask in before.items())
    sizes = [mask.numel() for mask in masks[-1].values()]
    most = sum(int(0.3 * n) for n in sizes) if scope == "tensor" else int(0.3 * sum(sizes))
    assert sum(int(mask.sum()) for mask in masks[-1].values()) == most


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, scope: Any) -> None:
    extra: dict[str, Any] = {"extra": [every_step(tmp_path)], "enable_checkpointing": True}
    straight = run(SCHEDULE, 0.2, 0.3, scope, **extra)
    for step in range(1, len(SCHEDULE)):
        resumed = run(SCHEDULE, 0.2, 0.3, scope, ckpt_path=tmp_path / f"step={step}.ckpt")
        for name, weight in straight.weights[-1].items():
            assert torch.equal(resumed.weights[-1][name], weight), f"resumed from step {step}"


def test_what_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"cap is 0.1; allowed: at least fraction, 0.2, and at most 1"):
        CumulativeFreezing(0.2, 0.1)
    for selector in ("rl_bottomk", LowGain()):
        with pytest.raises(MisconfigurationException, match="a rule whose order is largest and that needs no gradient"):
            CumulativeFreezing(selector=selector)  # type: ignore[arg-type]
