"""One SFT step and its optimizer: packing, tokens that count, the gradient by hand, clipping, learning rates."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks
from lightning import Callback, Trainer
from rl_steps import Coin, by_hand, norm
from torch import Tensor

from mifo_callbacks import EntropyTokenSelection, GradientFreezing
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import PhaseLoader
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.losses.sft_weights import SFTWeightName
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy
from mifo_lightning.steps import supervision
from mifo_lightning.steps.objective import Objective
from mifo_lightning.steps.optimizer import AdamWSettings
from mifo_lightning.steps.supervision import initial_losses, selected, sft_batch

MakeTrainer = Callable[..., Trainer]
# prompts and demonstrations of different lengths, so that means over sequences are not means over tokens
SHOWN = [
    ("1+1=", "2<eos>"),
    ("12x34=", "604000>6400<eos>"),
    ("s:40312=", "40312>01234<eos>"),
    ("9+9=", "18<eos>"),
    ("r:1=", "1>1<eos>"),
    ("777+111=", "808080>0888<eos>"),
    ("5=", "<eos>"),
    ("r:40312=", "40312>21304<eos>"),
]


def questions(tokenizer: Any, answer_starts: list[int | None] | None = None) -> list[Question]:
    starts = answer_starts or [None] * len(SHOWN)
    shown = SHOWN[: len(starts)]
    ids = [[tokenizer.encode(text, add_special_tokens=False) for text in pair] for pair in shown]
    return [
        Question(i, "s", shown[i][0], prompt, "", demonstration, start)
        for i, ((prompt, demonstration), start) in enumerate(zip(ids, starts, strict=True))
    ]


def test_demonstrations_are_packed_with_masks_of_their_end_and_answer(tokenizer: Any) -> None:
    qs = questions(tokenizer, [0, 7, None, 2])  # the last one: the answer is no more than the end
    demos = sft_batch(qs, tokenizer, torch.device("cpu"))
    lengths = [2, 12, 12, 3]
    assert demos.sequences.response_lengths.tolist() == lengths
    for row, q in enumerate(qs):
        assert q.demonstration is not None
        ids = q.prompt + q.demonstration
        assert demos.sequences.tokens[row].tolist() == ids + [tokenizer.pad_token_id] * (20 - len(ids))
    expected = {
        "all": [range(2), range(12), range(12), range(3)],
        "eos": [range(1, 2), range(11, 12), range(11, 12), range(2, 3)],
        "answer": [range(2), range(7, 12), range(0), range(2, 3)],
    }
    assert demos.ce is not None
    found = {"all": demos.ce.weight, **demos.named}
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert found[name].dtype == torch.bool
        assert found[name].tolist() == [[column in row for column in range(12)] for row in rows], name
    assert demos.ce.total == sum(lengths)


def test_the_loss_sees_all_tokens_unless_something_selects(tokenizer: Any) -> None:
    demos = sft_batch(questions(tokenizer), tokenizer, torch.device("cpu"))
    assert demos.ce is not None
    assert torch.equal(demos.ce.weight, demos.sequences.mask())
    assert demos.ce.total == sum(len(q.demonstration or []) for q in questions(tokenizer))


def test_a_selection_is_asked_once_with_everything_and_obeyed(tokenizer: Any) -> None:
    demos = sft_batch(questions(tokenizer, [0, 7, None, 2]), tokenizer, torch.device("cpu"))
    asked, entropy = [], torch.rand(demos.sequences.mask().shape)

    def select(entropy: Tensor, mask: Tensor, named: dict[str, Tensor]) -> tuple[Tensor, float]:
        asked.append((entropy, mask, named))
        return named["eos"], 17.0

    chosen = selected(demos, select, entropy)
    ((seen, mask, named),) = asked
    assert seen is entropy
    assert torch.equal(mask, demos.sequences.mask())
    assert named.keys() == {"eos", "answer"}
    assert chosen.ce is not None
    assert torch.equal(chosen.ce.weight, demos.named["eos"])
    assert chosen.ce.total == 17.0


class Steps(Callback):
    """Phase, gradient before and after clipping, masks and settings of every optimizer step; the last in the list."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.raw: list[dict[str, Tensor]] = []
        self.clipped: list[dict[str, Tensor]] = []
        self.masks: list[dict[str, Tensor]] = []
        self.groups: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.clipped.append(gradient(pl_module))
            (group,) = optimizer.param_groups
            self.groups.append({k: v for k, v in group.items() if k != "params"})

        trainer.optimizers[0].register_step_post_hook(after_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.phases.append(batch["phase"])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.raw.append(gradient(pl_module))
        freeze = next((c for c in trainer.callbacks if isinstance(c, GradientFreezing)), None)
        self.masks.append({n: m.clone() for n, m in freeze.masks.items()} if freeze else {})


def gradient(module: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters()}


def mean_losses(policy: Policy, qs: list[Question]) -> list[Tensor]:
    """Cross-entropy of each token of each demonstration, from the logits of the bare model."""
    return [-by_hand(policy, q.prompt, q.demonstration or [])[0] for q in qs]


def test_nll_and_entropy_are_means_over_all_tokens_whatever_is_selected(policy: Policy, tokenizer: Any) -> None:
    qs = questions(tokenizer)
    demos = sft_batch(qs, tokenizer, torch.device("cpu"))
    logp, entropy = (x.detach() for x in policy(demos.sequences))
    chosen = selected(demos, lambda entropy, mask, named: (named["eos"], float(len(qs))), entropy)
    _, metrics = Objective()(chosen, logp, entropy)
    scores = [[x.detach() for x in by_hand(policy, q.prompt, q.demonstration or [])] for q in qs]
    assert float(metrics["nll"]) == pytest.approx(-float(torch.cat([s[0] for s in scores]).mean()), rel=1e-4)
    assert float(metrics["entropy"]) == pytest.approx(float(torch.cat([s[1] for s in scores]).mean()), rel=1e-4)
    assert float(metrics["loss"]) == pytest.approx(-sum(float(s[0][-1]) for s in scores) / len(qs), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_initial_losses_are_means_over_tokens_in_units_of_their_median(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(supervision, "INITIAL_ROWS", rows)
    qs = [replace(q, demonstration=q.demonstration if q.id != 2 else None) for q in questions(tokenizer)]
    found = initial_losses(policy, qs, tokenizer.pad_token_id)
    losses = [float(loss.detach().mean()) if len(loss) else 0.0 for loss in mean_losses(policy, qs)]
    median = sorted(loss for loss, q in zip(losses, qs, strict=True) if q.demonstration)[3]
    torch.testing.assert_close(found, torch.tensor(losses) / median, atol=1e-5, rtol=1e-4)
    backwards = initial_losses(policy, qs[::-1], tokenizer.pad_token_id)
    torch.testing.assert_close(backwards, found.flip(0), atol=1e-5, rtol=1e-4)
    assert policy.training


def test_initial_losses_of_demonstrations_known_by_heart_are_no_nan(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    qs, known = questions(tokenizer), torch.tensor([0.0, 0, 0, 0, 0, 0, 1.0, 2.0])

    def scores(policy: Policy, sequences: Any, temperature: float) -> tuple[Tensor, Tensor]:
        logp = -known[:, None] * sequences.mask()
        return logp, logp

    monkeypatch.setattr(supervision, "score_without_gradient", scores)
    found = initial_losses(policy, qs, tokenizer.pad_token_id)
    assert torch.equal((-found).exp(), (known == 0).float())


def weights_by_hand(kind: str, policy: Policy, qs: list[Question]) -> list[Tensor]:
    """What each token's cross-entropy is multiplied by."""
    scores = [[x.detach() for x in by_hand(policy, q.prompt, q.demonstration or [])] for q in qs]
    means = torch.stack([-logp.mean() for logp, _ in scores])
    middle = means.sort().values[[(len(means) - 1) // 2, len(means) // 2]]
    tau = middle.mean()
    return [
        {
            "uniform": torch.ones_like(logp),
            "dft": logp.exp(),
            "low_entropy": (-entropy.mean()).exp().expand_as(logp),
            "flow": (-mean / tau).exp().expand_as(logp),
        }[kind]
        for (logp, entropy), mean in zip(scores, means, strict=True)
    ]


WEIGHTED: list[tuple[SFTWeightName, int]] = [("uniform", n) for n in (1, 2, 4)]
WEIGHTED += [(kind, n) for kind in ("dft", "low_entropy", "flow") for n in (1, 4)]  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("selection", [None, 0.5])
def test_the_entropy_bonus_is_the_mean_over_all_demonstration_tokens(
    make_trainer: MakeTrainer, tokenizer: Any, micro_batches: int, selection: float | None
) -> None:
    qs = questions(tokenizer)
    loader = PhaseLoader(qs, Schedule(rl_steps=0, sft_before=1, sft_batch=8))
    steps = Steps()
    chosen = [] if selection is None else [EntropyTokenSelection(fraction=selection)]
    trainer = make_trainer([*chosen, steps])
    module = make_module(sft=AdamWSettings(lr=0.0), entropy_bonus=0.25, micro_batches=micro_batches)
    trainer.fit(module, train_dataloaders=loader)
    policy = load_policy("embedded")
    scores = [by_hand(policy, q.prompt, q.demonstration or []) for q in qs]
    logp, entropy = (torch.cat([pair[i] for pair in scores]) for i in (0, 1))
    seen = entropy.topk(len(entropy) if selection is None else -(-len(entropy) // 2)).indices
    (-logp[seen].mean() - 0.25 * entropy.mean()).backward()
    expected = {f"policy.{n}": p.grad for n, p in policy.named_parameters() if p.grad is not None}
    (found,) = steps.raw
    assert norm({n: found[n] - expected[n] for n in expected}) < 1e-4 * norm(expected)


def test_an_entropy_bonus_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.sft_loss.entropy_bonus: -0.1 is not allowed; it must be at least 0"):
        make_module(entropy_bonus=-0.1)


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
@pytest.mark.parametrize(("kind", "micro_batches"), WEIGHTED)
def test_without_a_selection_the_gradient_is_that_of_the_mean_weighted_cross_entropy_over_tokens(
    make_trainer: MakeTrainer, tokenizer: Any, kind: SFTWeightName, micro_batches: int
) -> None:
    qs = questions(tokenizer)
    loader = PhaseLoader(qs, Schedule(rl_steps=0, sft_before=1, sft_batch=8))
    steps = Steps()
    trainer = make_trainer([steps])
    module = make_module(sft=AdamWSettings(lr=0.0), weight=kind, micro_batches=micro_batches)
    trainer.fit(module, train_dataloaders=loader)
    policy = load_policy("embedded")
    pairs = zip(weights_by_hand(kind, policy, qs), mean_losses(policy, qs), strict=True)
    torch.cat([weight * loss for weight, loss in pairs]).mean().backward()
    expected = {f"policy.{n}": p.grad for n, p in policy.named_parameters() if p.grad is not None}
    (found,) = steps.raw
    difference = {n: found[n] - expected[n] for n in expected}
    assert found.keys() == expected.keys()
    assert norm(difference) < 1e-4 * norm(expected)


@pytest.mark.parametrize("clip", [(1e-2, 3e-3), (2e-3, 0.0), (0.0, 2e-3)])
def test_a_gradient_is_clipped_to_its_phase_and_frozen_coordinates_do_not_count(
    make_trainer: MakeTrainer, clip: tuple[float, float]
) -> None:
    limits = dict(zip(("rl", "sft"), clip, strict=True))
    steps = Steps()
    rl, sft = AdamWSettings(lr=5e-4, clip=limits["rl"]), AdamWSettings(lr=1e-3, clip=limits["sft"])
    module = make_module(reward=Coin(), rl=rl, sft=sft, micro_batches=2)
    schedule = Schedule(rl_steps=4, prompts_per_step=8, sft_batch=4)
    trainer = make_trainer([*method_callbacks(size=8), steps])
    trainer.fit(module, datamodule=make_data(schedule=schedule))
    assert len(steps.phases) == len(steps.raw) == len(steps.clipped) == trainer.global_step
    assert {"rl", "sft"} == set(steps.phases)
    for phase, raw, clipped, masks in zip(steps.phases, steps.raw, steps.clipped, steps.masks, strict=True):
        assert bool(masks) == (phase == "sft")
        for name, mask in masks.items():
            assert mask.any()
            assert (raw[name][mask] == 0).all()
        before, limit = norm(raw), limits[phase]
        assert before > 2e-2
        assert norm(clipped) == pytest.approx(limit or before, rel=1e-4)
        for name in raw:
            torch.testing.assert_close(clipped[name], raw[name] * ((limit or before) / before), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("moments", ["reset", "shared"])
def test_learning_rates_and_settings_follow_the_steps_of_their_own_phase_kind(
    make_trainer: MakeTrainer, moments: str
) -> None:
    rl = AdamWSettings(lr=1e-4, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1, warmup_steps=100)
    sft = AdamWSettings(lr=1e-3, schedule="linear", decay_steps=50, min_ratio=0.5)
    steps = Steps()
    schedule = Schedule(rl_steps=4, prompts_per_step=8, sft_batch=4, epochs_per_rollout=2, sft_before=3, sft_after=2)
    trainer = make_trainer([method_callbacks(size=8)[3], steps])
    module = make_module(reward=Coin(), rl=rl, sft=sft, moments=moments, micro_batches=2)
    trainer.fit(module, datamodule=make_data(schedule=schedule))
    text = "".join(phase[0] for phase in steps.phases)
    assert text.startswith("sss" + "rr")
    assert text.endswith("ss")
    assert "rssr" in text
    rates: dict[str, list[float]] = {"rl": [], "sft": []}
    for phase, group in zip(steps.phases, steps.groups, strict=True):
        rates[phase].append(group["lr"])
        settings = {"rl": rl, "sft": sft}[phase]
        assert group["betas"] == settings.betas
        assert (group["eps"], group["weight_decay"]) == (settings.eps, settings.weight_decay)
    assert rates["rl"] == pytest.approx([1e-4 * (i + 1) / 100 for i in range(8)])
    assert rates["sft"] == pytest.approx([1e-3 * (1 - 0.5 * i / 50) for i in range(text.count("s"))])
