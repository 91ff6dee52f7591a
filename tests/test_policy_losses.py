"""The policy losses: against values and gradients worked out by hand, and however a batch is cut."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from rl_steps import CONFIGS, evaluate, reinforcement, rl_settings, rollout_of
from torch import Tensor

from mifo_lightning.losses.policy import policy_loss, token_weights
from mifo_lightning.losses.surrogates import Clipped
from mifo_lightning.methods import Luffy
from mifo_lightning.policy.scoring import kl_k3
from mifo_lightning.steps.settings import PolicyLoss

LOSSES = sorted(path.stem for path in (CONFIGS / "losses").glob("*.yaml"))
LONGEST = 4  # tokens that sampling allows

# two sequences of 2 and 1 tokens with probabilities now and then: ratios 6, 0.5 and 1.1; the last token is padding
NOW = torch.tensor([[0.6, 0.1], [0.55, 0.9]])
THEN = torch.tensor([[0.1, 0.2], [0.5, 0.3]])
MASK = torch.tensor([[True, True], [True, False]])
S = math.sqrt(6 * 0.5)  # GSPO's ratio of the first sequence
L6, L1, L55 = math.log(0.6), math.log(0.1), math.log(0.55)

# name: advantages (+1, -1), then (-1, +1): the loss, and its gradient with respect to the three log-probabilities
BY_HAND: dict[str, list[tuple[float, list[float]]]] = {
    "grpo": [
        (-((1.2 + 0.5) / 2 - 1.1) / 2, [0, -0.5 / 4, 1.1 / 2]),
        (-((-6 - 0.8) / 2 + 1.1) / 2, [6 / 4, 0, -1.1 / 2]),
    ],
    "dr_grpo": [
        (-(1.2 + 0.5 - 1.1) / 8, [0, -0.5 / 8, 1.1 / 8]),
        (-(-6 - 0.8 + 1.1) / 8, [6 / 8, 0, -1.1 / 8]),
    ],
    "dapo": [
        (-(1.28 + 0.5 - 1.1) / 3, [0, -0.5 / 3, 1.1 / 3]),
        (-(-6 - 0.8 + 1.1) / 3, [6 / 3, 0, -1.1 / 3]),
    ],
    "gspo": [
        (-(1.0004 - 1.1) / 2, [0, 0, 1.1 / 2]),
        (-(-S + 1.0004) / 2, [S / 4, S / 4, 0]),
    ],
    "cispo": [
        (-(5 * L6 + 0.5 * L1 - 1.1 * L55) / 3, [-5 / 3, -0.5 / 3, 1.1 / 3]),
        (-(-5 * L6 - 0.5 * L1 + 1.1 * L55) / 3, [5 / 3, 0.5 / 3, -1.1 / 3]),
    ],
    "rloo": [
        (-(L6 + L1 - L55) / 8, [-1 / 8, -1 / 8, 1 / 8]),
        (-(-L6 - L1 + L55) / 8, [1 / 8, 1 / 8, -1 / 8]),
    ],
}


def test_every_shipped_loss_is_worked_out() -> None:
    assert set(LOSSES) == set(BY_HAND)


@pytest.mark.parametrize("sign", [0, 1], ids=["up", "down"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_by_hand(name: str, sign: int) -> None:
    advantages = torch.tensor([1.0, -1.0]) * (-1) ** sign
    rl = reinforcement(None, settings=rl_settings(f"losses/{name}")[0])
    loss, grad, _ = evaluate(rl, NOW.log(), torch.zeros(2, 2), MASK, advantages, LONGEST, logp_old=THEN.log())
    value, slopes = BY_HAND[name][sign]
    assert loss.item() == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(grad, torch.tensor([slopes[:2], [slopes[2], 0.0]]))


def test_advantages_and_sampling_of_the_shipped_losses() -> None:
    kinds = {name: rl_settings(f"losses/{name}")[0] for name in LOSSES}
    assert {name for name, s in kinds.items() if s.advantage == "group_std"} == {"grpo", "dapo", "gspo", "cispo"}
    assert kinds["dr_grpo"].advantage == "group_mean"
    assert kinds["rloo"].advantage == "leave_one_out"
    assert [name for name, s in kinds.items() if s.dynamic_sampling] == ["dapo"]


@pytest.mark.parametrize("name", ["relift", "luffy", "hpt"])
def test_the_published_mixtures_sum_over_the_64_sequences_of_a_gpu(name: str) -> None:
    """Two sequences stand for 512: the mean over eight GPUs of their sums over 64 sequences / longest response."""
    settings, mixing = rl_settings(f"methods/{name}")
    settings = replace(settings, entropy_bonus=0.0)
    rl = reinforcement(None, settings=settings, mixing=mixing)
    loss, grad, metrics = evaluate(
        rl, NOW.log(), torch.zeros(2, 2), MASK, torch.tensor([1.0, -1.0]), LONGEST, logp_old=THEN.log()
    )
    assert loss.item() == pytest.approx(-32 * (6 + 0.5 - 1.1) / 4)
    torch.testing.assert_close(grad, 32 * torch.tensor([[-6 / 4, -0.5 / 4], [1.1 / 4, 0.0]]))
    assert metrics["clip_share"] == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("old", "now"), [(-100.0, -0.01), (-0.01, -100.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_no_probability_ratio_is_so_large_that_a_gradient_is_lost(
    name: str, advantage: float, old: float, now: float, masked: bool
) -> None:
    settings = rl_settings(f"losses/{name}")[0]
    settings = replace(settings, kl_coefficient=0.1)
    mask = torch.tensor([[True, True, False]])
    scores: dict[str, Tensor] = {"logp_old": torch.full((1, 3), old), "logp_ref": torch.full((1, 3), old)}
    if masked:
        scores["keep"] = torch.tensor([[True, False, True]])
    logp, rl = torch.full((1, 3), now), reinforcement(None, settings=settings)
    loss, grad, metrics = evaluate(rl, logp, logp, mask, torch.tensor([advantage]), LONGEST, **scores)
    assert grad.isfinite().all()
    assert all(value.isfinite() for value in (loss, *metrics.values()))


def test_without_a_clip_every_ratio_pushes() -> None:
    rl = reinforcement(None, settings=PolicyLoss(surrogate="unclipped", aggregation="constant"))
    scores = {"logp_old": THEN.log()}
    loss, grad, metrics = evaluate(rl, NOW.log(), torch.zeros(2, 2), MASK, torch.tensor([1.0, -1.0]), LONGEST, **scores)
    assert loss.item() == pytest.approx(-(6 + 0.5 - 1.1) / 8)
    torch.testing.assert_close(grad, torch.tensor([[-6 / 8, -0.5 / 8], [1.1 / 8, 0.0]]))
    assert metrics["clip_share"] == 0


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    ("advantage", "r", "expected"), [(-1.0, 0.5, 0.7), (1.0, 1.9, -1.4), (1.0, 0.5, -0.5), (-1.0, 1.9, 1.9)]
)
def test_a_ratio_is_clipped_where_it_would_go_on_gaining(
    ratio: Any, advantage: float, r: float, expected: float
) -> None:
    logp, old = torch.log(torch.tensor([[0.2 * r, 0.3 * r]])), torch.log(torch.tensor([[0.2, 0.3]]))
    settings = PolicyLoss(ratio=ratio, clip_low=0.3, clip_high=0.4)
    loss, grad, metrics = evaluate(
        reinforcement(None, settings=settings), logp, old, old < 0, torch.tensor([advantage]), 2, logp_old=old
    )
    assert loss.item() == pytest.approx(expected)
    clipped = abs(expected) != r
    assert (grad == 0).all() == clipped
    assert metrics["clip_share"].item() == pytest.approx(float(clipped))
    assert metrics["kl_old"].item() == pytest.approx(r - 1 - math.log(r), rel=1e-5)


def test_the_share_of_truncated_ratios() -> None:
    rl = reinforcement(None, settings=PolicyLoss(surrogate="truncated", ratio_cap=0.7, aggregation="token"))
    for sign in (1, -1):  # 6 and 1.1 are above the cap, 0.5 is not; the advantage does not matter
        advantages = sign * torch.tensor([1.0, -1.0])
        _, _, metrics = evaluate(rl, NOW.log(), torch.zeros(2, 2), MASK, advantages, LONGEST, logp_old=THEN.log())
        assert metrics["clip_share"].item() == pytest.approx(2 / 3)


def test_kl_to_the_reference_by_hand() -> None:
    reference = torch.tensor([[0.3, 0.1], [0.55, 0.1]])
    rl = reinforcement(None, settings=PolicyLoss(kl_coefficient=0.5))
    scores = {"logp_old": NOW.log(), "logp_ref": reference.log()}
    loss, grad, metrics = evaluate(rl, NOW.log(), torch.zeros(2, 2), MASK, torch.zeros(2), LONGEST, **scores)
    kl = (0.5 - math.log(0.5) - 1) / 4  # only the first token differs: d = log(0.3 / 0.6)
    assert loss.item() == pytest.approx(0.5 * kl, rel=1e-5)
    assert metrics["kl_ref"].item() == pytest.approx(kl, rel=1e-5)
    torch.testing.assert_close(grad, torch.tensor([[0.5 * (1 - 0.5) / 4, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize(("now", "k3", "slope"), [(-100.0, math.exp(10) - 11, 0.0), (-0.01, 98.99, 1.0)])
def test_kl_is_finite_however_far_the_reference_is_and_pulls_back_a_policy_that_left_it(
    now: float, k3: float, slope: float
) -> None:
    logp = torch.tensor([now], requires_grad=True)
    found = kl_k3(logp, torch.tensor([-100.01 - now]))
    assert found.item() == pytest.approx(k3, rel=1e-5)
    (grad,) = torch.autograd.grad(found, logp)
    assert grad.item() == pytest.approx(slope)


def test_kl_is_zero_for_equal_policies_and_positive_otherwise() -> None:
    logp = torch.linspace(-5, 0, 100)
    assert (kl_k3(logp, logp) == 0).all()
    assert (kl_k3(logp, logp + torch.linspace(-2, 3, 100) + 0.01) > 0).all()


def test_the_entropy_bonus_is_taken_off_the_loss_and_weighs_tokens_alike() -> None:
    entropy = torch.tensor([[2.0, 1.0], [0.5, 9.0]], requires_grad=True)
    for aggregation, expected in (
        ("sequence", (1.5 + 0.5) / 2),
        ("token", 3.5 / 3),
        ("constant", 3.5 / 8),
        ("sum", 64 * 3.5 / 8),
    ):
        settings = PolicyLoss(entropy_bonus=0.25, aggregation=aggregation)  # type: ignore[arg-type]
        rollout = rollout_of(settings, MASK, torch.zeros(2), LONGEST, logp_old=NOW.log())
        loss, metrics = reinforcement(None, settings=settings).objective(rollout, NOW.log(), entropy)
        assert loss.item() == pytest.approx(-0.25 * expected)
        assert metrics["entropy"].item() == pytest.approx(expected)
        (grad,) = torch.autograd.grad(loss, entropy)
        assert rollout.rl is not None
        torch.testing.assert_close(grad, -0.25 * rollout.rl.weight)


@pytest.mark.parametrize("name", LOSSES)
def test_tokens_outside_the_entropy_mask_do_not_push_but_count(name: str) -> None:
    keep = torch.tensor([[False, True], [True, False]])
    rl = reinforcement(None, settings=rl_settings(f"losses/{name}")[0])
    scores = {"logp_old": THEN.log(), "keep": keep}
    _, grad, _ = evaluate(rl, NOW.log(), torch.zeros(2, 2), MASK, torch.tensor([1.0, -1.0]), LONGEST, **scores)
    slopes = BY_HAND[name][0][1]
    assert grad[0, 0] == 0
    torch.testing.assert_close(grad[[0, 1], [1, 0]], torch.tensor(slopes[1:]))


@pytest.mark.parametrize("clip", [(0.5, 0.9), (3e-4, 4e-4)])
def test_a_sequences_ratio_under_an_entropy_mask_is_that_of_each_token(clip: tuple[float, float]) -> None:
    """log s_t = sg(log s) + logp_t - sg(logp_t): with all tokens kept the same loss and gradient as without a mask."""
    settings = PolicyLoss(ratio="sequence", clip_low=clip[0], clip_high=clip[1])
    batch, mask = random_batch()
    logp, old, entropy, advantages = (batch[k] for k in ("logp", "logp_old", "entropy", "advantages"))
    rl, scores = reinforcement(None, settings=settings), {"logp_old": old}
    plain = evaluate(rl, logp, entropy, mask, advantages, 7, **scores)
    whole = evaluate(rl, logp, entropy, mask, advantages, 7, keep=torch.ones_like(mask), **scores)
    for found, expected in zip((*whole[:2], *whole[2].values()), (*plain[:2], *plain[2].values()), strict=True):
        torch.testing.assert_close(found, expected)
    # some tokens kept: each has the slope that it has in the whole, the others none
    _, some, _ = evaluate(rl, logp, entropy, mask, advantages, 7, keep=batch["keep"], **scores)
    torch.testing.assert_close(some, plain[1] * batch["keep"])
    assert (plain[1] != 0).any()


def test_a_demonstration_has_no_ratio_but_the_shaped_probability() -> None:
    mixing = Luffy(shape=0.1)
    rl = reinforcement(None, settings=PolicyLoss(), mixing=mixing)
    scores = {"logp_old": THEN.log(), "demonstrated": torch.tensor([[True, True], [False, False]])}
    loss, grad, metrics = evaluate(rl, NOW.log(), torch.zeros(2, 2), MASK, torch.tensor([1.0, -1.0]), LONGEST, **scores)
    f = [p / (p + 0.1) for p in (0.6, 0.1)]
    assert loss.item() == pytest.approx(-(sum(f) / 2 - 1.1) / 2, rel=1e-5)
    slope = [p * 0.1 / (p + 0.1) ** 2 for p in (0.6, 0.1)]  # p f'(p)
    torch.testing.assert_close(grad, torch.tensor([[-slope[0] / 4, -slope[1] / 4], [1.1 / 2, 0.0]]))
    assert metrics["clip_share"] == 0
    assert metrics["kl_old"].item() == pytest.approx((1.1 - 1 - math.log(1.1)) / 2, rel=1e-4)


def test_kl_and_bonus_are_about_the_policys_own_tokens() -> None:
    settings = PolicyLoss(kl_coefficient=0.5, entropy_bonus=0.25)
    scores = {"logp_old": NOW.log(), "logp_ref": torch.tensor([[0.3, 0.1], [0.11, 0.1]]).log()}
    shown = {"demonstrated": torch.tensor([[True, True], [False, False]])}
    rl = reinforcement(None, settings=settings, mixing=Luffy())
    entropy = torch.tensor([[2.0, 1.0], [0.5, 9.0]])
    loss, _, metrics = evaluate(rl, NOW.log(), entropy, MASK, torch.zeros(2), LONGEST, **scores, **shown)
    kl = (0.2 - math.log(0.2) - 1) / 2
    assert metrics["kl_ref"].item() == pytest.approx(kl, rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * kl - 0.25 * 0.5 / 2, rel=1e-5)


def random_batch(seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Scores [6, 5] and advantages [6] of sequences of different lengths, and their mask."""
    torch.manual_seed(seed)
    names = ("logp", "logp_old", "logp_ref", "entropy")
    batch = dict(zip(names, -torch.rand(4, 6, 5), strict=True))
    batch["keep"] = torch.rand(6, 5) > 0.3
    return {**batch, "advantages": torch.randn(6)}, torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5])[:, None]


def loss_of_rows(settings: PolicyLoss, batch: dict[str, Tensor], mask: Tensor, rows: Any) -> dict[str, Tensor]:
    """Loss and metrics of some rows of a batch that is one optimizer step."""
    rl, rest = reinforcement(None, settings=settings), dict(batch)
    logp, entropy, advantages = (rest.pop(name) for name in ("logp", "entropy", "advantages"))
    rollout = rollout_of(settings, mask, advantages, 7, **rest)
    part = rollout.rows(rows)
    length = part.sequences.mask().shape[1]
    loss, metrics = rl.objective(part, logp[rows, :length], entropy[rows, :length])
    return {**metrics, "loss": loss}


@pytest.mark.parametrize("name", LOSSES)
def test_parts_sum_to_the_whole_in_any_order(name: str) -> None:
    settings = rl_settings(f"losses/{name}")[0]
    settings = replace(settings, kl_coefficient=0.1, entropy_bonus=0.2)
    batch, mask = random_batch()
    whole = loss_of_rows(settings, batch, mask, torch.arange(6))
    # the longest row of the first part is shorter than that of the batch
    parts = [loss_of_rows(settings, batch, mask, torch.tensor(rows)) for rows in ([4, 2, 1], [5, 0, 3])]
    for key, value in whole.items():
        torch.testing.assert_close(sum(part[key] for part in parts), value)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_never_reaches_the_loss(name: str) -> None:
    settings = rl_settings(f"losses/{name}")[0]
    settings = replace(settings, kl_coefficient=0.1, entropy_bonus=0.2)
    batch, mask = random_batch()
    clean = loss_of_rows(settings, batch, mask, torch.arange(6))
    for key, value in (("logp", -9.0), ("logp_old", -3.0), ("logp_ref", -1.0), ("entropy", 7.0), ("keep", True)):
        dirty = {**batch, key: batch[key].masked_fill(~mask, value)}
        assert loss_of_rows(settings, dirty, mask, torch.arange(6)) == clean, key


def test_weights_of_tokens_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    counts: dict[str, Any] = {"sequences": 5, "tokens": 30, "max_length": 7}  # of the step: more than is here
    expected = {"sequence": [[0.1, 0.1, 0], [0.2, 0, 0]], "token": [[1 / 30] * 2 + [0], [1 / 30, 0, 0]]}
    expected["constant"] = [[1 / 35] * 2 + [0], [1 / 35, 0, 0]]
    expected["sum"] = [[64 / 35] * 2 + [0], [64 / 35, 0, 0]]
    for aggregation, rows in expected.items():
        found = token_weights(mask, aggregation, **counts)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor([*rows, [0, 0, 0]]))
    found = token_weights(mask, "sum", **counts, sum_sequences=5)  # of all sequences of the step
    torch.testing.assert_close(found, mask / 7)


def test_the_default_settings_are_those_of_the_function() -> None:
    batch, mask = random_batch()
    weight = token_weights(mask, "sequence", sequences=6, tokens=20, max_length=7)
    loss, _ = policy_loss(batch["logp"], batch["logp_old"], batch["advantages"], weight, surrogate=Clipped())
    rest = {k: v for k, v in batch.items() if k != "keep"}
    assert loss == loss_of_rows(PolicyLoss(), rest, mask, torch.arange(6))["loss"]
