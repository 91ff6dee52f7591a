"""SDFT: the KL to a teacher that sees the demonstration, its gradient, its prompts, and what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from conftest import make_data, make_module
from lightning import Callback, Trainer
from question_rows import TOKENIZER, one, row
from rl_steps import Noting
from test_supervision import questions
from torch import Tensor, nn

from mifo_callbacks import EntropyTokenSelection
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import PhaseLoader
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.losses.distillation import SelfDistillation, fill_template, reverse_kl
from mifo_lightning.losses.sed import SED
from mifo_lightning.policy import token_scores
from mifo_lightning.policy.adapter import Adapter, add_adapters
from mifo_lightning.policy.head import LogitTransform
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.steps.optimizer import AdamWSettings
from mifo_lightning.steps.settings import PolicyLoss, SFTLoss
from mifo_lightning.steps.supervision import Supervision
from mifo_lightning.steps.teacher import Teacher

MakeTrainer = Callable[..., Trainer]
ON = SelfDistillation("{demonstration}{prompt}")


# --- the KL -----------------------------------------------------------------------------------------------------------


def test_the_kl_and_its_gradient_are_those_of_the_formula_in_fp64() -> None:
    torch.manual_seed(0)
    logits, teacher = (3 * torch.randn(5, 40, dtype=torch.float64) for _ in range(2))
    logits[0], teacher[1] = teacher[0], -700.0 * torch.arange(40)  # alike, and a teacher that is certain
    logits.requires_grad_()
    kl = reverse_kl(logits, teacher)
    p, q = logits.detach().softmax(-1), teacher.log_softmax(-1)
    expected = [sum(float(a * (a.log() - b)) for a, b in zip(*pair, strict=True)) for pair in zip(p, q, strict=True)]
    torch.testing.assert_close(kl.detach(), torch.tensor(expected, dtype=torch.float64))
    assert abs(float(kl[0].detach())) < 1e-12
    (found,) = torch.autograd.grad(kl.sum(), logits)
    torch.testing.assert_close(found, p * (p.log() - q - kl.detach()[:, None]))
    assert torch.autograd.gradcheck(lambda x: reverse_kl(x, teacher), logits)


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("way", ["whole", "chunks"])
def test_scores_with_a_teacher(
    monkeypatch: pytest.MonkeyPatch, way: Literal["whole", "chunks"], cap: float | None
) -> None:
    torch.manual_seed(0)
    head, transform, sizes = nn.Linear(8, 50), LogitTransform(2.0, 3.0, cap), []
    hidden, targets, shown = torch.randn(20, 8, requires_grad=True), torch.randint(50, (20,)), torch.randn(20, 8)
    if way == "chunks":
        monkeypatch.setattr(token_scores, "CHUNK_ELEMENTS", 3 * 50)
    without = token_scores.token_scores(head, hidden, targets, 0.7, transform=transform)
    head.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    logp, entropy, top, kl = token_scores.token_scores(head, hidden, targets, 0.7, transform=transform, teacher=shown)
    (kl * torch.arange(20)).sum().backward()
    found = [hidden.grad, head.weight.grad]
    assert max(sizes) <= (3 if way == "chunks" else 20)  # no more logits are ever made at once
    assert top.shape == (20, 0)
    for mine, other in zip((logp, entropy), without, strict=True):
        torch.testing.assert_close(mine, other)
    wide, states, seen = nn.Linear(8, 50).double(), hidden.detach().double().requires_grad_(), shown.double()
    wide.load_state_dict(head.state_dict())
    student, teacher = (transform(wide(2.0 * h)) / 0.7 for h in (states, seen))
    expected = reverse_kl(student, teacher)
    (expected * torch.arange(20)).sum().backward()
    torch.testing.assert_close(kl.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, other in zip(found, (states.grad, wide.weight.grad), strict=True):
        torch.testing.assert_close(mine.double(), other, atol=1e-4, rtol=1e-4)


def test_padding_and_company_do_not_matter(policy: Policy, tokenizer: Any) -> None:
    qs = taught(tokenizer)
    whole = Sequences.pack([q.prompt for q in qs], [q.demonstration or [] for q in qs], 0)
    teacher = Sequences.pack([q.teacher_prompt or [] for q in qs], [q.demonstration or [] for q in qs], 0)
    kl = policy(whole, teacher=policy.states(teacher).detach())[3].detach()
    assert (kl > -1e-5).all()
    assert float(kl.mean()) > 1
    for place in range(len(qs)):
        row = torch.tensor([place])
        alone = policy(whole.select(row), teacher=policy.states(teacher.select(row)).detach())[3][0].detach()
        torch.testing.assert_close(alone, kl[place, : len(alone)], atol=1e-5, rtol=1e-5)
        assert (kl[place, len(alone) :] == 0).all()
    same = policy(whole, teacher=policy.states(whole).detach())[3].detach()
    assert float(same.abs().max()) < 1e-5


# --- a step -----------------------------------------------------------------------------------------------------------


def taught(tokenizer: Any) -> list[Question]:
    """Questions with demonstrations that a teacher sees before the prompt."""
    return [replace(q, teacher_prompt=[*(q.demonstration or [])[:-1], *q.prompt]) for q in questions(tokenizer)]


class Step(Callback):
    """Gradient, log and work of the last optimizer step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.found = {n: p.grad.double().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.logged, self.work = dict(trainer.callback_metrics), outputs["work"]


def logits_after(policy: Policy, prompt: list[int], response: list[int]) -> Tensor:
    """[L, V] of a response, by a forward pass of its own."""
    logits: Tensor = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits


def one_step(
    make_trainer: MakeTrainer, qs: list[Question], *callbacks: Callback, **changes: Any
) -> tuple[Step, Noting]:
    """An SFT step of SDFT at learning rate 0, and what was drawn."""
    step, engine = Step(), Noting()
    module = make_module(sft=AdamWSettings(lr=0.0), engine=engine, distillation=ON, **changes)
    loader = PhaseLoader(qs, Schedule(rl_steps=0, sft_before=1, sft_batch=8))
    make_trainer([*callbacks, step]).fit(module, train_dataloaders=loader)
    return step, engine


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
@pytest.mark.parametrize("cut", [{}, {"micro_batches": 4}, {"micro_batch_tokens": 50}], ids=["one", "rows", "tokens"])
@pytest.mark.parametrize("selection", [1.0, 0.5])
def test_the_gradient_of_a_step_is_that_of_the_formula(
    make_trainer: MakeTrainer, tokenizer: Any, selection: float, cut: dict[str, int]
) -> None:
    qs = taught(tokenizer)
    chosen = [EntropyTokenSelection(fraction=selection)] if selection < 1 else []
    step, engine = one_step(make_trainer, qs, *chosen, **cut)
    ((prompts, drawn),) = engine.drawn
    assert sorted(prompts) == sorted(q.prompt for q in qs)
    policy = load_policy("embedded").double()
    terms, entropies, tokens = [], [], 0
    for prompt, (completion,) in zip(prompts, drawn, strict=True):
        q = next(q for q in qs if q.prompt == prompt)
        assert q.teacher_prompt is not None
        student = logits_after(policy, prompt, completion.tokens)
        teacher = logits_after(policy, q.teacher_prompt, completion.tokens).detach()
        p = student.log_softmax(-1)
        terms.append((p.exp() * (p - teacher.log_softmax(-1))).sum(-1))
        entropies.append(-(p.exp() * p).sum(-1).detach())
        tokens += len(q.teacher_prompt) + len(completion.tokens)
    kl, count = torch.cat(terms), math.ceil(selection * sum(map(len, terms)))
    loss = kl[torch.cat(entropies).topk(count).indices].mean()
    loss.backward()
    expected = {f"policy.{n}": p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert step.found.keys() == expected.keys()
    distance, size = (
        math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for gradients in ([step.found[n] - g for n, g in expected.items()], expected.values())
    )
    assert distance < 1e-4 * size
    assert float(step.logged["sft/loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    decoded = sum(len(prompt) + len(c.tokens) for prompt, (c,) in zip(prompts, drawn, strict=True))
    again = step.work["trained"] if selection < 1 and cut else 0  # scored once more for the threshold
    assert step.work["generated"] == decoded == step.work["trained"]
    assert step.work["scored"] == tokens + again


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
def test_every_step_draws_anew(make_trainer: MakeTrainer, tokenizer: Any) -> None:
    engine = Noting()
    module = make_module(sft=AdamWSettings(lr=0.0), engine=engine, distillation=ON)
    loader = PhaseLoader(taught(tokenizer), Schedule(rl_steps=0, sft_before=3, sft_batch=8))
    make_trainer().fit(module, train_dataloaders=loader)
    drawn = [sorted(c.tokens for (c,) in groups) for _, groups in engine.drawn]
    assert len(drawn) == 3
    assert drawn[0] != drawn[1] != drawn[2]


# --- the teacher's weights --------------------------------------------------------------------------------------------


class Watch(Callback):
    """Weights before each optimizer step and after the last, gradients, and which questions were asked."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.phases: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.phases.append(batch["phase"])
        self.weights.append({n: p.detach().clone() for n, p in pl_module.policy.named_parameters()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.double().clone() for n, p in pl_module.policy.named_parameters()})


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_teacher_follows_the_model_at_its_rate_through_phases_of_both_kinds(
    make_trainer: MakeTrainer, tokenizer: Any, rate: float
) -> None:
    qs, watch, engine = taught(tokenizer), Watch(), Noting()
    module = make_module(engine=engine, distillation=replace(ON, teacher_rate=rate), sft=AdamWSettings(lr=3e-3))
    schedule = Schedule(rl_steps=2, sft_before=2, sft_after=1, sft_batch=8, prompts_per_step=2)
    make_trainer([watch]).fit(module, train_dataloaders=PhaseLoader(qs, schedule))
    assert watch.phases == ["sft", "sft", "rl", "rl", "sft"]
    average = {n: w.clone() for n, w in watch.weights[0].items()}
    for after in watch.weights[1:]:
        average = {n: (1 - rate) * w + rate * after[n] for n, w in average.items()}
    policy, teacher = load_policy("embedded").double(), load_policy("embedded").double()
    policy.load_state_dict(watch.weights[-1], strict=False)
    teacher.load_state_dict(average, strict=False)
    moved = max(float((a - b).abs().max()) for a, b in zip(policy.parameters(), teacher.parameters(), strict=True))
    assert (moved == 0) == (rate == 1)
    terms = []
    for prompt, (completion,) in zip(*engine.drawn[-1], strict=True):
        shown = next(q for q in qs if q.prompt == prompt).teacher_prompt
        assert shown is not None
        p = logits_after(policy, prompt, completion.tokens).log_softmax(-1)
        q = logits_after(teacher, shown, completion.tokens).detach().log_softmax(-1)
        terms.append((p.exp() * (p - q)).sum(-1))
    torch.cat(terms).mean().backward()
    expected = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    found = watch.gradients[-1]
    distance, size = (
        math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for gradients in ([found[n] - g for n, g in expected.items()], expected.values())
    )
    assert distance < 1e-3 * size


def test_a_teacher_goes_on_with_the_run_that_it_began_with(policy: Policy, tokenizer: Any) -> None:
    apart, running = (Supervision(tokenizer, SFTLoss(distillation=replace(ON, teacher_rate=r))) for r in (0.5, 1.0))
    for each in (apart, running):
        each.measure(policy, [])
    states = apart.state_dict(), running.state_dict()
    assert states[1]["teacher"] == {}
    apart.load_state_dict(states[0], policy)
    for each, state in ((apart, states[1]), (running, states[0])):
        with pytest.raises(InputError, match=r"distillation.teacher_rate: .* is not allowed here; it must be"):
            each.load_state_dict(state, policy)
    with pytest.raises(InputError, match=r"distillation: null is not allowed here; the run began with a moving"):
        Supervision(tokenizer, SFTLoss()).load_state_dict(states[0], policy)
    before = {n: w.clone() for n, w in states[0]["teacher"].items()}
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.add_(1.0)
    assert apart.teacher is not None
    apart.teacher.follow(policy)
    assert all((w == before[n]).all() for n, w in states[0]["teacher"].items())  # a checkpoint is no part of the run


@pytest.mark.parametrize("adapter", [None, Adapter(4, 8.0)], ids=["weights", "adapters"])
def test_its_pass_leaves_the_model_as_it_was(policy: Policy, tokenizer: Any, adapter: Adapter | None) -> None:
    qs = taught(tokenizer)
    sequences = Sequences.pack([q.prompt for q in qs], [q.demonstration or [] for q in qs], 0)
    if adapter is not None:
        add_adapters(policy, adapter, seed=0)
    teacher = Teacher(rate=0.0)
    teacher.begin(policy)
    before = policy.logits(policy.states(sequences)).detach()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    moved = {n: p.detach().clone() for n, p in policy.named_parameters()}
    states, head = teacher.shown(policy, sequences)
    assert (head is None) == (adapter is not None)  # adapters leave the head as it is
    outputs = policy.logits(states) if head is None else head(states)
    torch.testing.assert_close(outputs, before)
    assert not torch.allclose(policy.logits(policy.states(sequences)), before, atol=0.1)
    assert all((p == moved[n]).all() for n, p in policy.named_parameters())


@pytest.mark.parametrize("where", ["on the way", "in its pass"])
def test_a_pass_that_fails_leaves_the_model_as_it_was(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    qs = taught(tokenizer)
    sequences = Sequences.pack([q.prompt for q in qs], [q.demonstration or [] for q in qs], 0)
    teacher = Teacher(rate=0.5)
    teacher.begin(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    moved = {n: p.detach().clone() for n, p in policy.named_parameters()}
    average = {n: w.clone() for n, w in teacher.weights.items()}
    if where == "in its pass":
        monkeypatch.setattr(policy, "states", fail)
    else:
        teacher.weights["gone"] = torch.zeros(1)  # the last to be exchanged, and in no policy
    with pytest.raises((MemoryError, AttributeError)):
        teacher.shown(policy, sequences)
    assert all((p == moved[n]).all() for n, p in policy.named_parameters())
    assert all((teacher.weights[n] == w).all() for n, w in average.items())


def test_weights_that_are_trained_from_later_on_or_no_more_do_not_matter(policy: Policy, tokenizer: Any) -> None:
    qs = taught(tokenizer)
    sequences = Sequences.pack([q.prompt for q in qs], [q.demonstration or [] for q in qs], 0)
    first, *_, last = policy.parameters()
    first.requires_grad_(False)
    teacher = Teacher(rate=0.0)
    teacher.begin(policy)
    before = policy.states(sequences).detach()
    first.requires_grad_(True)
    last.requires_grad_(False)
    with torch.no_grad():
        last.add_(1.0)
    teacher.follow(policy)
    torch.testing.assert_close(teacher.shown(policy, sequences).states, before)


# --- the teacher's prompt ---------------------------------------------------------------------------------------------


def test_the_demonstration_stands_in_the_last_message() -> None:
    teacher = "{prompt}\nSolved: {demonstration}\nYou?"
    question = one([row("2+2?", solution="so 4>4", system="Be brief.")], teacher=teacher, system_prompt="Think.")
    assert question.teacher_prompt is not None
    assert TOKENIZER.decode(question.teacher_prompt) == question.text.replace("2+2?", "2+2?\nSolved: so 4>4\nYou?")
    assert one([row("2+2?", system="Be brief.")], teacher=teacher).teacher_prompt is None
    assert one([row("2+2?", solution="so 4>4")]).teacher_prompt is None


def test_braces_in_texts_are_text() -> None:
    filled = fill_template("{demonstration}|{prompt}|{x}", "a{demonstration}", r"\boxed{4} {prompt}")
    assert filled == r"\boxed{4} {prompt}|a{demonstration}|{x}"


def test_data_makes_them_for_the_module_that_asks(make_trainer: MakeTrainer, tokenizer: Any) -> None:
    data = make_data()
    for template in (ON.template, "{demonstration}-{prompt}", None):
        module = make_module(distillation=None if template is None else SelfDistillation(template))
        make_trainer(max_steps=1).fit(module, datamodule=data)
        assert data.trainer is not None
        for q in data.train_dataloader().questions:
            found = None if q.teacher_prompt is None else tokenizer.decode(q.teacher_prompt)
            shown = tokenizer.decode((q.demonstration or [])[:-1])
            assert found == (template and template.format(demonstration=shown, prompt=q.text))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"distillation": SelfDistillation("{prompt}")},
            r"distillation.template: '{prompt}' is not allowed",
        ),
        (
            {"distillation": {"template": "x"}},
            "distillation: .* is not allowed; it must be a SelfDistillation",
        ),
        (
            {"distillation": replace(ON, teacher_rate=1.5)},
            r"distillation.teacher_rate: 1.5 is not allowed; it must be in \[0, 1\]",
        ),
        ({"distillation": ON, "weight": "dft"}, "weight: dft is not allowed; it must be uniform with distillation"),
        ({"distillation": ON, "sed": SED(1.0)}, "sed.strength: 1.0 is not allowed; it must be 0.0 with distillation"),
        ({"distillation": ON, "demonstrations": "own"}, "demonstrations: own is not allowed; it must be data with"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=f"model.sft_loss.{line}"):
        make_module(**changes)


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
def test_a_teacher_without_a_prompt_or_with_one_too_long_is_refused(make_trainer: MakeTrainer, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"model.sft_loss.distillation: a question has no prompt for the teacher"):
        one_step(make_trainer, questions(tokenizer))
    long = [replace(q, teacher_prompt=[2] * 51) for q in questions(tokenizer)]
    line = r"model.sft_loss.distillation.template: a prompt with a demonstration in it has 51 tokens, .* 65, .* has 64"
    with pytest.raises(InputError, match=line):
        one_step(make_trainer, long)


def test_an_entropy_bonus_and_a_kl_of_rl_go_on_beside_it(make_trainer: MakeTrainer, tokenizer: Any) -> None:
    qs = taught(tokenizer)
    with_bonus, _ = one_step(make_trainer, qs, entropy_bonus=0.5, loss=PolicyLoss(kl_coefficient=0.1))
    without, _ = one_step(make_trainer, qs)
    assert float(with_bonus.logged["sft/loss"]) == pytest.approx(float(without.logged["sft/loss"]), rel=1e-5)
    assert any(not torch.allclose(g, without.found[n]) for n, g in with_bonus.found.items())
