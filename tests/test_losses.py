"""Advantages, SFT losses and the scores of tokens, against values worked out by hand."""

import math
from typing import Any, get_args

import pytest
import torch

from mifo_callbacks.tokens import select_tokens
from mifo_lightning.losses.advantages import ADVANTAGES, GroupMean, GroupStd, LeaveOneOut
from mifo_lightning.losses.sft import mean_over, sft_loss
from mifo_lightning.losses.sft_weights import SFTWeightName, as_sft_weight
from mifo_lightning.policy import token_scores as scoring
from mifo_lightning.policy.token_scores import token_scores


def test_advantages_are_centred_and_scaled_within_each_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.2, 0.8, 0.2, 0.8])
    got = GroupStd()(rewards.view(2, 4)).flatten()
    std = 0.5  # of (1, 0, 0, 0) over 3 degrees of freedom
    torch.testing.assert_close(got[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (std + 1e-6))
    std = math.sqrt(4 * 0.09 / 3)
    torch.testing.assert_close(got[4:], torch.tensor([-0.3, 0.3, -0.3, 0.3]) / (std + 1e-6))


def test_the_other_kinds_of_advantage() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.2, 0.8, 0.3, 0.7])
    centred = torch.tensor([0.75, -0.25, -0.25, -0.25, -0.3, 0.3, -0.2, 0.2])
    torch.testing.assert_close(GroupMean()(rewards.view(2, 4)).flatten(), centred)
    others = [(4 * rewards.view(2, 4).mean(1)[i // 4] - rewards[i]) / 3 for i in range(8)]
    torch.testing.assert_close(LeaveOneOut()(rewards.view(2, 4)).flatten(), rewards - torch.stack(others))


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exactly_no_advantage(value: float, kind: Any) -> None:
    assert (ADVANTAGES[kind]()(torch.full((2, 7), value)) == 0).all()


def test_groups_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        GroupMean()(torch.zeros(4, 1))


def test_sft_loss_sees_selected_tokens_only() -> None:
    logp = torch.tensor([[-1.0, -2.0, -4.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 1.0, 0.5]])
    loss, metrics = sft_loss(logp, torch.tensor([[True, False, True]]), 4.0, weight)
    assert loss.item() == pytest.approx((1 + 2) / 4)
    assert metrics["loss"] == loss
    (grad,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(grad, torch.tensor([[-0.25, 0.0, -0.125]]))


# two demonstrations of 3 and 1 tokens; what stands in the padding must not matter
P = torch.tensor([[0.5, 0.2, 0.9], [0.4, 0.7, 0.7]])
ENTROPY = torch.tensor([[0.3, 0.9, 0.6], [1.2, 5.0, 5.0]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
RELATIVE = torch.tensor([2.0, 0.5])  # losses before training in units of their median
# of all probabilities of a vocabulary of three, the largest first
TOP = torch.tensor(
    [[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3] * 3], [[0.5, 0.5, 0.0], [1 / 3] * 3, [1 / 3] * 3]]
).log()
GIVEN = {"flow": {"initial": RELATIVE}, "eaft": {"top": TOP}}
WEIGHTS: dict[str, list[list[float]]] = {
    "uniform": [[1, 1, 1], [1]],
    "dft": [[0.5, 0.2, 0.9], [0.4]],
    "chord": [[0.25, 0.16, 0.09], [0.24]],
    "low_entropy": [[math.exp(-0.6)] * 3, [math.exp(-1.2)]],
    "high_entropy": [[math.exp(0.6)] * 3, [math.exp(1.2)]],
    "flow": [[math.exp(-2)] * 3, [math.exp(-0.5)]],
    "eaft": [[1.5 * math.log(2) / math.log(3), 0, 1], [math.log(2) / math.log(3)]],
}


@pytest.mark.parametrize("selected", ["all", "some", "highest"])
@pytest.mark.parametrize("kind", get_args(SFTWeightName))
def test_weighted_sft_losses_and_gradients_by_hand(kind: Any, selected: str) -> None:
    logp, entropy = P.log().requires_grad_(), ENTROPY.clone().requires_grad_()
    if selected == "highest":
        chosen, denominator = select_tokens(entropy, MASK, fraction=0.5)
        assert chosen.tolist() == [[False, True, False], [True, False, False]]
    else:
        chosen = MASK if selected == "all" else torch.tensor([[True, False, True], [False] * 3])
        denominator = float(chosen.sum())
    weights = as_sft_weight(kind)(logp.detach(), entropy.detach(), MASK, **GIVEN.get(kind, {}))
    loss, _ = sft_loss(logp, chosen, denominator, weights)
    expected = torch.tensor([row + [0.0] * (3 - len(row)) for row in WEIGHTS[kind]]) * chosen
    assert loss.item() == pytest.approx(-float((expected * P.log()).sum()) / denominator, rel=1e-5)
    # nothing flows through the weight: not by p, and not by the entropy
    slopes = torch.autograd.grad(loss, [logp, entropy], allow_unused=True)
    torch.testing.assert_close(slopes[0], -expected / denominator)
    assert slopes[1] is None


def test_the_mean_over_a_sequence_is_that_of_its_valid_tokens() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [4.0, 9.0, 9.0]], requires_grad=True)
    found = mean_over(values, MASK)
    assert found.tolist() == [[3.0], [4.0]]
    assert not found.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_scores_equal_log_softmax_and_entropy(temperature: float) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden, targets = torch.randn(20, 8), torch.randint(50, (20,))
    logp, entropy = token_scores(head, hidden, targets, temperature)
    expected = torch.distributions.Categorical(logits=head(hidden) / temperature)
    torch.testing.assert_close(logp, expected.log_prob(targets))
    torch.testing.assert_close(entropy, expected.entropy())
    assert logp.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_of_the_entropy_flows_only_where_it_is_wanted(temperature: float) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden, targets = torch.randn(20, 8, requires_grad=True), torch.randint(50, (20,))
    weight = torch.arange(20.0)
    _, entropy = token_scores(head, hidden, targets, temperature, entropy_gradient=True)
    expected = torch.distributions.Categorical(logits=head(hidden) / temperature).entropy()
    both = [torch.autograd.grad((h * weight).sum(), [hidden, head.weight]) for h in (entropy, expected)]
    for found, wanted in zip(*both, strict=True):
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert not token_scores(head, hidden, targets, entropy_gradient=True)[1].requires_grad


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_chunks_change_neither_scores_nor_gradients(monkeypatch: pytest.MonkeyPatch, entropy_gradient: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden, targets = torch.randn(20, 8, requires_grad=True), torch.randint(50, (20,))

    def run() -> tuple[torch.Tensor, ...]:
        logp, entropy = token_scores(head, hidden, targets, 0.7, entropy_gradient)
        assert entropy.requires_grad == entropy_gradient
        loss = (logp * torch.arange(20)).sum() + (entropy * torch.arange(20)).sum()
        return logp, entropy, *torch.autograd.grad(loss, [hidden, head.weight])

    plain = run()
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 150)  # chunks of 3 tokens, the last one shorter
    head.register_forward_hook(lambda *_: None)  # whatever else a head does is left to it
    for a, b in zip(plain, run(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_certain_token_has_entropy_zero_and_never_less() -> None:
    logits = torch.full((4, 24), -200.0)
    logits[:, 3] = 200.0
    logp, entropy = token_scores(torch.nn.Identity(), logits, torch.tensor([3, 3, 3, 3]))
    assert (entropy == 0).all()
    assert (logp == 0).all()
