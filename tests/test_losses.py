"""The losses against values worked out by hand, and their independence of how a batch is cut."""

import math

import pytest
import torch

from mifo_lightning.losses import token_scores as scoring
from mifo_lightning.losses.policy import group_advantages, kl_k3, policy_loss
from mifo_lightning.losses.sft import sft_loss
from mifo_lightning.losses.token_scores import token_scores


def test_advantages_are_centred_and_scaled_within_each_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.2, 0.8, 0.2, 0.8])
    got = group_advantages(rewards, 4)
    std = 0.5  # of (1, 0, 0, 0) over 3 degrees of freedom
    torch.testing.assert_close(got[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (std + 1e-6))
    std = math.sqrt(4 * 0.09 / 3)
    torch.testing.assert_close(got[4:], torch.tensor([-0.3, 0.3, -0.3, 0.3]) / (std + 1e-6))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exactly_no_advantage(value: float) -> None:
    assert (group_advantages(torch.full((14,), value), 7) == 0).all()


def test_groups_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.zeros(4), 1)


def test_ratio_clip_and_kl_by_hand() -> None:
    # two sequences of 2 and 1 tokens; ratios 1.5, 0.5 and 1.1
    logp = torch.log(torch.tensor([[0.6, 0.1], [0.55, 0.9]])).requires_grad_()
    old = torch.log(torch.tensor([[0.4, 0.2], [0.5, 0.9]]))
    reference = torch.log(torch.tensor([[0.3, 0.1], [0.55, 0.1]]))
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([1.0, -1.0])
    loss, metrics = policy_loss(logp, old, advantages, mask, sequences=2, logp_ref=reference, kl_coefficient=0.5)
    # min(1.5, 1.2) = 1.2 is clipped; min(0.5, 0.8) = 0.5 is not; A = -1: min(-1.1, -1.1)
    policy = -((1.2 + 0.5) / 2 + -1.1) / 2
    d = math.log(0.3 / 0.6)
    kl = ((0.5 - d - 1) / 2) / 2  # the second token and the second sequence have d = 0
    assert loss.item() == pytest.approx(policy + 0.5 * kl, rel=1e-5)
    assert metrics["kl_ref"].item() == pytest.approx(kl, rel=1e-5)
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)
    assert metrics["clip_share"].item() == pytest.approx(0.25)
    loss.backward()
    assert logp.grad is not None
    # d/dlogp: clipped token only KL (d - terms: 1 - e^d), free token -A r / (n_tokens n_sequences)
    expected = torch.tensor([[0.5 * (1 - 0.5) / 4, -0.5 / 4], [1.1 / 2, 0.0]])
    torch.testing.assert_close(logp.grad, expected)


def test_negative_advantage_clips_at_the_lower_end() -> None:
    logp, old = torch.log(torch.tensor([[0.1]])), torch.log(torch.tensor([[0.2]]))
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = policy_loss(logp, old, torch.tensor([-1.0]), mask, sequences=1, clip_low=0.3)
    assert loss.item() == pytest.approx(0.7)


def test_kl_is_zero_for_equal_policies_and_positive_otherwise() -> None:
    logp = torch.linspace(-5, 0, 100)
    assert (kl_k3(logp, logp) == 0).all()
    assert (kl_k3(logp, logp + torch.linspace(-2, 3, 100) + 0.01) > 0).all()


def test_tokens_outside_the_entropy_mask_do_not_push_but_count() -> None:
    logp = torch.zeros(1, 4, requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    keep = torch.tensor([[True, False, False, False]])
    loss, _ = policy_loss(logp, logp.detach(), torch.tensor([1.0]), mask, sequences=1, keep=keep)
    loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.25, 0.0, 0.0, 0.0]]))


def test_policy_loss_of_parts_sums_to_the_whole() -> None:
    torch.manual_seed(0)
    logp, old, ref = torch.randn(3, 6, 5).unbind()
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5])[:, None]
    advantages = torch.randn(6)
    whole, metrics = policy_loss(logp, old, advantages, mask, sequences=6, logp_ref=ref, kl_coefficient=0.1)
    parts = [
        policy_loss(logp[i], old[i], advantages[i], mask[i], sequences=6, logp_ref=ref[i], kl_coefficient=0.1)
        for i in (torch.tensor([4, 0]), torch.tensor([1, 2, 3, 5]))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(m[name] for _, m in parts), value)


def test_padding_never_reaches_the_policy_loss() -> None:
    logp, old = torch.randn(2, 3), torch.randn(2, 3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    advantages = torch.tensor([1.0, -2.0])
    clean, _ = policy_loss(logp, old, advantages, mask, sequences=2)
    dirty, _ = policy_loss(logp.masked_fill(~mask, -9.0), old.masked_fill(~mask, 3.0), advantages, mask, sequences=2)
    assert clean == dirty


def test_sft_loss_sees_selected_tokens_only() -> None:
    logp = torch.tensor([[-1.0, -2.0, -4.0]])
    loss, _ = sft_loss(logp, torch.tensor([[True, False, True]]), denominator=4.0)
    assert loss.item() == pytest.approx(1.25)


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


def test_chunks_change_neither_scores_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden, targets = torch.randn(20, 8, requires_grad=True), torch.randint(50, (20,))

    def run() -> tuple[torch.Tensor, ...]:
        logp, entropy = token_scores(head, hidden, targets)
        grads = torch.autograd.grad((logp * torch.arange(20)).sum(), [hidden, head.weight])
        return logp, entropy, *grads

    plain = run()
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 150)  # chunks of 3 tokens, the last one shorter
    for a, b in zip(plain, run(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_certain_token_has_entropy_zero_and_never_less() -> None:
    logits = torch.full((4, 24), -200.0)
    logits[:, 3] = 200.0
    logp, entropy = token_scores(torch.nn.Identity(), logits, torch.tensor([3, 3, 3, 3]))
    assert (entropy == 0).all()
    assert (logp == 0).all()
