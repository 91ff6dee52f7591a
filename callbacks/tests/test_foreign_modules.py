"""What others' modules do: toggled and raw optimizers, BatchNorm, copies, averaging, callbacks used twice."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import ADAM, LBFGS, ByHand, Normed, Own, Raw, RawLBFGS, Toggles
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from toy import Phases, Recorder, Toy, fit

from mifo_callbacks import (
    BufferPhaseSwitch,
    EntropyTokenSelection,
    GradientDropping,
    GradientFreezing,
    ImportanceEMA,
)


def said(run: Callable[[], Any], about: str) -> list[str]:
    """Warnings that name `about`, while `run` runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if about in str(w.message)]


@pytest.mark.parametrize("accumulate", ["phase", "step"])
@pytest.mark.parametrize("module", [Toggles, Raw, Own, LBFGS, RawLBFGS])
def test_importance_is_measured_whoever_steps(module: Any, accumulate: Any) -> None:
    """One phase of one batch: the net displacement, or the last step's where it makes two."""
    importance, recorder = ImportanceEMA(accumulate=accumulate, alpha=0.0), Recorder()
    fit([importance, recorder], Phases(["rl", "sft"]), module())
    assert importance.importance is not None
    assert importance.importance.keys() == recorder.weights[0].keys()
    for name, score in importance.importance.items():
        assert score.any()
        if accumulate == "phase" or module not in (Raw, Own):
            assert torch.equal(score, (recorder.weights[1][name] - recorder.weights[0][name]).square())


def test_a_weight_without_a_score_is_named_once() -> None:
    module = Toggles()
    module.idle = (1,)
    lines = said(
        lambda: fit([ImportanceEMA(accumulate="step")], Phases(["rl", "sft"] * 3), module), "has no importance"
    )
    assert len(lines) == 1
    assert "parameter 'net.2.weight' and 1 more" in lines[0]
    assert not said(lambda: fit([ImportanceEMA(accumulate="step")], Phases(["rl", "sft"]), Toggles()), "no importance")


@pytest.mark.parametrize("module", [Toggles, Raw, Own, LBFGS, RawLBFGS])
@pytest.mark.parametrize("selector", ["random", "rl_topk"])
def test_frozen_weights_are_bit_identical_whoever_steps(module: Any, selector: Any) -> None:
    freezing = GradientFreezing(selector=selector)
    recorder = Recorder(lambda: {name: mask.clone() for name, mask in freezing.masks.items()})
    fit([ImportanceEMA(), freezing, recorder], Phases(["rl", "rl", "sft", "sft", "sft", "rl"]), module())
    assert recorder.looks[2].keys() == recorder.weights[0].keys()
    for name, mask in recorder.looks[2].items():
        for step in (3, 4, 5):
            assert torch.equal(recorder.weights[step][name][mask], recorder.weights[2][name][mask])
        assert (recorder.weights[5][name] != recorder.weights[2][name])[~mask].any()
        assert (recorder.weights[6][name] != recorder.weights[5][name]).any()


@pytest.mark.parametrize("module", [Raw, Own])
def test_each_step_that_lightning_does_not_count_drops_anew(module: Any) -> None:
    model, masks = module(), list[Tensor]()
    handle = register_optimizer_step_post_hook(lambda *args: masks.append(model.net[0].weight.grad == 0))
    try:
        fit([GradientDropping()], Phases(["sft"] * 3), model)
    finally:
        handle.remove()
    assert len(masks) == 6
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_what_no_optimizer_moves_is_said_or_refused() -> None:
    for callback in (ImportanceEMA(measure="sft"), GradientDropping()):
        lines = said(
            lambda callback=callback: fit([callback], Phases(["sft", "rl"] * 2), ByHand()), "no torch optimizer"
        )
        assert len(lines) == 1
        assert lines[0].startswith(f"{type(callback).__name__}: phase 'sft' ended")
    with pytest.raises(MisconfigurationException, match=r"frozen coordinates of 'net.0.weight' moved in phase 'sft'"):
        fit([GradientFreezing(selector="random")], Phases(["rl", "sft"]), ByHand())


def test_a_module_that_moves_frozen_weights_last_in_a_phase_is_refused() -> None:
    """After the last step of the phase; before, the next step would put them back."""

    class Jumps(Toy):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.net[2].weight.data += 1

    with pytest.raises(MisconfigurationException, match=r"'net\.2\.weight' moved in phase 'sft'"):
        fit([GradientFreezing(selector="random")], Phases(["sft"] * 4 + ["rl"]), Jumps())


@pytest.mark.parametrize(
    "callback",
    [ImportanceEMA(measure="SFT"), GradientFreezing(selector="random", during="SFT"), GradientDropping(during="SFT")],
)
def test_a_phase_that_never_comes_is_said_with_those_that_came(callback: Any) -> None:
    lines = said(lambda: fit([callback], Phases(["sft", "rl"] * 2)), "no batch was of phase 'SFT'")
    assert len(lines) == 1
    assert "phases seen: 'rl', 'sft'" in lines[0]


def test_a_phase_that_came_before_a_checkpoint_has_come(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2)
    schedule = ["sft", "sft", "rl", "rl"]
    fit([GradientDropping(), save], Phases(schedule), enable_checkpointing=True, max_steps=2)
    resumed, loader = GradientDropping(), Phases(schedule)
    assert not said(lambda: fit([resumed], loader, ckpt_path=tmp_path / "step=2.ckpt"), "no batch")
    assert resumed.state_dict()["phases_seen"] == ["rl", "sft"]


class Selects(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.chosen = self.select_tokens(torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        double = copy.deepcopy(self)
        entropy = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.0]])
        assert double.select_tokens(entropy, entropy >= 0).mask.tolist() == [[False, True, False, False, False]]
        return super().training_step(batch, batch_idx)


def test_a_copy_of_the_module_selects_and_so_does_the_sanity_check() -> None:
    module = Selects()
    options: dict[str, Any] = {"num_sanity_val_steps": 1, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[EntropyTokenSelection()], enable_progress_bar=False, **options
    )
    trainer.fit(module, Phases(["sft", "sft"]), Phases(["sft"]))
    assert module.chosen.mask.sum() == 2
    assert not hasattr(module, "select_tokens")


def test_averaging_with_batchnorm_passes_over_the_data_once_more() -> None:
    class Epochs(Phases):
        def __iter__(self) -> Any:
            self.position = 0
            return super().__iter__()

    callbacks = [ImportanceEMA(), GradientFreezing(), GradientDropping(), StochasticWeightAveraging(1e-2)]
    fit(callbacks, Epochs(["rl", "rl", "sft", "sft"]), Normed(), max_epochs=3)
    assert callbacks[0].updates == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("buffers", [False, True])
def test_running_statistics_are_held_if_asked(buffers: bool) -> None:
    class Statistics(Callback):
        def __init__(self) -> None:
            self.seen: list[list[Tensor]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.seen.append([buffer.clone() for buffer in pl_module.buffers()])

    watch = Statistics()
    fit([GradientFreezing(selector="none", buffers=buffers), watch], Phases(["rl", "sft", "sft", "rl"]), Normed())
    for i, phase in ((1, "sft"), (2, "sft"), (3, "rl")):
        same = all(torch.equal(a, b) for a, b in zip(watch.seen[i], watch.seen[i - 1], strict=True))
        assert same == (buffers and phase == "sft")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImportanceEMA(alpha=0.1),
        lambda: GradientFreezing(selector="random"),
        GradientDropping,
        lambda: BufferPhaseSwitch(3),
    ],
)
def test_two_callbacks_of_one_key_are_refused_before_training(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"two callbacks have the state key .*_generate_state_key") as caught:
        Trainer(accelerator="cpu", callbacks=[make(), make()])
    assert "\n" not in str(caught.value)


def test_a_used_callback_is_refused_in_another_module_and_kept_in_its_own(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    importance, freezing = ImportanceEMA(), GradientFreezing()
    module = fit([importance, freezing, save], Phases(["rl", "sft", "sft"]), enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match="this ImportanceEMA has the state of another module's run"):
        fit([importance, freezing], Phases(["rl", "sft"]))
    fit([importance, freezing], Phases(["rl", "sft"]), module)
    assert importance.updates == 2
    fit([importance, freezing], Phases(["rl", "sft", "sft", "sft"]), Toy(), ckpt_path=tmp_path / "step=3.ckpt")
    assert importance.updates == 1
    pickle.loads(pickle.dumps([importance, freezing]))


@pytest.mark.parametrize(
    "callback", [ImportanceEMA(), GradientFreezing(), GradientDropping(), EntropyTokenSelection(), BufferPhaseSwitch(3)]
)
def test_fabric_is_refused(callback: Any) -> None:
    module = nn.Linear(2, 2)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__} lives on the hooks"):
        fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))


def test_movement_is_measured_after_frozen_weights_are_put_back() -> None:
    """Measured and frozen phase are one, and momentum moves weights in between."""
    importance, freezing = ImportanceEMA(measure="sft", accumulate="step"), GradientFreezing(selector="random")
    recorder = Recorder(lambda: dict(freezing.masks))
    fit([importance, freezing, recorder], Phases(["rl", "rl", "sft", "rl"]))
    assert importance.importance is not None
    for name, mask in recorder.looks[2].items():
        assert not importance.importance[name][mask].any()


@pytest.mark.parametrize("callback", [GradientFreezing(selector="random"), GradientDropping()])
def test_sparse_gradients_are_refused(callback: Any) -> None:
    class Sparse(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 3, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.table(batch["y"]), batch["y"])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"sparse.*; allowed: dense"):
        fit([callback], Phases(["sft"]), Sparse())


def test_an_optimizer_made_of_others_makes_one_step() -> None:
    class Both(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            params = list(params)
            super().__init__(params, {})
            self.parts = [torch.optim.AdamW(part, **ADAM) for part in (params[:1], params[1:])]

        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            for part in self.parts:
                part.step()
            return loss

    class Made(Toy):
        def configure_optimizers(self) -> Any:
            return Both(self.parameters())

    importance = ImportanceEMA(accumulate="step")
    fit([importance], Phases(["rl", "rl", "sft"]), Made())
    assert importance.updates == 2


def test_the_buffer_ignores_a_pass_that_trains_nothing() -> None:
    switch = BufferPhaseSwitch(3)
    trainer: Any = type("Trainer", (), {"fit_loop": type("Loop", (), {"_skip_backward": True})})
    switch.on_train_batch_end(trainer, Toy(), {"groups": []}, None, 0)
    assert switch.rollouts == 0
