"""One numerical model: whatever asks for a forward gets the Trainer's precision."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import SAMPLING, make_data, make_module, method_callbacks
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.losses.sed import SED
from mifo_lightning.monitors.forgetting import Forgetting
from mifo_lightning.monitors.heldout import HeldOutLoss
from mifo_lightning.monitors.phase_kl import PhaseKL
from mifo_lightning.monitors.retention import Retention
from mifo_lightning.policy.policy import Policy
from mifo_lightning.policy.token_scores import token_scores
from mifo_lightning.rollout.evaluation import Evaluation
from mifo_lightning.steps.settings import PolicyLoss

MakeTrainer = Callable[..., Trainer]
Seen = dict[str, set[torch.dtype]]

# who asks for a forward: the first of these among the callers, from the inside out
CHECK = "self-check, exact and in the precision of the run"
ASKERS = {
    "self_check": CHECK,
    "initial_losses": "first losses of FLOW",
    "initial_sed_threshold": "threshold of SED-SFT",
    "Reinforcement.draw": "rollouts",
    "Reinforcement.prepare": "scores of rollouts, old and reference",
    "OptimizerStep._descend": "forward of RL and SFT steps",
    "OptimizerStep._select": "entropies of SFT steps",
    "Forgetting._measure": "Forgetting",
    "HeldOutLoss._losses": "HeldOutLoss",
    "PhaseKL.begin": "PhaseKL, drawn and scored",
    "PhaseKL.end": "PhaseKL, scored again",
    "Retention.begin": "Retention, samples before",
    "Retention._transitions": "Retention, samples after",
    "Retention._divergences": "Retention, KL of both models",
    "Evaluator._respond": "evaluation, responses",
    "Evaluator._demonstration_loss": "evaluation, demonstrations",
}


def asker(frame: FrameType | None) -> str:
    """Which part of a run called, by its name in `ASKERS`; the whole chain of ours where none fits."""
    chain = []
    while frame is not None:
        name = frame.f_code.co_qualname
        if name == "load_policy":  # a monitor may load one too
            return name
        if name in ASKERS:
            return ASKERS[name]
        if frame.f_globals.get("__name__", "").startswith("mifo_"):
            chain.append(name)
        frame = frame.f_back
    return f"unknown: {' < '.join(chain)}"


@pytest.fixture
def forwards(policy: Policy) -> Iterator[Seen]:
    """dtypes of all logits that any model makes, by who asked for them."""
    seen: Seen = defaultdict(set)
    vocabulary = policy.model.get_output_embeddings().weight.shape[0]

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and module.out_features == vocabulary:
            seen[asker(sys._getframe())].add(output.dtype)

    handle = register_module_forward_hook(note)
    yield seen
    handle.remove()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_every_forward_of_a_run_has_the_precision_of_the_run(
    make_trainer: MakeTrainer, forwards: Seen, precision: str, dtype: torch.dtype
) -> None:
    monitors = [Forgetting(4), HeldOutLoss(4), PhaseKL(4), Retention(4, samples=2)]
    trainer = make_trainer(
        [*method_callbacks(size=8), *monitors],
        precision=precision,
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
    )
    module = make_module(
        loss=PolicyLoss(kl_coefficient=0.1),
        micro_batches=2,  # entropies of the whole SFT step need a forward of their own
        weight="flow",
        sed=SED(1.0),
        evaluation=Evaluation(samples=1, greedy=True, sampling=SAMPLING),
    )
    data = make_data(
        val=Skills(["addition", "mirrored"], 8, split="val"),
        schedule=Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4, epochs_per_rollout=2),
    )
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, datamodule=data)
    # a model is looked at once when it is loaded, before there is a run
    found = {name: dtypes for name, dtypes in forwards.items() if "load_policy" not in name}
    assert found.pop(CHECK) == {dtype, torch.float32}
    assert found == {name: {dtype} for name in ASKERS.values() if name != CHECK}


@pytest.mark.parametrize("chunk", [12, 5])
def test_the_head_casts_without_the_cache_of_the_autocast_around_it(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(12, 8), nn.Linear(8, 16, bias=False), torch.arange(12)
    states: set[tuple[bool, torch.dtype]] = set()

    def head(h: Tensor) -> Tensor:
        logits: Tensor = weight(h)
        states.add((torch.is_autocast_cache_enabled(), logits.dtype))
        return logits

    def gradient(cache: bool) -> Tensor:
        weight.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            with torch.no_grad():
                token_scores(head, hidden, targets)  # a cast without a graph, which a cache would hand out again
            logp, _ = token_scores(head, hidden, targets)
        logp.sum().backward()  # makes the chunks again, outside the context
        assert weight.weight.grad is not None
        return weight.weight.grad.clone()

    monkeypatch.setattr("mifo_lightning.policy.token_scores.CHUNK_ELEMENTS", chunk * 16)
    assert torch.equal(gradient(cache=True), gradient(cache=False))
    assert states == {(False, torch.bfloat16)}


def test_a_module_that_meets_another_trainer_takes_its_precision(make_trainer: MakeTrainer, forwards: Seen) -> None:
    module = make_module(evaluation=Evaluation(samples=1, greedy=False, sampling=SAMPLING))
    data = make_data(val=Skills(["addition"], 8, split="val"))
    for precision in ("bf16-mixed", "32-true"):
        forwards.clear()
        make_trainer(precision=precision, limit_val_batches=1.0).validate(module, data, verbose=False)
    found = {name: dtypes for name, dtypes in forwards.items() if "load_policy" not in name}
    assert set.union(*found.values()) == {torch.float32}


def test_while_sampling_each_weight_is_cast_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer's own autocast keeps no casts: decoding would make them anew for each token."""
    monkeypatch.setattr(policy, "numerics", MixedPrecision("bf16-mixed", "cpu").forward_context)
    weight = policy.model.get_input_embeddings().weight
    cast: list[int] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._to_copy.default and args[0].shape == weight.shape:
                cast.append(1)
            return function(*args, **(kwargs or {}))

    ids = torch.tensor([[1, 2, 3]])
    with policy.sampling(), Casts():
        for _ in range(3):
            policy.decode(ids, None, None, None)
    assert len(cast) == 1
    assert not torch.is_autocast_enabled("cpu")
    with policy.sampling(), Casts():
        policy.decode(ids, None, None, None)
    assert len(cast) == 2, "not that of other weights"
