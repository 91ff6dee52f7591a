"""One seed for a run: given, that of seed_everything, or drawn once and said."""

import logging

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import Phases, Toy, fit

from mifo_callbacks import GradientDropping, Seed
from mifo_callbacks.seeds import GLOBAL


@pytest.fixture(autouse=True)
def unseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits the seed of another."""
    monkeypatch.setenv(GLOBAL, "0")  # so that it is put back
    monkeypatch.delenv(GLOBAL)


def weights(callback: GradientDropping) -> torch.Tensor:
    module = Toy()
    fit([callback], Phases(["sft"] * 3), module)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_part_without_a_seed_follows_seed_everything() -> None:
    found = {}
    for seed in (1, 2, 1):
        seed_everything(seed, verbose=False)
        again = weights(GradientDropping(during="sft"))
        assert torch.equal(found.setdefault(seed, again), again)
        assert torch.equal(again, weights(GradientDropping(during="sft", seed=seed)))
    assert not torch.equal(found[1], found[2])


def test_a_seed_that_nobody_gave_is_drawn_once_and_said(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        first, second = Seed(None, "a").value, Seed(None, "b").value
    assert first == second
    assert [f"seed: {first}, drawn at random" in record.getMessage() for record in caplog.records] == [True]
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_settled_at_its_first_use_and_stays() -> None:
    seed_everything(1, verbose=False)
    part = Seed(None, "part")
    assert part.settled is None
    seed_everything(2, verbose=False)
    assert part.value == part.settled == 2
    seed_everything(3, verbose=False)
    assert part.value == 2


def test_a_resumed_run_keeps_its_seed_and_refuses_another() -> None:
    seed_everything(1, verbose=False)
    callback = GradientDropping(during="sft")
    weights(callback)
    state = callback.state_dict()
    assert state["seed"] == 1
    seed_everything(2, verbose=False)
    resumed, same = GradientDropping(during="sft"), GradientDropping(during="sft", seed=1)
    for one in (resumed, same):
        one.load_state_dict(state)
        assert one.seed.value == 1
    with pytest.raises(MisconfigurationException, match=r"^GradientDropping.seed is 2, and 1 in the run of the check"):
        GradientDropping(during="sft", seed=2).load_state_dict(state)
    resumed.load_state_dict({**state, "seed": None})  # of a version that did not keep it, or never used it
    assert resumed.seed.value == 1


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(MisconfigurationException, match=rf"part is {seed}; allowed: 0 to 4294967295, or none"):
        Seed(seed, "part")
