"""The callback in a foreign module: where it puts itself, what it logs, what it refuses."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from toy import Log, Phases, Toy, fit

from mifo_callbacks import EntropyTokenSelection, Selection


class Selects(Toy):
    """Calls `select_tokens` in sft steps with the entropies below."""

    entropy = torch.tensor([[0.1, 2.0, 0.5, 0.5], [0.5, 0.2, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    eos = torch.tensor([[False, False, False, True], [False, True, False, False]])

    def __init__(self) -> None:
        super().__init__()
        self.selections: list[Selection] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if batch["phase"] == "sft":
            self.selections.append(self.select_tokens(self.entropy, self.mask, {"eos": self.eos}))
        return super().training_step(batch, batch_idx)


def test_the_module_gets_select_tokens_for_the_time_of_the_fit() -> None:
    module = fit([EntropyTokenSelection(fraction=0.5)], Phases(["rl", "sft"]), Selects())
    assert module.selections[0].mask.tolist() == [[False, True, True, True], [False, False, False, False]]
    assert module.selections[0].denominator == 3.0
    assert not hasattr(module, "select_tokens")


def test_what_the_module_had_under_that_name_comes_back() -> None:
    module = Selects()
    module.select_tokens = "own"
    fit([EntropyTokenSelection()], Phases(["sft"]), module)
    assert module.select_tokens == "own"


def test_forced_tokens_by_name() -> None:
    module = fit([EntropyTokenSelection(fraction=0.2, force_keep="eos")], Phases(["sft"]), Selects())
    assert module.selections[0].mask.tolist() == [[False, True, True, True], [False, True, False, False]]
    with pytest.raises(MisconfigurationException, match=r"force_keep is 'answer'; allowed: \['eos'\]"):
        fit([EntropyTokenSelection(force_keep="answer")], Phases(["sft"]), Selects())


def test_random_depends_on_the_optimizer_step() -> None:
    runs = [
        fit([EntropyTokenSelection(selector="random", seed=seed)], Phases(["sft"] * 6), Selects()).selections
        for seed in (0, 0, 1)
    ]
    masks = [torch.stack([selection.mask for selection in run]) for run in runs]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert len({tuple(mask.flatten().tolist()) for mask in masks[0]}) > 1


def test_what_is_logged() -> None:
    log = Log()
    fit(
        [EntropyTokenSelection(fraction=0.5, force_keep="eos")],
        Phases(["rl", "sft", "rl"]),
        Selects(),
        logger=log,
    )
    got = {name: rows for name, rows in log.rows.items() if name.startswith("entropy/")}
    assert got == {
        "entropy/share": [(1, 4 / 6)],
        "entropy/forced": [(1, 1.0)],
        "entropy/threshold": [(1, 0.5)],
        "entropy/ties": [(1, 3.0)],
        "entropy/mean_all": [(1, pytest.approx(3.8 / 6))],
        "entropy/mean_selected": [(1, pytest.approx(3.2 / 4))],
    }


@pytest.mark.parametrize("options", [{"scope": "sequence"}, {"selector": "random"}])
def test_where_there_is_no_single_threshold_none_is_logged(options: dict[str, Any]) -> None:
    log = Log()
    fit([EntropyTokenSelection(**options)], Phases(["sft"]), Selects(), logger=log)
    assert "entropy/share" in log.rows
    assert "entropy/threshold" not in log.rows


def test_bottom_threshold_is_the_highest_entropy_chosen() -> None:
    log = Log()
    fit([EntropyTokenSelection(fraction=0.5, selector="bottom")], Phases(["sft"]), Selects(), logger=log)
    assert log.values("entropy/threshold") == [0.5]


def test_the_profiler_accounts_for_it() -> None:
    profiler = SimpleProfiler()
    fit([EntropyTokenSelection()], Phases(["sft", "sft"]), Selects(), profiler=profiler)
    assert len(profiler.recorded_durations["[Callback]EntropyTokenSelection.select"]) == 2


@pytest.mark.parametrize(
    "bad",
    [
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"selector": "highest"},
        {"scope": "rank"},
        {"denominator": "none"},
        {"scope": "fixed"},
        {"threshold": 1.0},
        {"scope": "fixed", "threshold": -1.0},
    ],
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="allowed: "):
        EntropyTokenSelection(**bad)


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({"fraction": 0.1}, 80, [64]),  # two end tokens a step, of the lowest entropies
        ({"fraction": 0.1}, 31, []),  # too few to say so
        ({"fraction": 0.1, "force_keep": "eos"}, 80, []),
        ({"fraction": 0.1, "selector": "bottom"}, 80, []),
    ],
)
def test_a_selection_that_never_takes_the_end_token_says_so_once(options: Any, steps: int, said: list[int]) -> None:
    module = Selects()
    module.eos = torch.tensor([[True, False, False, False], [False, True, True, False]])  # the last one is padding
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([EntropyTokenSelection(**options)], Phases(["sft"] * steps), module)
    lines = [str(w.message) for w in caught if "end tokens" in str(w.message)]
    assert len(lines) == len(said)
    assert all(
        f"first {n} end tokens" in line and "force_keep: eos" in line for n, line in zip(said, lines, strict=True)
    )
