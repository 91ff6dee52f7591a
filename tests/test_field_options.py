"""Standard options of RL for language models, by the formulas of TRL 1.16 and of verl."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks, weights
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rl_steps import by_hand, evaluate, groups_of, item, moved, prepare, questions, reinforcement
from torch import Tensor

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.losses import advantages
from mifo_lightning.losses.advantages import BatchStd
from mifo_lightning.losses.surrogates import Clipped
from mifo_lightning.methods import HPT, Luffy
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.settings import Rollout
from mifo_lightning.steps.optimizer import AdamWSettings, OptimizerSettings
from mifo_lightning.steps.settings import PolicyLoss, SFTLoss, check_rl

MakeTrainer = Callable[..., Trainer]
R = torch.tensor([[0.5, 1.1, 2.5, 6.0]])
FULL = torch.ones(1, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("advantage", "losses", "gradient", "share"),
    [
        # verl: max(-A r, -A clip(r)), where A < 0 at most -A 3; TRL with delta 3: -min(min(r, 3) A, clip(r) A)
        (-1.0, [0.8, 1.1, 2.5, 3.0], [0.0, 1.1, 2.5, 0.0], 0.5),
        (1.0, [-0.5, -1.1, -1.2, -1.2], [-0.5, -1.1, 0.0, 0.0], 0.5),
    ],
)
def test_dual_clip(advantage: float, losses: list[float], gradient: list[float], share: float) -> None:
    rl = reinforcement(None, settings=PolicyLoss(clip_dual=3.0))
    old = torch.full((1, 4), -2.0)
    loss, grad, metrics = evaluate(rl, old + R.log(), old, FULL, torch.tensor([advantage]), 4, logp_old=old)
    assert loss.item() == pytest.approx(sum(losses) / 4, rel=1e-5)
    torch.testing.assert_close(grad, torch.tensor([gradient]) / 4)
    assert metrics["clip_share"].item() == pytest.approx(share)


def test_without_dual_clip_a_bad_response_pushes_however_likely_it_has_become() -> None:
    objective, _ = Clipped()(R.log(), R, torch.tensor([[-1.0]]))
    assert objective[0, -1] == -6.0


LN2 = math.log(2)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"), [("k1", LN2, 1.0), ("k2", LN2**2 / 2, LN2), ("k3", LN2 - 0.5, 0.5)]
)
def test_kl_estimators_in_the_loss(estimator: Any, value: float, slope: float) -> None:
    """verl's kl_penalty "kl", "mse" and "low_var_kl" of p = .6, p_ref = .3 at one of four tokens."""
    rl = reinforcement(None, settings=PolicyLoss(kl_coefficient=0.5, kl_estimator=estimator))
    now, then = torch.tensor([[0.6, 0.5, 0.5, 0.5]]).log(), torch.tensor([[0.3, 0.5, 0.5, 0.5]]).log()
    loss, grad, metrics = evaluate(rl, now, now, FULL, torch.zeros(1), 4, logp_old=now, logp_ref=then)
    assert metrics["kl_ref"].item() == pytest.approx(value / 4, rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * value / 4, rel=1e-5)
    expected = [slope, *([1.0] * 3 if estimator == "k1" else [0.0] * 3)]  # that of k1 knows no distance
    torch.testing.assert_close(grad, 0.5 * torch.tensor([expected]) / 4, atol=1e-7, rtol=1e-5)


TEXTS = ["1>7<eos>", "22>7<eos>", "3>4<eos>", "5>6<eos>", *["12>7<eos>", "1>7<eos>", "7<eos>", ">7<eos>"]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward(policy: Policy, tokenizer: Any, estimator: Any) -> None:
    """verl: token rewards less kl_coef times the KL of each, summed over the response, then GRPO of that."""
    settings = PolicyLoss(kl_coefficient=0.3, kl_estimator=estimator, kl_in_reward=True)
    rl, qs = reinforcement(tokenizer, settings=settings), questions(tokenizer)[:2]
    rl.set_reference(load_policy("embedded"))
    moved(policy)
    graded = rl.grade(qs, groups_of(tokenizer, *TEXTS))
    before = graded.rewards.clone()
    batch = prepare(rl, policy, item(qs, updates=2), graded)
    kl = {
        "k1": lambda d: -d,
        "k2": lambda d: d**2 / 2,
        "k3": lambda d: d.exp() - d - 1,
    }[estimator]
    with torch.no_grad():
        pairs = [(q.prompt, c.tokens) for q, group in zip(qs, graded.completions, strict=True) for c in group]
        sums = [float(kl(by_hand(rl.references[0], *x)[0] - by_hand(policy, *x)[0]).sum()) for x in pairs]
    charged = before - 0.3 * torch.tensor(sums).view(2, 4)
    expected = (charged - charged.mean(-1, keepdim=True)) / (charged.std(-1, keepdim=True) + 1e-6)
    assert batch.advantages is not None
    torch.testing.assert_close(batch.advantages, expected.flatten(), atol=2e-3, rtol=2e-3)
    assert torch.equal(before[1], torch.ones(4))  # a group of equal rewards is told apart by the KL alone
    assert batch.active.all()
    assert torch.equal(graded.rewards, before)  # the buffer and the log see the task's own
    assert (batch.kl, batch.logp_ref) == (None, None)
    assert rl.describe(graded, batch, 1.0)["kl_penalty"] == pytest.approx(0.3 * sum(sums) / 8, rel=1e-3)
    assert rl.work(graded, batch)["scored"] == 3 * batch.sequences.token_count()


REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.2, 0.8, 0.2, 0.8]])
STD = math.sqrt((2.36 - 8 * 0.375**2) / 7)  # of all eight


def test_batch_std() -> None:
    """TRL with scale_rewards "batch": (R - mean of the group) / (std of the whole batch + 1e-4)."""
    centred = torch.tensor([[0.75, -0.25, -0.25, -0.25], [-0.3, 0.3, -0.3, 0.3]])
    torch.testing.assert_close(BatchStd().within(REWARDS)(REWARDS), centred / (STD + 1e-4))


def test_batch_std_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advantages, "gather_ranks", lambda mine: [mine, REWARDS[1].tolist()])
    first = BatchStd().within(REWARDS[:1])(REWARDS[:1])
    assert torch.equal(first, BatchStd().within(REWARDS[:1])(REWARDS)[:1])
    torch.testing.assert_close(first[0, 0], torch.tensor(0.75 / (STD + 1e-4)))


def test_batch_std_of_a_step_is_over_the_groups_that_train(policy: Policy, tokenizer: Any) -> None:
    texts = ["1>7<eos>", "22>7<eos>", "3>4<eos>", "5>6<eos>", *["7<eos>"] * 4]
    for dynamic, std in ((0, torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 1]).std()), (1, torch.tensor([1.0, 1, 0, 0]).std())):
        settings = PolicyLoss(advantage="batch_std", dynamic_sampling=dynamic)
        rl, qs = reinforcement(tokenizer, settings=settings), questions(tokenizer)[:2]
        batch = prepare(rl, policy, item(qs), rl.grade(qs, groups_of(tokenizer, *texts)))
        assert batch.advantages is not None
        torch.testing.assert_close(batch.advantages[0], 0.5 / (std + 1e-4))
        assert (batch.advantages[4:] == 0).all()


class Follow(Callback):
    """The reference by TRL's callback: after so many steps ref.mul_(1 - alpha).add_(policy, alpha=alpha)."""

    def __init__(self, every: int, alpha: float) -> None:
        self.every, self.alpha, self.steps, self.syncs = every, alpha, 0, 0
        self.reference = {n: p.detach().clone() for n, p in load_policy("embedded").named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch["phase"] == "rl":
            self.steps += 1
            if self.steps % self.every == 0:
                self.syncs += 1
                for name, p in pl_module.policy.named_parameters():
                    self.reference[name].mul_(1 - self.alpha).add_(p.detach(), alpha=self.alpha)


def reference_of(module: Any) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in module.reinforcement.references[0].named_parameters()}


def test_the_reference_follows_the_policy_and_survives_a_resume(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    loss = PolicyLoss(kl_coefficient=0.5, reference_sync_steps=3, reference_mixup=0.6)
    schedule = Schedule(rl_steps=4, prompts_per_step=4, sft_batch=4, epochs_per_rollout=2)

    def fit(*callbacks: Callback, ckpt: Path | None = None) -> Any:
        module = make_module(loss=loss, rl=AdamWSettings(lr=2e-3))
        trainer = make_trainer([*method_callbacks(size=4), *callbacks], enable_checkpointing=ckpt is None)
        trainer.fit(module, make_data(schedule=schedule), ckpt_path=ckpt)
        return module

    follow = Follow(3, 0.6)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(follow, saver)
    assert (follow.steps, follow.syncs) == (8, 2)
    found, initial = reference_of(whole), dict(load_policy("embedded").named_parameters())
    assert all(torch.equal(found[name], value) for name, value in follow.reference.items())
    assert any(not torch.equal(found[name], value) for name, value in initial.items())
    states = {int(path.stem.partition("=")[2]): path for path in tmp_path.glob("step=*.ckpt")}
    assert max(states) > follow.steps  # SFT's steps are not counted
    resumed = fit(ckpt=states[max(states) - 4])
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert all(torch.equal(value, found[name]) for name, value in reference_of(resumed).items())


@pytest.mark.parametrize(
    ("changes", "mixing", "line"),
    [
        ({"clip_dual": 1.2}, None, "clip_dual: 1.2 is not allowed; it must be above 1 + clip_high, or null"),
        ({"clip_dual": 0.0}, None, "clip_dual: 0.0 "),
        ({"clip_dual": 3.0, "surrogate": "reinforce"}, None, "clip_dual: 3.0 is not allowed; it must be null unless "),
        ({"kl_estimator": "k4"}, None, "kl_estimator: k4 is not allowed; it must be k1, k2 or k3"),
        (
            {"aggregation": "tokens"},
            None,
            "aggregation: tokens is not allowed; it must be sequence, token, constant or s",
        ),
        ({"ratio": "seq"}, None, "ratio: seq is not allowed; it must be token or sequence"),
        ({"kl_in_reward": True}, None, "kl_in_reward: True is not allowed; it must be false unless kl_coefficient "),
        ({"reference_sync_steps": -1}, None, "reference_sync_steps: -1 is not allowed; it must be at least 0"),
        ({"reference_sync_steps": 2}, None, "reference_sync_steps: 2 is not allowed; it must be 0 unless kl_coeffic"),
        ({"reference_mixup": 0.0}, None, "reference_mixup: 0.0 is not allowed; it must be in (0, 1]"),
        ({"kl_in_reward": True, "kl_coefficient": 0.1}, HPT(), "kl_in_reward: True is not allowed with model.mixing"),
        ({"advantage": "batch_std"}, Luffy(), "advantage: batch_std is not allowed with demonstrations in groups"),
    ],
)
def test_what_is_impossible_is_one_line(changes: dict[str, Any], mixing: Any, line: str) -> None:
    with pytest.raises(InputError) as refused:
        check_rl(Rollout(), PolicyLoss(**changes), mixing)
    assert str(refused.value).startswith(f"model.loss.{line}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (SFTLoss(demonstrations="initail"), "demonstrations: initail is not allowed; it must be data, own, initial or"),  # type: ignore[arg-type]
        (OptimizerSettings(moments="kept"), "moments: kept is not allowed; it must be reset, keep or shared"),  # type: ignore[arg-type]
        (AdamWSettings(schedule="Linear", decay_steps=9), "schedule: Linear is not allowed; it must be constant, li"),  # type: ignore[arg-type]
        (Schedule(final_sft="dropped"), "final_sft: dropped is not allowed; it must be keep or drop"),  # type: ignore[arg-type]
    ],
)
def test_a_name_that_is_none_is_refused_from_python_too(settings: Any, line: str) -> None:
    """The command line knows the types; a program may be mistaken, and would train something else without a word."""
    with pytest.raises(InputError) as refused:
        settings.check("key")
    assert str(refused.value).startswith(f"key.{line}")
    with pytest.raises(InputError, match=r"export\.dtype: bfloat16 is not allowed; it must be loaded or float32"):
        ExportModel(dtype="bfloat16")  # type: ignore[arg-type]
