"""`model.loading.frozen`: what it names keeps its bits in RL and SFT, all else moves, and it must exist."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks, weights
from lightning import Trainer

from mifo_callbacks import ImportanceEMA
from mifo_lightning.cli.plan import planned
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.monitors.costs import Costs, multiplying
from mifo_lightning.policy.adapter import Adapter

MakeTrainer = Callable[..., Trainer]


def test_named_weights_stand_still_in_both_phases_and_no_callback_counts_them(make_trainer: MakeTrainer) -> None:
    module = make_module(frozen=["*embed_tokens*", "*.layers.1.*"])
    module.load()
    before = weights(module)
    callbacks = method_callbacks()
    importance = next(c for c in callbacks if isinstance(c, ImportanceEMA))
    make_trainer(callbacks).fit(module, datamodule=make_data())
    after = weights(module)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if "embed_tokens" in name or ".layers.1." in name}
    assert importance._map.keys() == before.keys() - still


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["*embed*", "head"],
            r"model\.loading\.frozen: 'head' matches no weight; some of the names: model\.embed_tokens\.weight, ",
        ),
        (["*"], r"model\.loading\.frozen: \['\*'\] matches every weight; leave some to be trained"),
    ],
)
def test_a_pattern_that_matches_nothing_or_everything_is_named(patterns: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_module(frozen=patterns).load()


@pytest.mark.parametrize("patterns", ["*embed*", [3], None])
def test_what_is_no_list_of_patterns_is_named(patterns: Any) -> None:
    with pytest.raises(InputError, match=r"model\.loading\.frozen: .* is not allowed; it must be a list of patterns"):
        make_module(frozen=patterns)


def test_costs_and_plan_leave_out_the_gradients_of_frozen_weights(make_trainer: MakeTrainer) -> None:
    costs = Costs()
    module = make_module(frozen=["*.layers.1.*", "*embed_tokens*"])
    make_trainer([costs]).fit(module, datamodule=make_data(schedule=Schedule(rl_steps=1, prompts_per_step=4)))
    model = module.policy.model
    n = multiplying(model)
    t = n - sum(p.numel() for name, p in model.named_parameters() if ".layers.1." in name)
    account = costs.summary()["rl"]
    assert account["flops"] == 2 * n * account["generated_tokens"] + (4 * n + 2 * t) * account["trained_tokens"]
    arguments = ["--config", "tiny", "--config", "methods/rl"]
    whole, part = (planned([*arguments, "--model.loading.frozen", frozen])[0] for frozen in ("[]", '["*.layers.1.*"]'))
    layer = sum(p.numel() for name, p in model.named_parameters() if ".layers.1." in name)
    assert whole.sizes.trained - part.sizes.trained == layer


def test_with_an_adapter_all_else_is_frozen_already() -> None:
    with pytest.raises(
        InputError, match=r"model\.loading\.frozen: \['\*embed\*'\] is not allowed; it must be \[\] with an adapter"
    ):
        make_module(frozen=["*embed*"], adapter=Adapter())
