"""Frozen coordinates stay bit-identical, free ones move, and everything is free again afterwards."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from toy import Log, Phases, Recorder, Toy, fit

from mifo_callbacks import GradientFreezing, ImportanceEMA, freezing_masks, top_mask

SCHEDULE = ["rl"] * 4 + ["sft"] * 3 + ["rl"] * 2 + ["sft"] * 2 + ["rl"]
SELECTORS = ["rl_topk", "rl_bottomk", "random"]


def callbacks(**options: Any) -> tuple[GradientFreezing, Recorder, list[Callback]]:
    freezing = GradientFreezing(**options)
    recorder = Recorder(lambda: {name: mask.clone() for name, mask in freezing.masks.items()})
    return freezing, recorder, [ImportanceEMA(), freezing, recorder]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_frozen_coordinates_are_bit_identical_under_adamw(precision: Any, selector: Any, scope: Any) -> None:
    """Warm moments from rl and weight decay 0.1 would move every weight, gradient or not."""
    _, recorder, added = callbacks(selector=selector, scope=scope)
    fit(added, Phases(SCHEDULE), Toy(weight_decay=0.1), precision=precision)
    for start, end in ((4, 7), (9, 11)):
        before, masks = recorder.weights[start], recorder.looks[start]
        for step in range(start, end):
            after = recorder.weights[step + 1]
            for name, mask in masks.items():
                assert torch.equal(recorder.looks[step][name], mask)
                assert torch.equal(after[name][mask], before[name][mask])
                assert (after[name] != recorder.weights[step][name])[~mask].all()
    assert all(not recorder.looks[step] for step in (*range(4), 7, 8, 11))


@pytest.mark.parametrize("selector", SELECTORS)
def test_all_coordinates_are_free_in_the_next_phase(selector: Any) -> None:
    _, recorder, added = callbacks(selector=selector)
    fit(added, Phases(SCHEDULE))
    for name in recorder.weights[0]:
        assert (recorder.weights[8][name] != recorder.weights[7][name]).all()


def test_none_freezes_nothing_and_changes_nothing() -> None:
    _, _, added = callbacks(selector="none")
    with_callback, without = fit(added, Phases(SCHEDULE)), fit([], Phases(SCHEDULE))
    for a, b in zip(with_callback.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("selector", SELECTORS)
def test_counts_are_exact(selector: Any, fraction: float) -> None:
    _, by_tensor, added = callbacks(selector=selector, fraction=fraction)
    fit(added, Phases(["rl", "sft"]))
    for mask in by_tensor.looks[1].values():
        assert mask.sum() == int(fraction * mask.numel() + 1e-9)
    _, by_all, added = callbacks(selector=selector, fraction=fraction, scope="global")
    fit(added, Phases(["rl", "sft"]))
    n = sum(mask.numel() for mask in by_all.looks[1].values())
    assert sum(mask.sum() for mask in by_all.looks[1].values()) == int(fraction * n + 1e-9)


def test_topk_freezes_the_most_important() -> None:
    importance, freezing = ImportanceEMA(), GradientFreezing(fraction=0.25)
    recorder = Recorder(lambda: dict(freezing.masks))
    fit([importance, freezing, recorder], Phases(["rl", "rl", "sft"]))
    assert importance.importance is not None
    for name, mask in recorder.looks[-1].items():
        c = importance.importance[name]
        assert not mask.any() or c[mask].min() >= c[~mask].max()
        assert torch.equal(mask, top_mask([c], int(mask.sum()))[0])


def scores(zero: int, n: int = 10) -> Tensor:
    """Scores 0 (zero times), then 1, 2, 3, ..."""
    return torch.cat([torch.zeros(zero), torch.arange(1, n - zero + 1).float()])


@pytest.mark.parametrize("order", ["largest", "smallest_zero_last"])
def test_zeros_are_frozen_last_and_by_position(order: Any) -> None:
    frozen = freezing_masks([("w", scores(zero=7))], 0.5, order=order)
    assert frozen.masks["w"].nonzero().flatten().tolist() == [0, 1, 7, 8, 9]
    assert frozen[1:] == (5, 10, 7, 2)  # frozen, total, tied, zero


def test_bottom_is_the_other_end_of_the_non_zero() -> None:
    assert freezing_masks([("w", scores(zero=2))], 0.3, order="smallest_zero_last").masks[
        "w"
    ].nonzero().flatten().tolist() == [2, 3, 4]
    assert freezing_masks([("w", scores(zero=2))], 0.3, order="largest").masks["w"].nonzero().flatten().tolist() == [
        7,
        8,
        9,
    ]


def test_scopes_rank_within_a_tensor_or_over_all() -> None:
    named = [("small", scores(0)), ("large", scores(0) * 100), ("one", torch.ones(1))]
    by_tensor = freezing_masks(named, 0.5, "tensor")
    assert [int(mask.sum()) for mask in by_tensor.masks.values()] == [5, 5, 0]
    over_all = freezing_masks(named, 0.5, "global")
    assert [int(mask.sum()) for mask in over_all.masks.values()] == [0, 10, 0]
    assert (by_tensor.frozen, over_all.frozen, over_all.total) == (10, 10, 21)


def test_random_masks_differ_by_phase_parameter_and_seed_only() -> None:
    looks = []
    for seed, module in ((0, Toy()), (0, Toy(lr=0.5)), (1, Toy())):
        freezing = GradientFreezing(selector="random", seed=seed)
        recorder = Recorder(lambda freezing=freezing: dict(freezing.masks))
        fit([freezing, recorder], Phases(["sft", "rl", "sft"]), module)
        looks.append([recorder.looks[0], recorder.looks[2]])
    name = "net.0.weight"
    (first, second), (again, _), (other, _) = looks
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


def test_masked_gradients_are_zero_before_clipping() -> None:
    """A frozen gradient that is huge or NaN must not reach the clip norm."""
    norms = []

    class Broken(Toy):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 1:
                for p in self.parameters():
                    assert p.grad is not None
                    p.grad[freezing.masks[names[p]]] = torch.nan

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            norms.append(torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0).item())

    freezing, module = GradientFreezing(), Broken()
    names = {p: name for name, p in module.named_parameters()}
    fit([ImportanceEMA(), freezing], Phases(["rl", "sft"]), module)
    assert norms[1] > 0
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_skipped_training_step_is_tolerated() -> None:
    class Skips(Toy):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    _, recorder, added = callbacks()
    fit(added, Phases(["rl", "sft", "sft", "sft"]), Skips())
    for name, mask in recorder.looks[1].items():
        assert torch.equal(recorder.weights[4][name][mask], recorder.weights[1][name][mask])


def test_an_optimizer_swapped_in_by_the_module_is_caught() -> None:
    class Swaps(Toy):
        def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
            self.trainer.strategy.optimizers = [self.own[batch["phase"]]]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.own = {
                phase: torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1) for phase in ("rl", "sft")
            }
            return self.own["rl"]

    _, recorder, added = callbacks()
    fit(added, Phases(["rl", "sft", "rl", "sft", "sft"]), Swaps())
    for name, mask in recorder.looks[4].items():
        assert torch.equal(recorder.weights[5][name][mask], recorder.weights[3][name][mask])


def test_manual_optimization() -> None:
    class Manual(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    _, recorder, added = callbacks()
    fit(added, Phases(["rl", "sft", "sft", "rl"]), Manual())
    for name, mask in recorder.looks[1].items():
        assert torch.equal(recorder.weights[3][name][mask], recorder.weights[1][name][mask])
        assert (recorder.weights[4][name] != recorder.weights[3][name]).all()


def test_without_a_map_nothing_is_frozen_and_one_warning_says_so() -> None:
    _, recorder, added = callbacks()
    with pytest.warns(UserWarning, match="before there is an importance map") as caught:
        fit(added, Phases(["sft", "sft", "rl", "sft"]))
    assert sum("importance map" in str(w.message) for w in caught) == 1
    assert [bool(look) for look in recorder.looks] == [False, False, False, True]


def test_snapshot_and_reference_are_never_held_together() -> None:
    importance, freezing, held = ImportanceEMA(), GradientFreezing(), []

    class Watch(Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            held.append((bool(importance._start), bool(freezing._reference)))

    fit([importance, freezing, Watch()], Phases(["rl", "sft", "rl", "sft"]))
    assert held == [(True, False), (False, True)] * 2


@pytest.mark.parametrize("selector", ["rl_topk", "rl_bottomk"])
def test_importance_must_be_there_and_come_first(selector: Any) -> None:
    freezing = GradientFreezing(selector=selector)
    with pytest.raises(MisconfigurationException, match=r"there are 0; allowed: one, or selector"):
        fit([freezing], Phases(["rl"]))
    with pytest.raises(MisconfigurationException, match="there are 0"):
        fit([ImportanceEMA(measure="sft"), freezing], Phases(["rl"]))
    with pytest.raises(MisconfigurationException, match="stands after"):
        fit([freezing, ImportanceEMA()], Phases(["rl"]))


@pytest.mark.parametrize("bad", [{"fraction": 0.0}, {"fraction": 1.1}, {"selector": "topk"}, {"scope": "layer"}])
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="allowed: "):
        GradientFreezing(**bad)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_and_memory_are_released(fails: bool) -> None:
    class Fails(Toy):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            if fails and batch_idx == 2:
                raise KeyboardInterrupt
            self.used = self.optimizers()
            return super().training_step(batch, batch_idx)

    freezing, importance, module = GradientFreezing(), ImportanceEMA(accumulate="step"), Fails()
    try:
        fit([importance, freezing], Phases(["rl", "sft", "sft"]), module)
    except (KeyboardInterrupt, SystemExit):
        assert fails
    assert not module.used.optimizer._optimizer_step_post_hooks
    assert not freezing.masks
    assert not freezing._reference


def test_what_is_logged() -> None:
    log = Log()
    _, recorder, added = callbacks(fraction=0.5)
    fit(added, Phases(["rl", "rl", "sft", "sft", "rl"]), logger=log)
    masks = recorder.looks[2]
    n, frozen = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    assert log.rows["freeze/share"] == [(2, frozen / n)]
    assert log.values("freeze/zero_share") == [0.0]
    assert [step for step, _ in log.rows["freeze/masked_grad_share"]] == [2, 3]
    assert all(0 < value < 1 for value in log.values("freeze/masked_grad_share"))


@pytest.mark.parametrize("selector", ["rl_topk", "rl_bottomk"])
def test_ties_and_zeros_are_logged(selector: Any) -> None:
    """Weights that get no gradient and no decay do not move in rl: their importance is exactly 0."""

    class HalfDead(Toy):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            batch["x"][:, 1:] = 0  # only the first input column of net.0.weight has a gradient
            return super().training_step(batch, batch_idx)

    log = Log()
    loader = Phases(["rl", "rl", "rl", "sft"])
    fit([ImportanceEMA(), GradientFreezing(selector=selector)], loader, HalfDead(weight_decay=0.0), logger=log)
    assert log.values("freeze/ties") == [80.0]
    assert log.values("freeze/zero_share") == [32 / (48 + 8 + 24 + 1)]


@pytest.mark.parametrize(("lr", "said"), [(1e-9, 1), (1e-2, 0)])
def test_importance_that_is_rounding_noise_is_said_once(lr: float, said: int) -> None:
    """At a tiny rate a weight moves by a unit in the last place or not at all: most are tied."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule = ["rl", "rl", "sft"] * 2
        fit([ImportanceEMA(), GradientFreezing()], Phases(schedule), Toy(lr=lr, weight_decay=0.0))
    lines = [str(w.message) for w in caught if "tied at the threshold" in str(w.message)]
    assert len(lines) == said
    assert all("several optimizer steps" in line for line in lines)
