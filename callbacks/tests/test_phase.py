"""How callbacks learn the phase."""

from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import Phases, fit

from mifo_callbacks import PhaseCallback


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
