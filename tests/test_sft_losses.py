"""EAFT and SED-SFT against their formulas in fp64, token by token, and the log-probabilities that both go by."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import pytest
import torch
from conftest import make_module
from lightning import Callback, Trainer
from test_supervision import questions
from torch import Tensor, nn

from mifo_callbacks import EntropyTokenSelection
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import PhaseLoader
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.losses.sed import SED, sed_term
from mifo_lightning.losses.sft_weights import EAFT
from mifo_lightning.policy import running_scores, token_scores
from mifo_lightning.policy.head import LogitTransform
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy
from mifo_lightning.policy.scoring import score_without_gradient
from mifo_lightning.steps import supervision
from mifo_lightning.steps.optimizer import AdamWSettings
from mifo_lightning.steps.settings import SFTLoss
from mifo_lightning.steps.supervision import Supervision, initial_sed_threshold, sft_batch

MakeTrainer = Callable[..., Trainer]
Way = Literal["whole", "tiles", "chunks"]


# --- the largest log-probabilities ------------------------------------------------------------------------------------


def scored(
    monkeypatch: pytest.MonkeyPatch, way: Way, vocabulary: int, top_k: int, cap: float | None = None
) -> tuple[tuple[Tensor, ...], list[Tensor], Tensor]:
    """Scores of 20 tokens on one of the three ways, gradients of a loss, and all log-probabilities in fp64."""
    torch.manual_seed(0)
    head, transform = nn.Linear(8, vocabulary), LogitTransform(1.0, 3.0, cap)
    hidden, targets = torch.randn(20, 8, requires_grad=True), torch.randint(vocabulary, (20,))
    if way == "tiles":
        monkeypatch.setattr(token_scores, "RUNNING_FROM", 0)
        monkeypatch.setattr(running_scores, "CPU_TILE", (7, 9))
    if way == "chunks":
        head.register_forward_hook(lambda *_: None)
        monkeypatch.setattr(token_scores, "CHUNK_ELEMENTS", 3 * vocabulary)
    scores = token_scores.token_scores(head, hidden, targets, 0.7, transform=transform, top_k=top_k)
    gradients = torch.autograd.grad((scores[0] * torch.arange(20)).sum(), [hidden, head.weight])
    logits = transform(nn.functional.linear(hidden.double(), head.weight.double(), head.bias.double())) / 0.7
    return scores, list(gradients), logits.detach().log_softmax(-1)


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize(("vocabulary", "top_k"), [(50, 20), (50, 1), (12, 20)])
@pytest.mark.parametrize("way", ["whole", "tiles", "chunks"])
def test_the_largest_log_probabilities_are_those_of_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch, way: Way, vocabulary: int, top_k: int, cap: float | None
) -> None:
    (_, _, top), _, logp = scored(monkeypatch, way, vocabulary, top_k, cap)
    expected = [sorted(row, reverse=True)[:top_k] for row in logp.tolist()]
    torch.testing.assert_close(top, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert not top.requires_grad


@pytest.mark.parametrize("way", ["whole", "tiles", "chunks"])
def test_asking_for_them_changes_no_bit_of_the_other_scores(monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    with_them, without = (
        [*scores[:2], *gradients] for scores, gradients, _ in (scored(monkeypatch, way, 50, k) for k in (20, 0))
    )
    assert all(torch.equal(a, b) for a, b in zip(with_them, without, strict=True))


@pytest.mark.parametrize("way", ["whole", "tiles"])
def test_bf16_logits_are_widened_before_they_are_compared(monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        (_, _, top), _, logp = scored(monkeypatch, way, 50, 20)
    assert top.dtype == torch.float32
    # logits in bf16, sums in fp32: probabilities of each position add up to no more than 1
    assert (top.exp().sum(-1) <= 1 + 1e-6).all()
    torch.testing.assert_close(top, logp.topk(20).values.float(), atol=0.2, rtol=0)


def test_padding_company_and_blocks_do_not_matter(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = sft_batch(questions(tokenizer), tokenizer, torch.device("cpu")).sequences
    whole = score_without_gradient(policy, sequences, 1.0, top_k=5)[2]
    monkeypatch.setattr("mifo_lightning.policy.scoring.SCORING_TOKENS", 40)
    torch.testing.assert_close(score_without_gradient(policy, sequences, 1.0, top_k=5)[2], whole, atol=1e-5, rtol=1e-5)
    for row in range(len(whole)):
        alone = policy(sequences.select(torch.tensor([row])), top_k=5)[2][0]
        torch.testing.assert_close(alone, whole[row, : len(alone)], atol=1e-5, rtol=1e-5)
        assert (whole[row, len(alone) :] == 0).all()


# --- EAFT -------------------------------------------------------------------------------------------------------------


def naive_eaft(logits: Tensor, alpha: float) -> float:
    """(H / 3)^alpha of one position, from all of its logits in fp64."""
    chosen = sorted(logits.tolist(), reverse=True)[:20]
    total = sum(math.exp(z - chosen[0]) for z in chosen)
    probabilities = [math.exp(z - chosen[0]) / total for z in chosen]
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    return float((entropy / (3.0 if len(chosen) == 20 else math.log(len(chosen)))) ** alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [7, 20, 300])
def test_eaft_is_the_entropy_of_the_twenty_largest_logits(vocabulary: int, alpha: float) -> None:
    logits = 4 * torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[0] = -1000.0 * torch.arange(vocabulary)  # certain, and probabilities that are 0
    top = logits.log_softmax(-1).topk(min(20, vocabulary)).values.float()[None]
    nothing = torch.zeros(1, 6)
    found = EAFT(alpha)(nothing, nothing, nothing.bool(), top=top)
    expected = [naive_eaft(row, alpha) for row in logits]
    torch.testing.assert_close(found[0].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-5)
    assert expected[0] == (alpha == 0)


def test_an_impossible_power_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.sft_loss.weight.alpha: -1 is not allowed; it must be at least 0"):
        EAFT(-1)


# --- SED-SFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "rest"), [(2.0, 0.809017), (8.0, 0.603553), (1.0, 1.0), (1.5, 0.879153)])
def test_where_a_token_comes_to_rest(strength: float, rest: float) -> None:
    def slope(p: float) -> float:
        """Of the loss by p."""
        logp = torch.tensor([[math.log(p)]], dtype=torch.float64, requires_grad=True)
        term, _ = sed_term(logp, torch.zeros(1, 1, 2), 3.0)
        (of_logp,) = torch.autograd.grad((-logp + strength * term).sum(), logp)
        return float(of_logp) / p

    assert rest == pytest.approx((1 + math.sqrt(1 + 8 / strength)) / 4, abs=1e-6)
    assert slope(rest) == pytest.approx(0, abs=1e-4)
    assert all(slope(p) < 0 for p in (0.01, 0.3, 0.5, 0.99 * rest))
    assert rest == 1.0 or slope(1.01 * rest) > 0


def test_the_term_is_of_open_tokens_alone_and_the_mask_has_no_gradient() -> None:
    p, top = torch.tensor([[0.3, 0.9, 0.4]]), torch.tensor([[[0.4, 0.3], [0.9, 0.05], [0.5, 0.45]]])
    logp, largest = p.log().requires_grad_(), top.log()
    term, is_open = sed_term(logp, largest, 0.95)
    assert is_open.tolist() == [[True, False, False]]  # the second and third sums are not below it
    torch.testing.assert_close(term, torch.tensor([[0.04, 0.0, 0.0]]))
    (slope,) = torch.autograd.grad(term.sum(), logp)
    torch.testing.assert_close(slope, torch.tensor([[2 * (0.3 - 0.5) * 0.3, 0.0, 0.0]]))


def sums_by_hand(policy: Policy, qs: list[Question], k: int) -> list[float]:
    """The sum of the k largest probabilities at every token of every demonstration."""
    return [
        sum(sorted(logits.softmax(-1).tolist(), reverse=True)[:k])
        for q in qs
        for logits in logits_of(policy, q).detach()
    ]


def logits_of(policy: Policy, q: Question) -> Tensor:
    shown = q.demonstration or []
    logits: Tensor = policy.model(torch.tensor([q.prompt + shown])).logits[0, len(q.prompt) - 1 : -1]
    return logits[: len(shown)]


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(("k", "ratio"), [(2, 0.7), (1, 0.3), (3, 0.5)])
def test_the_threshold_is_between_the_sums_that_are_left_alone_and_the_others(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, rows: int, k: int, ratio: float
) -> None:
    monkeypatch.setattr(supervision, "INITIAL_ROWS", rows)
    qs = [replace(q, demonstration=q.demonstration if q.id != 2 else None) for q in questions(tokenizer)]
    sums = sorted(sums_by_hand(policy, [q for q in qs if q.demonstration], k))
    reach = math.floor(ratio * len(sums) + 1e-9)
    sed = SED(1.0, k, ratio)
    found = initial_sed_threshold(policy, qs, tokenizer.pad_token_id, sed)
    assert found == pytest.approx((sums[-reach] + sums[-reach - 1]) / 2, abs=2e-6)
    assert sums[-reach - 1] < found < sums[-reach]
    assert initial_sed_threshold(policy, qs[::-1], tokenizer.pad_token_id, sed) == pytest.approx(found, abs=2e-6)
    assert initial_sed_threshold(policy, qs, tokenizer.pad_token_id, SED(1.0, k, 0.0)) == math.inf


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sed": SED(-1.0)}, "model.sft_loss.sed.strength: -1.0 is not allowed; it must be at least 0"),
        ({"sed": SED(1.0, 0)}, "model.sft_loss.sed.top_k: 0 is not allowed; it must be at least 1"),
        ({"sed": SED(1.0, 2, 1.0)}, r"model.sft_loss.sed.mask_ratio: 1.0 is not allowed; it must be in \[0, 1\)"),
        ({"sed": SED(1.0), "demonstrations": "own"}, "model.sft_loss.sed.strength: 1.0 is not allowed; it must be 0"),
        ({"sed": {"strength": 1.0}}, "model.sft_loss.sed: .* is not allowed; it must be a SED"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        make_module(**changes)


def test_a_run_goes_on_with_the_threshold_that_it_began_with(tokenizer: Any, policy: Policy) -> None:
    begun = Supervision(tokenizer, SFTLoss(sed=SED(1.0)))
    begun.sed_threshold = 0.5
    on = Supervision(tokenizer, SFTLoss(sed=SED(2.0)))
    on.load_state_dict(begun.state_dict(), policy)
    assert on.batch(questions(tokenizer), torch.device("cpu")).sed_threshold == 0.5
    without = Supervision(tokenizer, SFTLoss())
    before = {"initial_losses": None}  # as checkpoints from before there was one
    without.load_state_dict(before, policy)
    for loss, state in (
        (SED(1.0, 3), begun.state_dict()),
        (SED(1.0, 2, 0.5), begun.state_dict()),
        (SED(), begun.state_dict()),
        (SED(1.0), without.state_dict()),
        (SED(1.0), before),
    ):
        with pytest.raises(InputError, match=r"model.sft_loss.sed: .* is not allowed here; the run began with"):
            Supervision(tokenizer, SFTLoss(sed=loss)).load_state_dict(state, policy)


# --- steps of a run ---------------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """What the formulas need of one demonstration token, in fp64: log-probability and entropy, and all its logits."""

    logp: Tensor
    entropy: Tensor
    logits: Tensor


def tokens_of(policy: Policy, qs: list[Question]) -> list[Token]:
    found = []
    for q in qs:
        for target, logits in zip(q.demonstration or [], logits_of(policy, q), strict=True):
            logp = logits.log_softmax(-1)
            found.append(Token(logp[target], -(logp.exp() * logp).sum().detach(), logits.detach()))
    return found


class Gradient(Callback):
    """The gradient of the last optimizer step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.found = {n: p.grad.double().clone() for n, p in pl_module.named_parameters()}


LOSSES: dict[str, dict[str, Any]] = {
    "eaft": {"weight": "eaft"},
    "eaft squared": {"weight": EAFT(2.0)},
    "sed": {"sed": SED(4.0, 2, 0.55)},
    "sed of other sums": {"sed": SED(1.0, 3, 0.35)},
    "sed on all tokens": {"sed": SED(1.5, 2, 0.0)},
    "both": {"weight": "eaft", "sed": SED(4.0, 2, 0.55)},
}


def loss_by_hand(tokens: list[Token], loss: dict[str, Any], selection: float) -> Tensor:
    """The mean over the selected tokens of weight x cross-entropy + strength x M (p - 1/2)^2."""
    weight, sed = loss.get("weight"), loss.get("sed", SED())
    sums = [float(t.logits.softmax(-1).topk(sed.top_k).values.sum()) for t in tokens]
    reach = math.floor(sed.mask_ratio * len(sums) + 1e-9)
    tau = sorted(sums)[-reach] if reach else math.inf
    count = math.ceil(selection * len(tokens))
    chosen = sorted(range(len(tokens)), key=lambda i: -float(tokens[i].entropy))[:count]
    terms = []
    for i in chosen:
        alpha = {"eaft": 1.0, None: 0.0}[weight] if weight is None or weight == "eaft" else weight.alpha
        terms.append(-naive_eaft(tokens[i].logits, alpha) * tokens[i].logp)
        if sums[i] < tau:
            terms.append(sed.strength * (tokens[i].logp.exp() - 0.5) ** 2)
    return torch.stack(terms).sum() / count


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
@pytest.mark.parametrize("cut", [{}, {"micro_batches": 4}, {"micro_batch_tokens": 50}], ids=["one", "rows", "tokens"])
@pytest.mark.parametrize("selection", [1.0, 0.5])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_step_is_that_of_the_formula(
    make_trainer: MakeTrainer, tokenizer: Any, name: str, selection: float, cut: dict[str, int]
) -> None:
    qs = questions(tokenizer)
    loader = PhaseLoader(qs, Schedule(rl_steps=0, sft_before=1, sft_batch=8))
    seen = Gradient()
    chosen = [EntropyTokenSelection(fraction=selection)] if selection < 1 else []
    module = make_module(sft=AdamWSettings(lr=0.0), **LOSSES[name], **cut)
    make_trainer([*chosen, seen]).fit(module, train_dataloaders=loader)
    policy = load_policy("embedded").double()
    loss_by_hand(tokens_of(policy, qs), LOSSES[name], selection).backward()
    expected = {f"policy.{n}": p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert seen.found.keys() == expected.keys()
    distance, size = (
        math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for gradients in ([seen.found[n] - g for n, g in expected.items()], expected.values())
    )
    assert distance < 1e-4 * size


def test_what_is_logged_of_sed(policy: Policy, tokenizer: Any) -> None:
    on = Supervision(tokenizer, SFTLoss(sed=SED(4.0, 2, 0.55)))
    qs = questions(tokenizer)
    on.measure(policy, qs)
    batch = on.batch(qs, torch.device("cpu"))
    scores = policy(batch.sequences, top_k=on.objective.top_k)
    loss, metrics = on.objective(batch, *scores)
    tokens = int(batch.sequences.response_lengths.sum())
    assert float(metrics["sed_share"]) == pytest.approx((tokens - math.floor(0.55 * tokens)) / tokens, abs=1.1 / tokens)
    assert float(loss.detach()) == pytest.approx(float(metrics["loss"] + 4 * metrics["sed"]), rel=1e-5)
