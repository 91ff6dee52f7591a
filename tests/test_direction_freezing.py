"""Directions of RL's change that SFT leaves alone: what stands still, under AdamW too, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, weights
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.methods import DirectionFreezing
from mifo_lightning.methods.direction_freezing import top_directions
from mifo_lightning.policy.adapter import Adapter, Change
from mifo_lightning.policy.loading import plain_weights
from mifo_lightning.steps.optimizer import AdamWSettings

pytest.importorskip("peft")

FAST = AdamWSettings(lr=5e-3, weight_decay=0.1)
LAYER = "model.layers.1.mlp.up_proj.weight"


def fit(make_trainer: Callable[..., Trainer], *callbacks: Callback, ckpt: Path | None = None, **changes: Any) -> Any:
    settings = {"rank": 4, "alpha": 8.0, **changes.pop("adapter", {})}
    module = make_module(adapter=Adapter(**settings), rl=FAST, sft=FAST, **changes)
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = make_trainer([BufferPhaseSwitch(size=8, max_accuracy=0.75), *callbacks], enable_checkpointing=saves)
    trainer.fit(module, make_data(schedule=Schedule(rl_steps=4, prompts_per_step=4, sft_batch=4)), ckpt_path=ckpt)
    return module


class Watch(Callback):
    """The merged weight of a layer where RL and SFT phases begin and end, and its held directions."""

    def __init__(self, freezing: DirectionFreezing) -> None:
        self.freezing, self.phases, self.labels = freezing, list[tuple[Tensor, Tensor, Tensor, Tensor]](), list[str]()
        self.rl: Tensor | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        before = self.labels[-1] if self.labels else None
        if batch["phase"] == "rl" and before != "rl":
            self.rl = plain_weights(pl_module.policy)[LAYER]
        self.began = plain_weights(pl_module.policy)[LAYER]
        self.labels.append(batch["phase"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch["phase"] == "sft":
            held = self.freezing.state_dict()["held"]["policy.model." + LAYER.removesuffix(".weight")]
            after = plain_weights(pl_module.policy)[LAYER]
            self.phases.append((self.began, after, held["u"], held["v"]))


def test_directions_are_those_of_the_singular_value_decomposition() -> None:
    left, right = torch.randn(30, 6), torch.randn(6, 20)
    left[:, 5] = left[:, 4]  # rank 5
    u, v = top_directions(Change(left, right), 3)
    expected_u, _, expected_vt = torch.linalg.svd(left @ right)
    for found, expected in ((u, expected_u[:, :3]), (v, expected_vt[:3].T)):
        torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-4, rtol=1e-3)
    assert [x.shape[1] for x in top_directions(Change(left, right), 9)] == [5, 5]
    assert [x.shape[1] for x in top_directions(Change(left * 0, right), 9)] == [0, 0]


@pytest.mark.parametrize("selector", ["rl_topk", "random"])
def test_the_block_of_held_directions_stands_still_while_sft_moves_the_weight(
    make_trainer: Callable[..., Trainer], selector: Any
) -> None:
    freezing = DirectionFreezing(2, selector, seed=0)
    watch = Watch(freezing)
    fit(make_trainer, freezing, watch)
    assert len(watch.phases) > 1
    for before, after, u, v in watch.phases:
        assert u.shape == (256, 2)
        assert v.shape == (96, 2)
        change = after - before
        assert float(change.norm()) > 1e-2
        assert float((u.T @ change @ v).norm()) < 2e-6 * float(before.norm())
    if selector == "random":
        assert not torch.equal(watch.phases[0][2], watch.phases[-1][2]), "each phase draws anew"


def test_without_it_sft_moves_the_block(make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The projected gradient alone is not enough: AdamW turns the step."""
    monkeypatch.setattr(DirectionFreezing, "on_after_optimizer_step", lambda *_: None)
    freezing = DirectionFreezing(2)
    watch = Watch(freezing)
    fit(make_trainer, freezing, watch)
    moved = [float((u.T @ (after - before) @ v).norm()) / float(before.norm()) for before, after, u, v in watch.phases]
    assert max(moved) > 1e-4


@pytest.mark.parametrize("adapter", [{}, {"frozen_a": True, "per_phase": True}])
def test_resuming_inside_a_phase_is_exact(
    make_trainer: Callable[..., Trainer], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    freezing = DirectionFreezing(2)
    watch = Watch(freezing)
    whole = fit(make_trainer, freezing, watch, saver, adapter=adapter)
    inside = watch.labels.index("sft") + 1
    assert watch.labels[inside] == "sft"
    again = fit(make_trainer, DirectionFreezing(2), adapter=adapter, ckpt=tmp_path / f"step={inside}.ckpt")
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight), name


def test_it_needs_adapters(make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(InputError, match=r"^directions: needs adapters; set model.adapter, or take freeze$"):
        make_trainer([DirectionFreezing()]).fit(make_module(), make_data())
    with pytest.raises(InputError, match=r"^directions.k: 0 is not allowed; it must be at least 1$"):
        DirectionFreezing(0)
