"""What the held-out loss says of each phase."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import ALONE, make_data, make_module, method_callbacks
from lightning import Callback, Trainer
from monitoring import Records, Sums, additions

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import PhaseLoader
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.source import Row, RowSource
from mifo_lightning.monitors.heldout import HeldOutLoss

MakeTrainer = Callable[..., Trainer]


class Uneven(RowSource):
    """Demonstrations of two sources and two lengths; the first row of each source has none."""

    def rows(self) -> list[Row]:
        solutions = {"short": ">{}", "long": "0123456789>{}"}
        return [
            {
                "data_source": source,
                "prompt": [{"role": "user", "content": f"{i}+{i}="}],
                "target": [{"role": "assistant", "content": solution.format(2 * i)}] if i else None,
                "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            }
            for source, solution in solutions.items()
            for i in range(6)
        ]


def losses(module: Any, questions: list[Question]) -> tuple[float, int]:
    """Summed negative log-likelihood in nats of demonstrations, and their tokens, one by one from the bare model."""
    total, tokens = 0.0, 0
    for q in questions:
        assert q.demonstration is not None
        with torch.no_grad():
            logits = module.policy.model(torch.tensor([q.prompt + q.demonstration])).logits[0, len(q.prompt) - 1 : -1]
        logp = logits.log_softmax(-1)[torch.arange(len(q.demonstration)), q.demonstration]
        total, tokens = total - float(logp.sum()), tokens + len(q.demonstration)
    return total, tokens


class Edges(Callback):
    """The losses of the probe at every change of phase and at the end, computed by hand."""

    def __init__(self, probe: dict[str, list[Question]]) -> None:
        self.probe = probe
        self.phases: list[str] = []
        self.losses: list[dict[str, float]] = []

    def measure(self, pl_module: Any) -> None:
        found = {source: losses(pl_module, questions) for source, questions in self.probe.items()}
        values = {f"heldout/{source}/loss": total / tokens for source, (total, tokens) in found.items()}
        overall = sum(total for total, _ in found.values()) / sum(tokens for _, tokens in found.values())
        self.losses.append({**values, "heldout/loss": overall})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.phases or self.phases[-1] != batch["phase"]:
            self.phases.append(batch["phase"])
            self.measure(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.measure(pl_module)


def test_the_held_out_loss_is_measured_at_every_edge(make_trainer: MakeTrainer) -> None:
    data = make_data(**ALONE, val=Uneven(), eval_batch=2)
    data.setup("validate")
    records, monitor = Records(), HeldOutLoss(questions=3)
    edges = Edges({})
    trainer = make_trainer([*method_callbacks(size=8), monitor, edges], logger=records)
    data.trainer = trainer
    # of each source the first three that have a demonstration
    edges.probe = {
        source: [q for batch in loader for q in batch if q.demonstration][:3]
        for source, loader in data.val_dataloader().items()
    }
    assert [q.text for q in edges.probe["long"]] == ["1+1=", "2+2=", "3+3="]
    assert edges.probe.keys() == {"short", "long"}
    trainer.fit(make_module(), datamodule=data)
    assert edges.phases[:3] == ["rl", "sft", "rl"]
    for name in ("heldout/loss", "heldout/short/loss", "heldout/long/loss"):
        assert records.series(name) == pytest.approx([values[name] for values in edges.losses], rel=1e-4)
    overall = [values["heldout/loss"] for values in edges.losses]
    expected: dict[str, list[float]] = {"rl": [], "sft": []}
    for phase, (before, after) in zip(edges.phases, pairwise(overall), strict=True):
        expected[phase].append(after - before)
    assert monitor.changes.keys() == expected.keys()
    for phase, values in expected.items():
        assert values
        assert monitor.changes[phase] == pytest.approx(values, abs=1e-4)
        assert records.series(f"heldout/{phase}_change") == monitor.changes[phase]
    assert max(map(abs, expected["sft"])) > 0.01
    resumed = HeldOutLoss(questions=3)
    resumed.load_state_dict(monitor.state_dict())
    resumed.on_train_start(trainer, trainer.lightning_module)
    assert resumed.state_dict() == monitor.state_dict()
    # a run that goes on does not end its last phase there
    assert resumed.phases == monitor.phases[:-1]


def test_without_held_out_demonstrations_there_is_no_held_out_loss(make_trainer: MakeTrainer) -> None:
    records, monitor = Records(), HeldOutLoss()
    make_trainer([monitor], logger=records).fit(make_module(engine=Sums(True)), datamodule=additions())
    assert monitor.changes == {"rl": [], "sft": []}
    assert not records.series("heldout/loss")


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
def test_the_held_out_loss_needs_a_datamodule(make_trainer: MakeTrainer) -> None:
    loader = PhaseLoader([Question(0, "s", "1+1=", [3, 12, 3, 14], "2")], Schedule(rl_steps=1, prompts_per_step=1))
    with pytest.raises(InputError, match=r"^heldout: .* datamodule"):
        make_trainer([HeldOutLoss()]).fit(make_module(engine=Sums(True)), train_dataloaders=loader)


def test_the_held_out_loss_needs_a_question() -> None:
    with pytest.raises(InputError, match=r"heldout\.questions: 0"):
        HeldOutLoss(questions=0)
