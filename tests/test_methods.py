"""The loss of every shipped method and policy loss, on a batch small enough to write the formula out.

Settings come from the shipped files, so that these are what is tested. The old policy is the base model, the new one
the same after an update; formulas are evaluated on the new one, response by response, from the bare model's logits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from rl_steps import (
    CONFIGS,
    Gradient,
    by_hand,
    configured,
    gradient,
    groups_of,
    item,
    moved,
    prepare,
    questions,
    reinforcement,
    relative,
    rl_settings,
    step_loss,
)
from torch import Tensor

from mifo_lightning.losses.sft_weights import HighEntropy
from mifo_lightning.methods import SRFT
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy
from mifo_lightning.steps.reinforcement import Reinforcement
from mifo_lightning.steps.settings import PolicyLoss

LONGEST = 14
# mixed, all wrong, mixed and without a demonstration, all right; the truth is 7, what has no <eos> is wrong
RESPONSES = [
    ["3>7<eos>", "43>8<eos>", "1234>9<eos>", "3>7"],
    ["3>8<eos>", "21", "543>8<eos>", "6<eos>"],
    ["5>6<eos>", "12345>7<eos>", "3>4<eos>", ">7<eos>"],
    ["3>7<eos>", "43>7<eos>", ">7<eos>", "21>7<eos>"],
]
SHOWN = ("43>7<eos>", "65432>7<eos>", "", "7<eos>")


class Response(NamedTuple):
    """Scores [n] of one response or demonstration under the new policy, log-probabilities under the old, reward."""

    logp: Tensor
    entropy: Tensor
    old: Tensor
    reward: float


class Hand(NamedTuple):
    """What the formulas are evaluated on: the responses and, where there is one, the demonstration of each question."""

    own: list[list[Response]]
    demos: list[Response | None]


def rewards(group: list[Response]) -> Tensor:
    return torch.tensor([x.reward for x in group])


def mean_std(r: Tensor) -> Tensor:
    return (r - r.mean()) / (r.std() + 1e-6)


def centred(r: Tensor) -> Tensor:
    return r - r.mean()


def advantages(h: Hand, kind: Callable[[Tensor], Tensor] = mean_std) -> list[tuple[Response, float]]:
    """Every own response with its advantage among the own ones."""
    return [(x, float(a)) for group in h.own for x, a in zip(group, kind(rewards(group)), strict=True)]


def clip(x: Response, a: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    r = (x.logp - x.old).exp()
    return torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def grpo(h: Hand) -> Tensor:
    return -total([clip(x, a).mean() for x, a in advantages(h)]) / 16


def with_signal(h: Hand) -> Hand:
    """Dynamic sampling: only groups of which some are right and some wrong."""
    kept = [i for i, group in enumerate(h.own) if 0 < rewards(group).sum() < len(group)]
    return Hand([h.own[i] for i in kept], [h.demos[i] for i in kept])


def dapo(h: Hand) -> Tensor:
    pairs = advantages(with_signal(h))
    return -total([clip(x, a, 0.2, 0.28).sum() for x, a in pairs]) / sum(len(x.logp) for x, _ in pairs)


def gspo(h: Hand) -> Tensor:
    terms = []
    for x, a in advantages(h):
        s = (x.logp - x.old).mean().exp()
        terms.append(torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a))
    return -total(terms) / 16


def cispo(h: Hand) -> Tensor:
    terms = [((x.logp - x.old).exp().detach().clamp(max=5) * a * x.logp).sum() for x, a in advantages(h)]
    return -total(terms) / sum(len(x.logp) for group in h.own for x in group)


def rloo(h: Hand) -> Tensor:
    def less_the_others(r: Tensor) -> Tensor:
        return torch.stack([x - (r.sum() - x) / (len(r) - 1) for x in r])

    return -total([a * x.logp.sum() for x, a in advantages(h, less_the_others)]) / (16 * LONGEST)


def dr_grpo(h: Hand) -> Tensor:
    return -total([clip(x, a).sum() for x, a in advantages(h, centred)]) / (16 * LONGEST)


def per_gpu(terms: list[Tensor], sequences: int) -> Tensor:
    """Sums over sequences / L_max, of the 64 sequences that one GPU holds, averaged over GPUs."""
    return total([term.sum() for term in terms]) / LONGEST / (sequences / 64)


def bonus(own: list[Response]) -> Tensor:
    """Entropy coefficient .001, mean over tokens."""
    return 0.001 * torch.cat([x.entropy for x in own]).mean()


def relift(h: Hand) -> Tensor:
    """A = R - mean, no clip, sum / L_max."""
    pairs = advantages(h, centred)
    return -per_gpu([(x.logp - x.old).exp() * a for x, a in pairs], 16) - bonus([x for x, _ in pairs])


def joined(h: Hand, kind: Callable[[Tensor], Tensor]) -> list[tuple[Response, float, bool]]:
    """Every member of every group with its advantage in the group, and whether it is the demonstration."""
    found = []
    for group, demo in zip(h.own, h.demos, strict=True):
        members = [*group, *([demo] if demo else [])]
        shown = [False] * len(group) + [True] * (demo is not None)
        found += list(zip(members, kind(rewards(members)).tolist(), shown, strict=True))
    return found


def shaped(x: Response) -> Tensor:
    p = x.logp.exp()
    return p / (p + 0.1)


def luffy(h: Hand) -> Tensor:
    """A = R - mean over own and demonstration; r A on own tokens, A f(p) on the demonstration's; sum / L_max."""
    rows = joined(h, centred)
    terms = [a * (shaped(x) if shown else (x.logp - x.old).exp()) for x, a, shown in rows]
    return -per_gpu(terms, len(rows)) - bonus([x for x, _, shown in rows if not shown])


def cross_entropy(h: Hand, weight: Callable[[Response], Any]) -> Tensor:
    """Mean over the tokens of the demonstrations, times the share of the four questions that have one."""
    demos = [x for x in h.demos if x]
    terms = [-(weight(x) * x.logp).sum() for x in demos]
    return total(terms) / sum(len(x.logp) for x in demos) * len(demos) / 4


def srft(h: Hand, sign: int = -1) -> Tensor:
    """w_SFT CE + off-policy RL on demonstrations + 0.1 exp(H) E+[-logp] + E-[logp] on own rollouts."""
    rows, terms = joined(h, mean_std), []
    for x, a, shown in rows:
        up = float(0.1 * x.entropy.detach().mean().exp())
        own = (up if x.reward == 1 else -1.0) * x.logp
        terms.append((a * shaped(x) if shown else own).mean())
    w_sft = cross_entropy(h, lambda x: (sign * x.entropy.detach().mean()).exp())
    return 0.5 * w_sft - total(terms) / len(rows)


def chord(h: Hand, mu: float = 0.9) -> Tensor:
    return (1 - mu) * grpo(h) + mu * cross_entropy(h, lambda _: 1.0)


def chord_phi(h: Hand) -> Tensor:
    return 0.9 * grpo(h) + 0.1 * cross_entropy(h, lambda x: (x.logp.exp() * (1 - x.logp.exp())).detach())


def hpt(h: Hand) -> Tensor:
    """The second question has no correct rollout: its rollouts are dropped, its demonstration is learned instead."""
    pairs = [pair for k, pair in enumerate(advantages(h, centred)) if k // 4 != 1]
    terms = [(x.logp - x.old).exp() * a for x, a in pairs]
    assert h.demos[1] is not None
    return -per_gpu(terms, 16) - bonus([x for x, _ in pairs]) - h.demos[1].logp.mean()


FORMULAS: dict[str, Callable[[Hand], Tensor]] = {
    "losses/grpo": grpo,
    "losses/dr_grpo": dr_grpo,
    "losses/dapo": dapo,
    "losses/gspo": gspo,
    "losses/cispo": cispo,
    "losses/rloo": rloo,
    "methods/rl": grpo,
    "methods/relift": relift,
    "methods/luffy": luffy,
    "methods/srft": srft,
    "methods/chord": chord,
    "methods/chord_phi": chord_phi,
    "methods/hpt": hpt,
}


def by_formula(tokenizer: Any, rl: Reinforcement, new: Policy, formula: Callable[[Hand], Tensor]) -> Tensor:
    """The formula on RESPONSES and SHOWN under `new`, with the base model as the policy that sampled."""
    old, qs = load_policy("embedded"), questions(tokenizer, SHOWN)
    graded = rl.grade(qs, responses(tokenizer, rl))

    def response(i: int, tokens: list[int], reward: float) -> Response:
        with torch.no_grad():
            before = by_hand(old, qs[i].prompt, tokens)[0]
        return Response(*by_hand(new, qs[i].prompt, tokens), before, reward)

    rows = zip(graded.completions, graded.rewards.tolist(), strict=True)
    own = [[response(i, c.tokens, r) for c, r in zip(*pair, strict=True)] for i, pair in enumerate(rows)]
    demos = [response(i, q.demonstration, 1.0) if q.demonstration else None for i, q in enumerate(qs)]
    return formula(Hand(own, demos))


def responses(tokenizer: Any, rl: Reinforcement) -> list[Any]:
    n = 3 if rl.mixing and rl.mixing.in_group else 4
    return groups_of(tokenizer, *(text for group in RESPONSES for text in group[:n]), size=n)


def assert_formula(tokenizer: Any, rl: Reinforcement, formula: Callable[[Hand], Tensor], step: int = 0) -> None:
    """Loss and gradient of one RL step are those of the formula."""
    qs, new = questions(tokenizer, SHOWN), moved(load_policy("embedded"))
    work = item(qs, updates=2, rollout=step)
    rollout = prepare(rl, load_policy("embedded"), work, rl.grade(qs, responses(tokenizer, rl)))
    loss, expected = step_loss(rl, new, rollout, micro_batches=3), by_formula(tokenizer, rl, new, formula)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    found = gradient(new, loss)
    assert relative(found, gradient(new, expected)) < 1e-4


def test_every_shipped_loss_and_mixture_has_its_formula() -> None:
    shipped = {folder: {path.stem for path in (CONFIGS / folder).glob("*.yaml")} for folder in ("losses", "methods")}
    own_loss = {name for name in shipped["methods"] if "loss" in configured(f"methods/{name}").get("model", {})}
    mixed = {name for name in shipped["methods"] if rl_settings(f"methods/{name}")[1]}
    expected = {f"losses/{n}" for n in shipped["losses"]} | {f"methods/{n}" for n in own_loss | mixed | {"rl"}}
    assert set(FORMULAS) == expected


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_and_its_gradient_are_those_of_the_formula(tokenizer: Any, name: str) -> None:
    settings, mixing = rl_settings(name)
    assert_formula(tokenizer, reinforcement(tokenizer, settings=settings, mixing=mixing), FORMULAS[name])


def test_srft_with_the_sign_of_its_code(tokenizer: Any) -> None:
    settings, mixing = rl_settings("methods/srft")
    assert mixing is not None
    mixing.token_weight = HighEntropy()
    assert_formula(tokenizer, reinforcement(tokenizer, settings=settings, mixing=mixing), lambda h: srft(h, sign=1))


@pytest.mark.parametrize(("step", "mu"), [(0, 0.9), (50, 0.7755204), (100, 0.475), (200, 0.05), (500, 0.05)])
def test_chord_decays_from_the_demonstrations_to_the_rollouts(tokenizer: Any, step: int, mu: float) -> None:
    settings, mixing = rl_settings("methods/chord")
    assert_formula(tokenizer, reinforcement(tokenizer, settings=settings, mixing=mixing), lambda h: chord(h, mu), step)


EVERYTHING = "everything at once"


def configured_rl(tokenizer: Any, name: str) -> Reinforcement:
    if name != EVERYTHING:
        settings, mixing = rl_settings(name)
        return reinforcement(tokenizer, settings=settings, mixing=mixing)
    settings = PolicyLoss(aggregation="token", kl_coefficient=0.3, entropy_bonus=0.2, entropy_fraction=0.5)
    mixing = SRFT()
    rl = reinforcement(tokenizer, settings=settings, mixing=mixing)
    rl.set_reference(moved(load_policy("embedded"), seed=7))
    return rl


def gradients(
    tokenizer: Any, name: str, chosen: list[int], micro_batches: int = 1, minibatches: int = 1
) -> list[Gradient]:
    """The gradient of every update of a pass on the chosen questions."""
    rl, new = configured_rl(tokenizer, name), moved(load_policy("embedded"))
    qs, drawn = questions(tokenizer, SHOWN), responses(tokenizer, rl)
    qs, drawn = [qs[i] for i in chosen], [drawn[i] for i in chosen]
    work = item(qs, updates=2, minibatches=minibatches)
    rollout = prepare(rl, load_policy("embedded"), work, rl.grade(qs, drawn))
    return [gradient(new, step_loss(rl, new, rollout, u, micro_batches)) for u in range(minibatches)]


@pytest.mark.parametrize("name", [*FORMULAS, EVERYTHING])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut_or_ordered(tokenizer: Any, name: str) -> None:
    (whole,) = gradients(tokenizer, name, [0, 1, 2, 3])
    for order, micro_batches in (([0, 1, 2, 3], 2), ([0, 1, 2, 3], 8), ([2, 0, 3, 1], 3)):
        (parts,) = gradients(tokenizer, name, order, micro_batches=micro_batches)
        assert relative(parts, whole) < 1e-4, (order, micro_batches)
    # fewer rows than micro-batches: those that fill up weigh nothing
    (few,), (spread,) = gradients(tokenizer, name, [0]), gradients(tokenizer, name, [0], micro_batches=8)
    assert relative(spread, few) < 1e-4
    # an optimizer step on half of the questions knows nothing of the other half
    halves = gradients(tokenizer, name, [2, 0, 3, 1], minibatches=2)
    for found, chosen in zip(halves, ([2, 0], [3, 1]), strict=True):
        (alone,) = gradients(tokenizer, name, chosen)
        for parameter, value in alone.items():
            torch.testing.assert_close(found[parameter], value, rtol=1e-3, atol=5e-6)
