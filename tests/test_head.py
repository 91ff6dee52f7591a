"""Scores from tiles of logits are those of all logits at once: values, gradients, memory and work."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rl_steps import relative
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.families import tiny_config, tiny_model
from mifo_callbacks.sharding import full
from mifo_lightning.policy import running_scores, token_scores
from mifo_lightning.policy.head import LogitTransform, head_transform
from mifo_lightning.policy.loading import shard_policy
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.running_scores import RunningScores, Settings

PLAIN = LogitTransform()
CAPPED = LogitTransform(1.0, 0.5, 3.0)


class Case(NamedTuple):
    """Hidden states, a head and the loss's gradients by both scores."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    slopes: tuple[Tensor, Tensor]


def case(seed: int, dtype: torch.dtype = torch.float64) -> Case:
    """Random shapes and numbers; logits have a standard deviation of about 3."""
    g = torch.Generator().manual_seed(seed)
    n, d, v = (int(torch.randint(low, 40, (), generator=g)) for low in (1, 1, 2))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    weight = (normal(v, d) * 3 / d**0.5).requires_grad_()
    bias = normal(v).requires_grad_() if seed % 2 else None
    targets = torch.randint(v, (n,), generator=g)
    return Case(normal(n, d).requires_grad_(), weight, bias, targets, (normal(n), normal(n)))


def naive(given: Case, settings: Settings) -> tuple[Tensor, Tensor]:
    logits = settings.transform(nn.functional.linear(given.hidden, given.weight, given.bias)) / settings.temperature
    found = torch.distributions.Categorical(logits=logits)
    return found.log_prob(given.targets), found.entropy()


def running(given: Case, settings: Settings) -> tuple[Tensor, Tensor]:
    return RunningScores.apply(given.hidden, given.weight, given.bias, given.targets, settings)


def with_gradients(scores: tuple[Tensor, Tensor], given: Case, entropy: bool) -> list[Tensor]:
    """Both scores and the gradients by hidden states, weight and bias."""
    loss = (scores[0] * given.slopes[0]).sum() + (scores[1] * given.slopes[1]).sum() * entropy
    leaves = [t for t in given[:3] if isinstance(t, Tensor)]
    return [*scores, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(1.0, 0.25), CAPPED])
@pytest.mark.parametrize("tile", [(2, 3), (7, 5), (64, 64)])
def test_values_and_gradients_are_those_of_all_logits(
    tile: tuple[int, int], transform: LogitTransform, entropy_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_scores, "CPU_TILE", tile)
    for seed in range(6):
        given = case(seed)
        settings = Settings(torch.float64, (1.0, 0.7)[seed // 2 % 2], transform, entropy_gradient)
        found, wanted = (with_gradients(f(given, settings), given, entropy_gradient) for f in (running, naive))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_in_fp32_it_is_no_further_from_the_truth_than_all_logits_are(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_scores, "CPU_TILE", (16, 8))
    ours, theirs = torch.zeros(4), torch.zeros(4)
    for seed in range(0, 20, 2):
        given = case(seed, torch.float32)
        given = given._replace(weight=(given.weight.detach() * size).requires_grad_())
        exact = Case(*(t.detach().double().requires_grad_() for t in given[:2]), None, given.targets, given.slopes)
        settings = Settings(temperature=0.7, entropy_gradient=True)
        truth, found, plain = (
            with_gradients(f(c, settings), c, True) for f, c in ((naive, exact), (running, given), (naive, given))
        )
        for worst, scores in ((ours, found), (theirs, plain)):
            worst += torch.stack([(a - b).norm() / (b.norm() + 1) for a, b in zip(scores, truth, strict=True)])
    assert (ours <= 2 * theirs + 1e-6).all(), (ours, theirs)
    assert (ours < 1e-4).all()


def test_order_company_and_place_of_a_token_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_scores, "CPU_TILE", (3, 4))
    given = case(3)
    order = torch.randperm(len(given.targets))[: len(given.targets) // 2 + 1]
    some = given._replace(hidden=given.hidden[order], targets=given.targets[order])
    for whole, part in zip(
        running(given, Settings(torch.float64)), running(some, Settings(torch.float64)), strict=True
    ):
        torch.testing.assert_close(whole[order], part)


def test_a_certain_token_has_entropy_zero_and_never_less() -> None:
    weight = torch.full((24, 1), -200.0)
    weight[3] = 200.0
    logp, entropy = RunningScores.apply(torch.ones(4, 1), weight, None, torch.full((4,), 3), Settings())
    assert (entropy == 0).all()
    assert (logp == 0).all()


def score(head: nn.Linear, hidden: Tensor, targets: Tensor, bf16: bool) -> list[Tensor]:
    head.weight.grad = hidden.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logp, entropy = token_scores.token_scores(head, hidden, targets, 0.7, entropy_gradient=True)
    (logp * torch.linspace(-1, 1, len(logp)) + entropy).sum().backward()
    assert head.weight.grad is not None
    assert hidden.grad is not None
    return [logp.detach(), entropy.detach(), hidden.grad, head.weight.grad]


def test_under_bf16_autocast_it_is_no_further_from_fp32_than_all_logits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(running_scores, "CPU_TILE", (40, 100))
    head, hidden, targets = nn.Linear(64, 500), torch.randn(200, 64, requires_grad=True), torch.randint(500, (200,))
    nn.init.normal_(head.weight, std=0.4)
    exact, plain = (score(head, hidden, targets, bf16) for bf16 in (False, True))
    monkeypatch.setattr(token_scores, "RUNNING_FROM", 0)
    tiled = score(head, hidden, targets, True)
    for right, ours, theirs in zip(exact, tiled, plain, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - right).norm() < 1.2 * (theirs - right).norm()


def test_a_frozen_weight_and_tokens_without_a_gradient_cost_nothing() -> None:
    """Backward makes logits again, and multiplies them with the weight and with the hidden states."""
    hidden, targets = torch.randn(40, 8, requires_grad=True), torch.randint(30, (40,))

    def work(frozen: bool, share: float) -> int:
        weight = torch.randn(30, 8, requires_grad=not frozen)
        logp, _ = RunningScores.apply(hidden, weight, None, targets, Settings())
        with FlopCounterMode(display=False) as counter:
            (logp * (torch.arange(40) < 40 * share)).sum().backward()
        assert frozen == (weight.grad is None)
        return counter.get_total_flops()

    product = 2 * 40 * 8 * 30
    assert [work(False, 1.0), work(True, 1.0), work(False, 0.25)] == [3 * product, 2 * product, 3 * product // 4]


def test_tokens_without_a_gradient_get_none() -> None:
    given = case(5)
    place = torch.arange(len(given.targets))
    given = given._replace(slopes=(given.slopes[0] * (place % 3 == 0), given.slopes[1] * (place % 2 == 0)))
    settings = Settings(torch.float64, entropy_gradient=True)
    found, wanted = (with_gradients(f(given, settings), given, True) for f in (running, naive))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


CAPS: dict[str, tuple[dict[str, Any], tuple[float, float, float | None]]] = {
    "gemma2": ({}, (1.0, 1.0, 30.0)),
    "cohere": ({}, (1.0, 0.0625, None)),
    "granite": ({"logits_scaling": 13.0}, (1.0, 1 / 13, None)),
    "minicpm3": ({}, (8.0, 1.0, None)),
    "llama": ({}, (1.0, 1.0, None)),
}


@pytest.mark.parametrize("family", CAPS)
def test_caps_and_scales_of_a_model_are_found_and_its_scores_made_with_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, expected = CAPS[family]
    policy = Policy(tiny_model(tiny_config(family, **changes)))
    assert policy.transform is not None
    assert policy.transform[:2] == pytest.approx(expected[:2], rel=1e-8)
    assert policy.transform.cap == expected[2]
    tokens = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
    sequences = Sequences(tokens, torch.tensor([2, 3, 4]), torch.tensor([7, 6, 5]))
    logits = policy.model(tokens[:1]).logits[0, 1:8]
    wanted = torch.distributions.Categorical(logits=logits / 0.7)
    values = wanted.log_prob(tokens[0, 2:]), wanted.entropy()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(values[0].sum() + values[1].sum(), parameters, allow_unused=True)
    for size in (token_scores.RUNNING_FROM, 0):
        monkeypatch.setattr(token_scores, "RUNNING_FROM", size)
        scores = [s[0] for s in policy(sequences, 0.7, entropy_gradient=True)]
        torch.testing.assert_close(scores, list(values), rtol=1e-4, atol=2e-5)
        found = torch.autograd.grad(scores[0].sum() + scores[1].sum(), parameters, allow_unused=True)
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Squared(nn.Module):
    """A model whose logits are the squares of its head's outputs."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.base_model, self.device = inner, inner.base_model, inner.device
        self.get_output_embeddings = inner.get_output_embeddings

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        out = self.inner(input_ids, use_cache=use_cache)
        out.logits = out.logits.square()
        return out


def test_another_transform_is_left_to_the_model() -> None:
    model: Any = Squared(tiny_model(tiny_config("llama")))
    assert head_transform(model) is None


def gradients(tied: bool, rank: int, ranks: int) -> dict[str, Tensor]:
    """Of the scores of four rows, summed, each rank scoring its share of them."""
    policy = Policy(tiny_model(tiny_config("qwen2", tie_word_embeddings=tied)))
    if ranks > 1:
        shard_policy(policy, init_device_mesh("cpu", (ranks,)))
    tokens = torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(0))
    whole = Sequences(tokens, torch.tensor([2, 3, 4, 2]), torch.tensor([7, 6, 5, 3]))
    with policy.sampling():
        policy(whole)  # weights gathered without a graph must not stay
    logp, entropy = policy(whole.select(torch.arange(rank, 4, ranks)), 0.7, entropy_gradient=True)
    (ranks * (logp.sum() + entropy.sum())).backward()  # FSDP takes the mean over ranks
    return {name: full(p.grad) for name, p in policy.named_parameters() if p.grad is not None}


def on_one_of_two_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {tied: gradients(tied, rank, 2) for tied in (False, True)}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def test_two_sharded_ranks_have_the_gradients_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores, "RUNNING_FROM", 0)
    monkeypatch.setattr(running_scores, "CPU_TILE", (5, 7))
    mp.start_processes(on_one_of_two_ranks, args=(tmp_path,), nprocs=2, start_method="fork")
    found = torch.load(tmp_path / "found.pt")
    monkeypatch.undo()  # against one process that makes all logits at once
    for tied in (False, True):
        one = gradients(tied, 0, 1)
        assert one.keys() == found[tied].keys()
        assert relative(found[tied], one) < 1e-5
