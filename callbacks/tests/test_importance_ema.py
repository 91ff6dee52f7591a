"""The importance map against hand-computed movement."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from toy import Log, Phases, Recorder, Toy, fit

from mifo_callbacks import ImportanceEMA, update_importance
from mifo_callbacks.importance_ema import importance_metrics

SCHEDULE = ["rl"] * 3 + ["sft"] * 2 + ["rl"] * 2 + ["sft"] + ["rl"] * 4 + ["sft"]
PHASES = [(0, 3), (5, 7), (8, 12)]  # optimizer steps of the rl phases


def by_hand(weights: list[dict[str, Tensor]], spans: list[tuple[int, int]], alpha: float, g: str) -> dict[str, Tensor]:
    size = torch.square if g == "square" else torch.abs
    importance: dict[str, Tensor] = {}
    for start, end in spans:
        for name in weights[0]:
            moved = size(weights[end][name] - weights[start][name])
            importance[name] = alpha * importance[name] + (1 - alpha) * moved if name in importance else moved
    return importance


@pytest.mark.parametrize("g", ["square", "abs"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("accumulate", ["phase", "step"])
def test_map_equals_the_formula(accumulate: Any, alpha: float, g: Any) -> None:
    importance, recorder = ImportanceEMA(alpha=alpha, movement=g, accumulate=accumulate), Recorder()
    fit([importance, recorder], Phases(SCHEDULE))
    spans = PHASES if accumulate == "phase" else [(i, i + 1) for start, end in PHASES for i in range(start, end)]
    expected = by_hand(recorder.weights, spans, alpha, g)
    assert importance.importance is not None
    assert importance.updates == len(spans)
    assert importance.importance.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(importance.importance[name], value, rtol=1e-5, atol=1e-12)
        if alpha == 0:
            assert torch.equal(importance.importance[name], value)


@pytest.mark.parametrize("accumulate", ["phase", "step"])
def test_movement_in_another_phase_never_counts(accumulate: Any) -> None:
    """The module moves every weight far in sft and not at all in rl."""

    class Jump(Toy):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            self.optimizers().param_groups[0]["lr"] = 1.0 if batch["phase"] == "sft" else 0.0  # type: ignore[union-attr]
            return super().training_step(batch, batch_idx)

    importance = ImportanceEMA(accumulate=accumulate)
    fit([importance], Phases(SCHEDULE), Jump())
    assert importance.importance is not None
    assert all((value == 0).all() for value in importance.importance.values())


def test_accumulated_micro_batches_are_one_step() -> None:
    importance, recorder = ImportanceEMA(accumulate="step", alpha=0.0), Recorder()
    fit([importance, recorder], Phases(["rl"] * 4 + ["sft"] * 2), accumulate_grad_batches=2)
    assert importance.updates == 2
    assert importance.importance is not None
    for name, value in by_hand(recorder.weights, [(2, 4)], 0.0, "square").items():
        assert torch.equal(importance.importance[name], value)


def test_foreign_labels_and_frozen_parameters() -> None:
    module = Toy()
    module.net[0].bias.requires_grad_(False)
    importance = ImportanceEMA(measure="a", phase=lambda trainer, pl_module, batch: batch["kind"])
    fit([importance], Phases(["a", "a", "b"], key="kind"), module)
    assert importance.importance is not None
    assert set(importance.importance) == {"net.0.weight", "net.2.weight", "net.2.bias"}


def test_at_most_one_copy_of_the_weights_beside_the_map() -> None:
    """What the callback holds after each step, in tensors of the size of the weights: (start, map)."""
    importance = ImportanceEMA()
    recorder = Recorder(lambda: (len(importance._start), len(importance.importance or {})))
    fit([importance, recorder], Phases(["rl", "rl", "sft", "rl", "sft"]))
    assert recorder.looks == [(4, 0), (4, 0), (0, 4), (4, 4), (0, 4)]


def test_update_reuses_the_memory_of_the_start() -> None:
    start, end = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0])
    first = update_importance(None, start, end, alpha=0.5, movement="abs")
    assert first.data_ptr() == start.data_ptr()
    second = update_importance(first, torch.tensor([0.0, 0.0]), torch.tensor([0.5, -3.0]), alpha=0.5, movement="abs")
    assert second is first
    assert second.tolist() == [0.5, 1.5]


def test_what_is_logged() -> None:
    importance, log = ImportanceEMA(), Log()
    fit([importance], Phases(["rl", "rl", "sft", "sft", "rl", "sft"]), logger=log)
    assert [step for step, _ in log.rows["importance/updates"]] == [2, 5]
    assert importance.importance is not None
    flat = torch.cat([value.flatten() for value in importance.importance.values()]).sort().values
    for q in (0.5, 0.9, 0.99):
        assert log.values(f"importance/q{q}")[-1] == flat[-int(-q * len(flat) // 1) - 1].item()
    assert log.values("importance/mean")[-1] == pytest.approx(flat.mean().item(), rel=1e-5)
    assert log.values("importance/zero_share")[-1] == pytest.approx((flat == 0).float().mean().item())


@pytest.mark.parametrize("alpha", [-0.1, 1.0])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(MisconfigurationException, match=r"alpha is .*; allowed: at least 0 and below 1"):
        ImportanceEMA(alpha=alpha)


@pytest.mark.parametrize("bad", [{"movement": "cube"}, {"accumulate": "epoch"}, {"dtype": "float16"}])
def test_unknown_choices(bad: dict[str, str]) -> None:
    with pytest.raises(MisconfigurationException, match=r"allowed: "):
        ImportanceEMA(**bad)  # type: ignore[arg-type]


def test_bf16_weights_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"'net.0.weight' of torch.bfloat16; allowed: torch.float32"):
        fit([ImportanceEMA()], Phases(["rl"]), precision="bf16-true")


def test_bf16_mixed_measures_fp32_weights() -> None:
    importance = ImportanceEMA()
    fit([importance], Phases(["rl", "sft"]), precision="bf16-mixed")
    assert importance.importance is not None
    assert all(value.dtype == torch.float32 for value in importance.importance.values())


def test_several_optimizers_count_their_own_steps() -> None:
    class Two(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self.net(batch["x"]), batch["y"]))
                optimizer.step()

    importance, recorder = ImportanceEMA(accumulate="step", alpha=0.5), Recorder()
    fit([importance, recorder], Phases(["rl", "rl"]), Two())
    assert importance.importance is not None
    for name, value in by_hand(recorder.weights, [(0, 1), (1, 2)], 0.5, "square").items():
        torch.testing.assert_close(importance.importance[name], value, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("movement", ["square", "abs"])
@pytest.mark.parametrize("first", [False, True])
def test_chunks_change_no_bit_of_the_map(movement: Any, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as `start - end`, its size and the average over whole tensors, one after the other."""
    monkeypatch.setattr("mifo_callbacks.masking.CHUNK", 24)
    for shape in ((1000,), (37, 11)):
        start, end, known = (torch.randn(shape) for _ in range(3))
        size = (start - end).square() if movement == "square" else (start - end).abs()
        expected = size if first else known.clone().lerp_(size, 0.7)
        found = update_importance(None if first else known, start, end, alpha=0.3, movement=movement)
        assert torch.equal(found, expected)
        assert found is (start if first else known)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_a_bf16_map_is_averaged_in_fp32_and_off_by_no_more_than_it_says(alpha: float) -> None:
    """Movements of very different sizes, from 1e-9, whose square is 1e-18, to 1e-3."""
    draw = torch.Generator().manual_seed(0)
    exact = half = None
    largest = torch.zeros(5000)
    for _ in range(30):
        start, end = torch.zeros(5000), 10 ** (-9 + 6 * torch.rand(5000, generator=draw))
        once = end.square() if half is None else half.float().lerp(end.square(), 1 - alpha)
        half = update_importance(half, start.clone(), end, alpha).bfloat16()
        assert torch.equal(half, once.bfloat16())
        exact = update_importance(exact, start, end, alpha)
        largest = torch.maximum(largest, exact)
        assert ((half - exact).abs() <= 1.01 * 2**-8 / (1 - alpha) * largest).all()


@pytest.mark.parametrize("accumulate", ["phase", "step"])
def test_a_bf16_map_takes_half_the_bytes_and_is_read_as_fp32(accumulate: Any) -> None:
    maps, logs = [], [Log(), Log()]
    for dtype, log in zip(("float32", "bfloat16"), logs, strict=True):
        importance = ImportanceEMA(alpha=0.0, accumulate=accumulate, dtype=dtype)  # type: ignore[arg-type]
        fit([importance], Phases(SCHEDULE), logger=log)
        assert importance.importance is not None
        maps.append((dict(importance.importance), sum(t.nbytes for t in importance._map.values())))
    (exact, full), (half, few) = maps
    assert 2 * few == full
    assert exact.keys() == half.keys()
    for name, value in exact.items():
        assert half[name].dtype == torch.float32
        assert torch.equal(half[name], value.bfloat16().float())
    for name, value in importance_metrics(half).items():
        assert logs[1].values(name)[-1] == value


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_a_map_of_the_other_dtype_is_taken_over(saved: Any) -> None:
    loaded: Any = {"float32": "bfloat16", "bfloat16": "float32"}[saved]
    before, after = ImportanceEMA(dtype=saved), ImportanceEMA(dtype=loaded)
    fit([before], Phases(["rl", "rl", "sft"]))
    after.load_state_dict(before.state_dict())
    for name, value in before._map.items():
        assert torch.equal(after._map[name], value.to(getattr(torch, loaded)))


def test_weights_that_a_module_trains_within_batches_alone_are_measured() -> None:
    """Its hooks come after those of callbacks, and take back at the end of a batch what they gave at its start."""

    class Within(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
            self.net[0].requires_grad_(True)

        def on_train_batch_end(self, *args: Any) -> None:
            self.net[0].requires_grad_(False)

    importance = ImportanceEMA()
    recorder = Recorder()
    fit([importance, recorder], Phases(["rl", "rl", "sft"]), Within())
    assert importance.importance is not None
    for name, weight in recorder.weights[0].items():
        moved = recorder.weights[2][name] - weight
        assert moved.any()
        torch.testing.assert_close(importance.importance[name], moved.square())
