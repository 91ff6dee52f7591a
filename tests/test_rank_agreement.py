"""Agreement of RL's ranking of weights with SFT's: the coefficient, its heads, and one record an SFT phase."""

from collections.abc import Callable

import pytest
import torch
from conftest import make_data, make_module, method_callbacks
from lightning import Trainer
from monitoring import Records

from mifo_lightning.monitors.rank_agreement import RankAgreement, by_head, spearman


def test_the_coefficient_is_that_of_mean_ranks() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 5.0, 9.0]), torch.tensor([3.0, 1.0, 4.0, 4.0, 8.0])
    first, second = torch.tensor([0.0, 1.5, 1.5, 3.0, 4.0]), torch.tensor([1.0, 0.0, 2.5, 2.5, 4.0])
    expected = float(torch.corrcoef(torch.stack([first, second]).double())[0, 1])
    assert spearman(a, b) == pytest.approx(expected)
    assert spearman(a, a.exp()) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, torch.ones(5)) == 0
    assert abs(spearman(torch.randn(100, 100), torch.randn(100, 100))) < 0.05


def test_heads_are_slices_of_rows_or_columns() -> None:
    a, b = torch.randn(2, 8, 6)
    assert by_head(a, b, 0, 4) == [spearman(a[i : i + 2], b[i : i + 2]) for i in range(0, 8, 2)]
    assert by_head(a, b, 1, 3) == [spearman(a[:, i : i + 2], b[:, i : i + 2]) for i in range(0, 6, 2)]


def test_one_record_an_sft_phase(make_trainer: Callable[..., Trainer]) -> None:
    monitor, records = RankAgreement(), Records()
    module = make_module()
    make_trainer([*method_callbacks(), monitor], logger=records).fit(module, make_data())
    assert monitor.phases
    assert {record["phase"] for record in monitor.phases} == {"sft"}
    record = monitor.phases[0]
    layers = [f"layers.{i}.{part}" for i in range(3) for part in ("attention", "mlp")]
    assert set(record["parts"]) == {"embedding", "head", *layers}
    name = "policy.model.model.layers.0.self_attn.{}.weight"
    counts = {key: len(record["heads"][name.format(key)]) for key in ("q_proj", "k_proj", "v_proj", "o_proj")}
    config = module.policy.model.config
    many, few = config.num_attention_heads, config.num_key_value_heads
    assert many > few
    assert counts == {"q_proj": many, "k_proj": few, "v_proj": few, "o_proj": many}
    assert all(-1 <= rho <= 1 for rho in record["matrices"].values())
    assert records.series("agreement/embedding") == [record["parts"]["embedding"] for record in monitor.phases]


def test_nothing_is_recorded_without_importance(make_trainer: Callable[..., Trainer]) -> None:
    monitor = RankAgreement()
    make_trainer([method_callbacks()[-1], monitor]).fit(make_module(), make_data())
    assert monitor.phases == []
