"""Rules that look at SFT's gradient too: what they choose, when, how many, and that a resumed run has the same mask."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_resume import SCHEDULE, every_step
from torch import Tensor
from toy import Phases, Recorder, Toy, fit

from mifo_callbacks import Coordinates, FreezingRule, GradientFreezing, ImportanceEMA, LowGain, OverlapShares
from mifo_callbacks.freezing_rules import freezing_masks
from mifo_callbacks.two_sided_rules import count_below, energy_overlap

RULES = [(LowGain, "tensor"), (LowGain, "global"), (OverlapShares, "global")]


def at(importance: Tensor, gradient: Tensor) -> Coordinates:
    return Coordinates("w", importance.shape, lambda: importance, importance, gradient)


def rank(values: Tensor) -> list[int]:
    """How many of the values are smaller, one after the other."""
    flat = values.flatten().tolist()
    return [sum(other < value for other in flat) for value in flat]


class Gradients(Recorder):
    """Also the gradient of every step before anything is masked, and the map then."""

    def __init__(self, importance: ImportanceEMA, freezing: GradientFreezing) -> None:
        super().__init__(lambda: {name: mask.clone() for name, mask in freezing.masks.items()})
        self.source, self.gradients, self.maps = importance, list[dict[str, Tensor]](), list[dict[str, Tensor]]()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
        self.maps.append({name: c.clone() for name, c in (self.source.importance or {}).items()})


def run(rule: FreezingRule, scope: Any, fraction: float = 0.5, **options: Any) -> Gradients:
    importance, freezing = ImportanceEMA(), GradientFreezing(fraction, rule, scope)
    recorder = Gradients(importance, freezing)
    fit([recorder, importance, freezing, *options.pop("extra", [])], Phases(SCHEDULE), Toy(weight_decay=0.1), **options)
    return recorder


def naive(rule: FreezingRule, importance: Tensor, gradient: Tensor) -> Tensor:
    """The scores of a rule, coordinate by coordinate."""
    n, c, gain = importance.numel(), rank(importance), rank(gradient.abs())
    energy = gradient.flatten().double().square().tolist()
    overlap = sum(r / n * e for r, e in zip(c, energy, strict=True)) / sum(energy)
    if isinstance(rule, LowGain):
        found = [
            (a - b + n) / n if x > 0 else 0.0 for a, b, x in zip(c, gain, importance.flatten().tolist(), strict=True)
        ]
    else:
        found = [a / n * (1 - overlap) for a in c]
    return torch.tensor(found).view(importance.shape)


@pytest.mark.parametrize("rule", [LowGain(), OverlapShares()], ids=lambda rule: type(rule).__name__)
def test_scores_are_those_of_the_formula_and_have_no_scale(rule: FreezingRule) -> None:
    draw = torch.Generator().manual_seed(1)
    importance = torch.randn(7, 9, generator=draw).square()
    importance[2] = 0  # tied
    gradient = torch.randn(7, 9, generator=draw)
    found = rule.score(at(importance, gradient))
    assert found is not None
    torch.testing.assert_close(found, naive(rule, importance, gradient), atol=1e-6, rtol=0)
    assert (found[2] == 0).all()
    again = rule.score(at(importance * 2**20, gradient / 2**10))
    assert again is not None
    assert torch.equal(again, found)


def test_low_gain_prefers_important_coordinates_that_sft_leaves_alone() -> None:
    importance, gradient = torch.tensor([9.0, 9.0, 0.1, 0.1, 0.0]), torch.tensor([1e-3, 5.0, 1e-3, 5.0, 0.0])
    found = LowGain().score(at(importance, gradient))
    assert found.argsort(descending=True)[0] == 0
    assert found[4] == 0, "nothing to protect comes last, however small its gradient"


def test_shares_follow_the_overlap_and_the_total_is_exact() -> None:
    importance = torch.arange(1, 1001).float()
    clashing, apart = importance.square(), 1 / importance
    scores = {
        name: OverlapShares().score(at(importance, gradient))
        for name, gradient in (("clash", clashing), ("even", torch.ones(1000)), ("apart", apart))
    }
    frozen = freezing_masks(list(scores.items()), 0.5, "global")
    share = {name: int(mask.sum()) / 1000 for name, mask in frozen.masks.items()}
    assert share["clash"] < share["even"] < share["apart"]
    assert sum(int(mask.sum()) for mask in frozen.masks.values()) == 1500
    for name, mask in frozen.masks.items():  # the most important of each
        assert mask[1000 - int(mask.sum()) :].all(), name
    below = count_below(importance) / 1000
    cost = {name: float(energy_overlap(below, g)) for name, g in (("even", torch.ones(1000)), ("apart", apart))}
    assert cost["even"] == pytest.approx(0.4995)
    threshold = (1 - share["even"]) * (1 - cost["even"])
    assert share["apart"] == pytest.approx(1 - threshold / (1 - cost["apart"]), abs=2e-3)
    assert float(energy_overlap(below, torch.zeros(1000))) == 0.5, "as by chance"


@pytest.mark.parametrize(("rule", "scope"), RULES)
@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_the_share_is_frozen_bit_for_bit_from_the_first_step_on(rule: Any, scope: Any, fraction: float) -> None:
    seen = run(rule(), scope, fraction)
    for start, end in ((3, 6), (8, 11)):
        masks = seen.looks[start]
        scores = {name: naive(rule(), seen.maps[start][name], g) for name, g in seen.gradients[start].items()}
        expected = freezing_masks([(name, scores[name]) for name in masks], fraction, scope)
        for name, mask in masks.items():
            assert torch.equal(mask, expected.masks[name]), name
            for step in range(start, end):
                assert torch.equal(seen.looks[step][name], mask)
                assert torch.equal(seen.weights[step + 1][name][mask], seen.weights[start][name][mask])
                assert (seen.weights[step + 1][name] != seen.weights[step][name])[~mask].all()
        sizes = [mask.numel() for mask in masks.values()]
        asked = sum(int(fraction * n) for n in sizes) if scope == "tensor" else int(fraction * sum(sizes))
        assert sum(int(mask.sum()) for mask in masks.values()) == asked
    assert not any(seen.looks[step] for step in (0, 1, 2, 6, 7, 11, 12))


class NoGradient(Toy):
    """The first SFT batch, number 3, has no loss."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


class Overflowing(Toy):
    """Its gradient overflows in that batch, and its optimizer leaves such a step out, as a scaler of losses does."""

    def on_after_backward(self) -> None:
        for p in self.parameters() if self.trainer.fit_loop.batch_idx == 3 else ():
            p.grad.fill_(float("inf"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        class Skipping(torch.optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                loss = closure()
                if all(p.grad.isfinite().all() for group in self.param_groups for p in group["params"]):
                    super().step()
                return loss

        return Skipping(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


@pytest.mark.parametrize("kind", [NoGradient, Overflowing])
@pytest.mark.parametrize(("rule", "scope"), RULES)
def test_no_rule_goes_by_a_gradient_that_is_none(kind: Any, rule: Any, scope: Any) -> None:
    importance, freezing = ImportanceEMA(), GradientFreezing(0.5, rule(), scope)
    seen = Gradients(importance, freezing)
    fit([seen, importance, freezing], Phases(SCHEDULE), kind())
    assert not seen.looks[3], "nothing is drawn yet"
    at_4 = -len(SCHEDULE) + 4  # counted from the end: a batch without a loss has no backward
    scores = {name: naive(rule(), seen.maps[at_4][name], g) for name, g in seen.gradients[at_4].items()}
    expected = freezing_masks(list(scores.items()), 0.5, scope).masks
    for name, mask in expected.items():
        assert torch.equal(seen.looks[4][name], mask)
        assert torch.equal(seen.weights[6][name][mask], seen.weights[4][name][mask])


@pytest.mark.parametrize(("rule", "scope"), RULES[1:])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, rule: Any, scope: Any) -> None:
    straight = run(rule(), scope, extra=[every_step(tmp_path)], enable_checkpointing=True)
    for step in range(1, len(SCHEDULE)):
        resumed = run(rule(), scope, ckpt_path=tmp_path / f"step={step}.ckpt")
        for name, weight in straight.weights[-1].items():
            assert torch.equal(resumed.weights[-1][name], weight), f"resumed from step {step}"
        for masks, again in zip(straight.looks[step:], resumed.looks, strict=True):
            assert all(torch.equal(again[name], mask) for name, mask in masks.items())
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"]["GradientFreezing{'during': 'sft'}"]
    assert {name: mask.dtype for name, mask in state["masks"].items()} == dict.fromkeys(state["masks"], torch.bool)
    between = torch.load(tmp_path / "step=7.ckpt", weights_only=True)["callbacks"]["GradientFreezing{'during': 'sft'}"]
    assert "masks" not in between


def test_micro_batches_change_nothing_but_rounding() -> None:
    """The gradient that the rule sees is that of the whole optimizer step."""

    class Doubled(Phases):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                for half in (slice(0, 4), slice(4, 8)):
                    yield {**batch, "x": batch["x"][half], "y": batch["y"][half]}

        def __len__(self) -> int:
            return 2 * len(self.schedule)

    whole, halves = ImportanceEMA(), ImportanceEMA()
    found = []
    for importance, loader, options in ((whole, Phases, {}), (halves, Doubled, {"accumulate_grad_batches": 2})):
        freezing = GradientFreezing(0.5, LowGain())
        recorder = Recorder(lambda freezing=freezing: dict(freezing.masks))
        fit([importance, freezing, recorder], loader(["rl", "rl", "sft"]), **options)
        found.append(recorder.looks[-1])
    differing = sum(int((found[0][name] != found[1][name]).sum()) for name in found[0])
    assert differing <= 4, "of 163, where rounding turns a rank"


def test_what_a_rule_does_not_declare_it_does_not_get() -> None:
    class Curious(FreezingRule):
        needs_importance = False

        def score(self, at: Coordinates) -> Tensor:
            return at.gradient.abs()

    with pytest.raises(MisconfigurationException, match="needs_gradient = False asks for the gradient"):
        fit([GradientFreezing(0.5, Curious())], Phases(["sft"]))
    with pytest.raises(MisconfigurationException, match="'tensor'; allowed with selector OverlapShares: global"):
        GradientFreezing(0.5, OverlapShares())


def test_a_parameter_that_the_loss_does_not_reach_has_no_gain() -> None:
    class Idle(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.idle = torch.nn.Parameter(torch.ones(4))

    class Looking(FreezingRule):
        needs_importance, needs_gradient = False, True
        seen: dict[str, Tensor] = {}

        def score(self, at: Coordinates) -> Tensor:
            self.seen[at.name] = at.gradient
            return at.draw()

    fit([GradientFreezing(0.5, Looking())], Phases(["sft"]), Idle())
    assert torch.equal(Looking.seen["idle"], torch.zeros(4))
