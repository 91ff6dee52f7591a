"""AdamW per phase: moments, settings, schedules."""

from typing import Any, Literal

import pytest
import torch
from torch.optim import AdamW

from mifo_lightning.common.errors import InputError
from mifo_lightning.steps.optimizer import AdamWSettings, OptimizerSettings, PhaseAdamW

RL = AdamWSettings(lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
SFT = AdamWSettings(lr=0.02, betas=(0.5, 0.9))


def make(moments: Literal["reset", "keep", "shared"]) -> tuple[torch.nn.Parameter, PhaseAdamW]:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    return p, PhaseAdamW(AdamW([p], lr=9.0, fused=True), {"p": p}, OptimizerSettings(RL, SFT, moments))


def run(p: torch.nn.Parameter, phased: PhaseAdamW, phases: str, start: int = 0) -> None:
    """One step per letter: r for RL, s for SFT, S for another SFT phase."""
    for i, letter in enumerate(phases, start):
        phased.enter("rl" if letter == "r" else "sft", i, int(letter == "S"))
        p.grad = torch.tensor([1.0, i, -0.5 * i])
        phased.optimizer.step()


def apart(phases: str, moments: str) -> torch.Tensor:
    """The same with two independent optimizers, written out."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    kinds = {"r": RL, "s": SFT}
    optimizers = {
        k: AdamW([p], lr=s.lr, betas=s.betas, weight_decay=s.weight_decay, fused=True) for k, s in kinds.items()
    }
    last = ""
    for i, letter in enumerate(phases):
        if letter != "r" and last != letter and moments == "reset":
            optimizers["s"].state.clear()
        p.grad = torch.tensor([1.0, i, -0.5 * i])
        optimizers[letter.replace("S", "s")].step()
        last = letter
    return p.detach()


@pytest.mark.parametrize("phases", ["rrrssrrssr", "ssSSrrssSr"])
@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_each_phase_has_its_own_adamw(moments: Any, phases: str) -> None:
    p, phased = make(moments)
    run(p, phased, phases)
    assert (p == apart(phases, moments)).all()


def test_shared_moments_are_one_adamw() -> None:
    p, phased = make("shared")
    run(p, phased, "rrs")
    assert phased.optimizer.state[p]["step"] == 3
    q, other = make("reset")
    run(q, other, "rrs")
    assert (p != q).any()


@pytest.mark.parametrize("moments", ["reset", "keep", "shared"])
@pytest.mark.parametrize("stop", range(1, 9))
def test_state_goes_on_exactly(moments: Any, stop: int) -> None:
    phases = "rrssSrSr"
    p, phased = make(moments)
    run(p, phased, phases)
    q, first = make(moments)
    run(q, first, phases[:stop])
    r, second = make(moments)
    r.data.copy_(q.data)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    run(r, second, phases[stop:], stop)
    assert (r == p).all()


def test_learning_rates_are_the_configurations_not_the_checkpoints() -> None:
    p, phased = make("reset")
    run(p, phased, "r")
    state = phased.optimizer.state_dict()
    state["param_groups"][0]["lr"] = 123.0
    phased.optimizer.load_state_dict(state)
    phased.enter("rl", 1)
    assert phased.optimizer.param_groups[0]["lr"] == 0.1
    phased.enter("sft", 0)
    assert phased.optimizer.param_groups[0]["lr"] == 0.02
    assert phased.optimizer.param_groups[0]["weight_decay"] == 0


def test_a_factor_halves_the_whole_schedule() -> None:
    settings: dict[str, Any] = {"lr": 0.8, "schedule": "linear", "warmup_steps": 2, "decay_steps": 6, "min_ratio": 0.2}
    half, whole = AdamWSettings(**settings, lr_factor=0.5), AdamWSettings(**settings)
    assert [half.lr_at(i) for i in range(8)] == pytest.approx([whole.lr_at(i) / 2 for i in range(8)])
    _, phased = make("reset")
    phased.settings["sft"] = AdamWSettings(lr=0.02, lr_factor=0.5)
    assert phased.enter("sft", 0) == phased.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert phased.enter("rl", 0) == 0.1


def test_schedules() -> None:
    constant = AdamWSettings(lr=1.0, warmup_steps=4)
    assert [constant.lr_at(i) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = AdamWSettings(lr=1.0, schedule="linear", warmup_steps=2, decay_steps=6, min_ratio=0.2)
    assert [round(linear.lr_at(i), 6) for i in range(8)] == [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]
    cosine = AdamWSettings(lr=1.0, schedule="cosine", decay_steps=4)
    assert [round(cosine.lr_at(i), 6) for i in (0, 2, 4, 9)] == [1, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (AdamWSettings(lr=-1), "k.lr: -1"),
        (AdamWSettings(lr_factor=-0.5), "k.lr_factor: -0.5"),
        (AdamWSettings(betas=(0.9, 1.0)), "k.betas"),
        (AdamWSettings(schedule="linear"), "k.decay_steps: None"),
    ],
)
def test_impossible_settings_are_refused(settings: AdamWSettings, key: str) -> None:
    with pytest.raises(InputError, match=key):
        settings.check("k")


@pytest.mark.parametrize("skip", [False, True])
def test_a_gradient_of_exactly_zero_is_counted_and_where_asked_moves_nothing(skip: bool) -> None:
    p, phased = make("reset")
    phased.skip_zero_gradient = skip
    run(p, phased, "rr")
    before, moments = p.detach().clone(), {k: v.clone() for k, v in phased.optimizer.state[p].items()}
    p.grad = torch.zeros(3)
    assert phased.meet_norm(0.0) == 1
    phased.optimizer.step()
    assert (p == before).all() == skip  # warm moments and weight decay go on moving it
    assert all((v == moments[k]).all() for k, v in phased.optimizer.state[p].items()) == skip
    assert phased.meet_norm(1e-30) == 1
    assert phased.state_dict()["zero_gradients"] == {"rl": 1, "sft": 0}
    _, other = make("reset")
    other.load_state_dict(phased.state_dict())
    other.enter("rl", 3)
    assert other.meet_norm(0.0) == 2
