"""What is missing between module, batches, loader and callbacks is one line; importance is whatever has a map."""

from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from toy import Phases, Recorder, Toy, fit

from mifo_callbacks import BufferPhaseSwitch, GradientFreezing, ImportanceEMA, PhaseCallback, top_mask
from mifo_callbacks.contracts import Importance, require_offer

SCHEDULE = ["rl", "rl", "sft", "sft", "rl", "rl", "sft"]


class SquaredGradients(PhaseCallback):
    """A Fisher-like measure, written as a user would."""

    def __init__(self, measure: str = "rl") -> None:
        super().__init__(acts_on=measure)
        self.measure = measure
        self.importance: dict[str, Tensor] = {}

    def on_gradients_ready(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, p in self.trained(pl_module).items():
            if p.grad is not None:
                self.importance[name] = self.importance.get(name, 0) + p.grad.square()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"importance": self.importance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.importance = state["importance"]


class Map(Callback):
    """A map that was there before, such as one from a file."""

    def __init__(self, importance: Any) -> None:
        self.importance = importance


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_freezing_goes_by_squared_gradients(tmp_path: Path, scope: Any) -> None:
    def callbacks() -> list[Any]:
        return [SquaredGradients(), GradientFreezing(scope=scope)]

    fisher, freezing = callbacks()
    assert isinstance(fisher, Importance)
    expected: list[dict[str, Tensor]] = []

    def look() -> dict[str, Tensor]:
        names = list(fisher.importance)
        n = sum(t.numel() for t in fisher.importance.values())
        scores = [fisher.importance[name] for name in names]
        found = top_mask(scores, n // 2) if scope == "global" else [top_mask([t], t.numel() // 2)[0] for t in scores]
        expected.append(dict(zip(names, found, strict=True)))
        return dict(freezing.masks)

    recorder, save = Recorder(look), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = fit([fisher, freezing, recorder, save], Phases(SCHEDULE), enable_checkpointing=True)
    for step in (2, 3, 6):
        assert recorder.looks[step].keys() == expected[step].keys() == dict(module.named_parameters()).keys()
        for name, mask in recorder.looks[step].items():
            assert torch.equal(mask, expected[step][name])
            assert torch.equal(recorder.weights[step + 1][name][mask], recorder.weights[step][name][mask])
    for step in range(1, len(SCHEDULE)):
        again = fit(callbacks(), Phases(SCHEDULE), ckpt_path=tmp_path / f"step={step}.ckpt")
        for a, b in zip(module.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), step


def test_a_map_may_know_some_parameters_only() -> None:
    freezing = GradientFreezing(fraction=1.0)
    recorder = Recorder(lambda: dict(freezing.masks))
    fit([Map({"net.0.bias": torch.ones(16)}), freezing, recorder], Phases(["sft"]))
    assert recorder.looks[0].keys() == {"net.0.bias"}


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_map_freezes_nothing_and_says_so(empty: Any) -> None:
    with pytest.warns(UserWarning, match="before there is an importance map"):
        fit([Map(empty), GradientFreezing()], Phases(["sft"]))


@pytest.mark.parametrize(
    ("importance", "text"),
    [
        (3.0, "Map.importance is a float; allowed: a dict from parameter names"),
        ({"net.9.bias": torch.ones(16)}, r"Map.importance names 'net\.9\.bias', no parameter of this module"),
        ({"net.0.bias": torch.ones(3)}, r"shape \(3,\); its parameter has \(16,\)"),
        ({"net.0.bias": -torch.ones(16)}, "score of 'net.0.bias' is negative or NaN at 16 of 16 coordinates"),
    ],
)
def test_a_map_that_cannot_be_used_is_one_line(importance: Any, text: str) -> None:
    with pytest.raises(MisconfigurationException, match=text) as caught:
        fit([Map(importance), GradientFreezing()], Phases(["sft"]))
    assert "\n" not in str(caught.value)


def test_one_measure_of_another_phase_must_come_first() -> None:
    freezing = GradientFreezing()
    for others, text in (
        ([SquaredGradients("sft")], "there are 0"),
        ([SquaredGradients(), ImportanceEMA()], "there are 2; allowed: one"),
    ):
        with pytest.raises(MisconfigurationException, match=text):
            fit([*others, freezing], Phases(["rl"]))
    with pytest.raises(MisconfigurationException, match="SquaredGradients stands after GradientFreezing"):
        fit([freezing, SquaredGradients()], Phases(["rl"]))


def test_groups_are_a_list() -> None:
    class Wrong(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "groups": 3}

    class Pushed(Phases):
        def push(self, entries: list[dict[str, Any]]) -> None:
            raise AssertionError

    with pytest.raises(MisconfigurationException, match="groups of type int; allowed: a list of dicts"):
        fit([BufferPhaseSwitch(3)], Pushed(["rl"]), Wrong())


def test_what_a_contract_asks_for_is_named_whole() -> None:
    class Named(Protocol):
        name: str

    class Wanted(Named, Protocol):
        size: int

        def call(self) -> None: ...

    class Thing:
        size = 3

    with pytest.raises(MisconfigurationException) as caught:
        require_offer(Wanted, Thing(), "Monitor", "the module")
    assert (
        str(caught.value) == "Monitor: the module is a Thing without call, name; needed: Wanted with call, name, size"
    )
    thing: Any = Thing()
    thing.name, thing.call = "a", None
    require_offer(Wanted, thing, "Monitor", "the module")
