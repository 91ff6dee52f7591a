"""Half of the gradient is gone, another half at every step, before clipping, in one phase only, the same everywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_distributed import in_two_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy import Log, Phases, Toy, fit

from mifo_callbacks import GradientDropping

SCHEDULE = ["sft", "sft", "rl", "sft"]


class Gradients(Callback):
    """Copies of all gradients, as the clipping that follows the callbacks sees them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})


class Large(Toy):
    """Enough weights for a share to be told from another."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 3))


def dropped(module: Any = None, **options: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Gradients before and after the callback."""
    before, after = Gradients(), Gradients()
    fit([before, GradientDropping(**options), after], Phases(SCHEDULE), module)
    return before.seen, after.seen


@pytest.mark.parametrize("probability", [0.2, 0.5, 1.0])
def test_the_asked_share_is_zero_and_the_rest_is_not_rescaled(probability: float) -> None:
    for phase, before, after in zip(SCHEDULE, *dropped(Large(), probability=probability), strict=True):
        gone = {name: (g != before[name]) for name, g in after.items()}
        assert all((after[name][mask] == 0).all() for name, mask in gone.items())
        flat = torch.cat([mask.flatten() for mask in gone.values()]).float()
        assert flat.mean() == pytest.approx(probability if phase == "sft" else 0.0, abs=0.03)


def test_only_the_named_phase_is_touched() -> None:
    for phase, before, after in zip(SCHEDULE, *dropped(during="rl"), strict=True):
        assert all(torch.equal(before[name], g) for name, g in after.items()) == (phase != "rl")


def test_masks_differ_by_step_seed_and_parameter_only() -> None:
    masks = [[step["net.0.weight"] == 0 for step in dropped(m, seed=s)[1]] for m, s in ((Toy(), 0), (Toy(0.5), 0))]
    other = [step["net.0.weight"] == 0 for step in dropped(seed=1)[1]]
    for step in (0, 1, 3):
        assert torch.equal(masks[0][step], masks[1][step])
        assert not torch.equal(masks[0][step], other[step])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_weights_of_one_shape_have_masks_of_their_own() -> None:
    module = Toy()
    module.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    after = dropped(module)[1][0]
    assert not torch.equal(after["net.0.weight"] == 0, after["net.2.weight"] == 0)


def test_a_dropped_coordinate_still_moves_by_momentum() -> None:
    """What tells it from freezing: under Adam only the first step of a run leaves a dropped weight where it was."""
    before: list[Tensor] = []
    module = Toy(weight_decay=0.0)

    class Watch(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            before.append(module.net[0].weight.detach().clone())

    after = Gradients()
    fit([GradientDropping(), after, Watch()], Phases(["sft", "sft"]), module)
    first, second = (step["net.0.weight"] == 0 for step in after.seen)
    assert torch.equal(before[0][first], before[1][first])
    moved = second & ~first
    assert moved.any()
    assert (module.net[0].weight[moved] != before[1][moved]).all()


def test_dropping_comes_before_clipping() -> None:
    norms: list[tuple[float, float]] = []
    before, after = Gradients(), Gradients()

    class Clips(Toy):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            whole = torch.nn.utils.get_total_norm(before.seen[-1].values()).item()
            norms.append((torch.nn.utils.clip_grad_norm_(self.parameters(), 1e9).item(), whole))

    fit([before, GradientDropping(), after], Phases(SCHEDULE), Clips())
    for phase, (seen, whole) in zip(SCHEDULE, norms, strict=True):
        assert (seen < whole) == (phase == "sft")


def test_only_the_gradients_of_the_optimizer_that_steps_are_dropped() -> None:
    """A second optimizer must not drop once more from what the first has kept."""
    mine: list[Tensor] = []

    class Two(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
                mine.append(self.net[0].weight.grad.clone())
            self.zero_grad()

    fit([GradientDropping()], Phases(["sft"]), Two())
    assert (mine[0] == 0).any()
    assert torch.equal(mine[0], mine[1])


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit([GradientDropping(), save], Phases(SCHEDULE), enable_checkpointing=True)
    for step in (1, 2, 3):
        again = fit([GradientDropping()], Phases(SCHEDULE), ckpt_path=tmp_path / f"step={step}.ckpt")
        for a, b in zip(straight.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), f"resumed from step {step}"


def test_two_phases_can_have_one_each() -> None:
    log = Log()
    both = [GradientDropping(0.2), GradientDropping(1.0, during="rl")]
    fit(both, Phases(SCHEDULE), logger=log)
    steps, shares = zip(*log.rows["drop/share"], strict=True)
    assert steps == (0, 1, 2, 3)
    assert shares[2] == 1.0
    assert all(0 < share < 0.5 for share in (shares[0], shares[1], shares[3]))


def test_shards_drop_what_one_process_drops(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        whole, parts = nn.Linear(5, 7), nn.Linear(5, 7)
        fully_shard(parts, mesh=init_device_mesh("cpu", (2,)))
        for module in (whole, parts):
            for p in module.parameters():
                p.grad = torch.ones_like(p)
            drop = GradientDropping()
            drop._names = {"weight", "bias"}
            trainer: Any = type("Trainer", (), {"global_step": 3, "loggers": [], "callback_metrics": {}})
            trainer.fit_loop = type("Loop", (), {"epoch_loop": type("Epoch", (), {"_batches_that_stepped": 3})})
            drop.on_gradients_ready(trainer, module, torch.optim.SGD(module.parameters()))  # type: ignore[arg-type]
        for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
            assert (a.grad == 0).any()
            assert torch.equal(a.grad, b.grad.full_tensor())

    in_two_processes(work, tmp_path)


@pytest.mark.parametrize("probability", [0.0, 1.1, -0.5])
def test_bad_arguments(probability: float) -> None:
    with pytest.raises(MisconfigurationException, match=r"probability is .*; allowed: above 0 and at most 1"):
        GradientDropping(probability)
