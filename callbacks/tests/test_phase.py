"""How callbacks learn the phase."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import Phases, Recorder, fit

from mifo_callbacks import GradientFreezing, ImportanceEMA, PhaseCallback


class Edges(PhaseCallback):
    def __init__(self, phase: Any = "phase") -> None:
        super().__init__(phase)
        self.seen: list[tuple[int, str | None, str]] = []

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: Any, current: str) -> None:
        self.seen.append((trainer.global_step, previous, current))


def test_edges_are_seen_at_the_first_batch_of_a_phase() -> None:
    edges = Edges()
    fit([edges], Phases(["rl", "rl", "sft", "rl"]))
    assert edges.seen == [(0, None, "rl"), (2, "rl", "sft"), (3, "sft", "rl")]


def test_another_key_and_a_callable() -> None:
    by_key, by_call = Edges("kind"), Edges(lambda trainer, module, batch: batch["kind"].upper())
    for edges in (by_key, by_call):
        fit([edges], Phases(["a", "b"], key="kind"))
    assert by_key.seen == [(0, None, "a"), (1, "a", "b")]
    assert by_call.seen == [(0, None, "A"), (1, "A", "B")]


def test_a_missing_key_names_what_there_is() -> None:
    with pytest.raises(MisconfigurationException, match=r"keys \['kind', 'x', 'y'\].*'phase'"):
        fit([Edges()], Phases(["a"], key="kind"))


def test_a_label_must_be_a_string() -> None:
    with pytest.raises(MisconfigurationException, match=r"allowed: a string"):
        fit([Edges("x")], Phases(["a"]))


def test_a_phase_cannot_change_inside_an_optimizer_step() -> None:
    with pytest.raises(MisconfigurationException, match=r"from 'rl' to 'sft' at batch 3"):
        fit([Edges()], Phases(["rl", "rl", "rl", "sft"]), accumulate_grad_batches=2)
    edges = Edges()
    fit([edges], Phases(["rl", "rl", "sft", "sft"]), accumulate_grad_batches=2)
    assert [step for step, *_ in edges.seen] == [0, 1]


TWICE = ["rl 0", "sft 0", "sft 0", "sft 1", "sft 1", "rl 2", "rl 2"]


def test_two_phases_of_one_label_in_a_row_are_told_apart_by_their_number() -> None:
    edges = Edges()
    fit([edges], Phases(TWICE))
    assert edges.seen == [(0, None, "rl"), (1, "rl", "sft"), (3, "sft", "sft"), (5, "sft", "rl")]


def test_a_number_changes_between_optimizer_steps_only_and_is_an_int() -> None:
    with pytest.raises(MisconfigurationException, match=r"from 'sft' number 0 to 'sft' number 1 at batch 1"):
        fit([Edges()], Phases(["sft 0", "sft 1"]), accumulate_grad_batches=2)

    class Half(Phases):
        def __iter__(self) -> Any:
            return ({**batch, "phase_number": 0.5} for batch in super().__iter__())

    with pytest.raises(MisconfigurationException, match=r"\['phase_number'\] is 0\.5; allowed: an int"):
        fit([Edges()], Half(["sft"]))


def test_a_phase_of_its_own_is_frozen_and_measured_by_itself() -> None:
    freezing, importance = GradientFreezing(selector="random"), ImportanceEMA(measure="sft")
    recorder = Recorder(lambda: ({n: m.clone() for n, m in freezing.masks.items()}, importance.updates))
    fit([importance, freezing, recorder], Phases(TWICE))
    masks, updates = zip(*recorder.looks, strict=True)
    assert updates == (0, 0, 0, 1, 1, 2, 2)
    for name in masks[1]:
        assert torch.equal(masks[1][name], masks[2][name])
        assert torch.equal(masks[3][name], masks[4][name])
    assert any((masks[2][name] != masks[3][name]).any() for name in masks[1])


def test_a_state_without_a_number_goes_on_in_its_phase() -> None:
    edges = Edges()
    edges.load_state_dict({"phase": "sft"})
    fit([edges], Phases(["sft 4", "sft 4", "sft 5"]))
    assert edges.seen == [(2, "sft", "sft")]
