"""The phases of the shipped methods: their order and lengths, what SFT sees, what stands still, which moments stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, weights
from lightning import Callback, Trainer
from rl_steps import CONFIGS, Coin, Gradient, Noting, by_hand, configured, relative
from test_sft_losses import logits_of, naive_eaft, sums_by_hand
from torch import Tensor

from mifo_callbacks import BufferPhaseSwitch, EntropyTokenSelection, GradientFreezing, ImportanceEMA
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import PhaseLoader
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.losses.distillation import SelfDistillation
from mifo_lightning.losses.sed import SED
from mifo_lightning.module import MifoModule
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.steps.optimizer import AdamWSettings

MakeTrainer = Callable[..., Trainer]
GROUPS = {
    "entropy": EntropyTokenSelection,
    "importance": ImportanceEMA,
    "freeze": GradientFreezing,
    "buffer": BufferPhaseSwitch,
}
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
BUFFERED = [name for name in METHODS if "buffer" in configured(f"methods/{name}")]


def merged(name: str, *keys: str) -> dict[str, Any]:
    """A group of settings of the tiny base with the method over it."""
    layers = [configured("defaults"), configured("tiny"), configured(f"methods/{name}")]
    size = layers[0]["buffer_size"]
    for key in keys:
        layers = [layer.get(key) or {} for layer in layers]
    values = {key: value for layer in layers for key, value in layer.items()}
    return {key: size if value == "${...buffer_size}" else value for key, value in values.items()}


def loader(name: str, questions: int = 512, **changes: Any) -> PhaseLoader:
    """The loader of the method's shipped schedule."""
    schedule = Schedule(**{**merged(name, "data", "schedule"), **changes})
    return PhaseLoader([Question(i, "s", "", [1], "", [2]) for i in range(questions)], schedule)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_and_length_of_stages(name: str) -> None:
    plan = {"sft": "s" * 120, "sft_then_rl": "s" * 20 + "r" * 120, "rl_then_sft": "r" * 120 + "s" * 20}
    assert "".join(work["phase"][0] for work in loader(name)) == plan.get(name, "r" * 120)


@pytest.mark.parametrize("name", BUFFERED)
def test_a_buffer_triggered_phase(name: str) -> None:
    it = loader(name, rl_steps=1)
    next(it)
    it.push([{"id": i} for i in range(merged(name, "buffer")["size"])])
    phase = list(it)
    sizes = [len(work["questions"]) for work in phase]
    # ReLIFT: all 128 demonstrations in one optimizer step; the others: twice 128 in batches of 64
    assert sizes == ([128] if name == "relift" else [64] * 4)


def test_which_questions_relift_buffers_and_in_which_order_they_leave() -> None:
    buffer = BufferPhaseSwitch(**merged("relift", "buffer")).buffer
    groups = [{"id": n, "n_correct": n % 2, "size": 8, "has_demonstration": True} for n in range(6)]
    buffer.add(groups, 1)
    assert [entry["id"] for entry in buffer.take(2)] == [4, 2]
    assert [entry["id"] for entry in buffer.take(2)] == [0]


@pytest.mark.parametrize("name", [n for n in BUFFERED if n != "relift"])
def test_the_gate_of_the_buffer_and_the_order_of_the_others(name: str) -> None:
    buffer = BufferPhaseSwitch(**merged(name, "buffer")).buffer
    buffer.add([{"id": n, "n_correct": n, "size": 8, "has_demonstration": True} for n in range(9)], 1)
    expected = [0, 1, 2, 3, 4] if name in ("own_rollouts", "self_sft", "self_sft_refreshed") else [0, 1]
    assert [entry["id"] for entry in buffer.take(9)] == expected


class Watch(Callback):
    """Phase, questions, weights, gradient before masking, mask and step of the moments, of every optimizer step."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[Gradient] = []
        self.masks: list[dict[str, Tensor]] = []
        self.moments: list[int] = []
        self.questions: list[Question] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.questions = trainer.train_dataloader.questions

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.items.append(batch)
        self.weights.append(weights(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})
        freeze = next((c for c in trainer.callbacks if isinstance(c, GradientFreezing)), None)
        self.masks.append({n: m.clone() for n, m in freeze.masks.items()} if freeze else {})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.moments.append(int(next(iter(trainer.optimizers[0].state.values()))["step"]))

    @property
    def phases(self) -> str:
        return "".join(work["phase"][0] for work in self.items)


def run(name: str, make_trainer: MakeTrainer, **changes: Any) -> tuple[Watch, MifoModule]:
    """A short run of a method: phases of 8 demonstrations, batches of 4, otherwise as shipped."""
    watch, model = Watch(), configured(f"methods/{name}").get("model", {})
    over = configured(f"methods/{name}")
    small = {"size": 8, "max_accuracy": max(0.5, over.get("buffer", {}).get("max_accuracy", 0.5))}
    callbacks = [
        kind(**{**merged(name, key), **(small if key == "buffer" else {})})
        for key, kind in GROUPS.items()
        if key in over
    ]
    settings = {**model.get("optimizer", {}), **model.get("sft_loss", {})}
    if "sed" in settings:
        settings["sed"] = SED(**settings["sed"])
    if "distillation" in settings:
        settings["distillation"] = SelfDistillation(**settings["distillation"])
    for phase in ("rl", "sft"):
        settings[phase] = AdamWSettings(**merged(name, "model", "optimizer", phase))
    module = make_module(reward=Coin(), **settings, **changes)
    before, after = (min(3, over.get("data", {}).get("schedule", {}).get(k, 0)) for k in ("sft_before", "sft_after"))
    batch = 8 if name == "relift" else 4
    steps = 0 if name == "sft" else 5
    schedule = Schedule(rl_steps=steps, prompts_per_step=8, sft_batch=batch, sft_before=before, sft_after=after)
    make_trainer([watch, *callbacks]).fit(module, datamodule=make_data(schedule=schedule))
    watch.weights.append(weights(module))
    return watch, module


def sft_gradient(watch: Watch, step: int, share: float, bonus: float = 0.0) -> Gradient:
    """Gradient of -sum(M logp) / sum(M) - bonus mean(H), M the tokens of highest entropy, under the weights before."""
    policy = load_policy("embedded")
    policy.load_state_dict({n.removeprefix("policy."): w for n, w in watch.weights[step].items()}, strict=False)
    scores = [by_hand(policy, q.prompt, q.demonstration) for q in watch.items[step]["questions"]]
    logp, entropy = (torch.cat([pair[i] for pair in scores]) for i in (0, 1))
    chosen = entropy.topk(-(-len(logp) * round(100 * share) // 100)).indices
    (-logp[chosen].mean() - bonus * entropy.mean()).backward()
    return {f"policy.{n}": p.grad for n, p in policy.named_parameters() if p.grad is not None}


def importance(watch: Watch, alpha: float) -> dict[int, dict[str, Tensor]]:
    """C_j = alpha C_(j-1) + (1 - alpha) Delta_j^2 at the first step of every SFT phase, C_0 = Delta_0^2."""
    found, c, start = {}, {}, 0
    for i, phase in enumerate(watch.phases):
        if phase == "s" and watch.phases[i - 1] == "r":
            delta = {n: (w - watch.weights[start][n]).square() for n, w in watch.weights[i].items()}
            c = {n: alpha * c[n] + (1 - alpha) * d if c else d for n, d in delta.items()}
            found[i] = c
        elif phase == "r" and watch.phases[i - 1] == "s":
            start = i
    return found


# share of demonstration tokens, and alpha where there is freezing
SEEN: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("sft", "sft_then_rl", "rl_then_sft", "interleave"), (1.0, None)),
    "mifo_es": (0.2, None),
    "mifo_pf": (1.0, 0.5),
    "mifo": (0.2, 0.5),
    "mifo_dagger": (0.2, 0.0),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_an_sft_step_sees_and_what_stands_still(make_trainer: MakeTrainer, name: str) -> None:
    share, alpha = SEEN[name]
    watch, _ = run(name, make_trainer)
    steps = [i for i, phase in enumerate(watch.phases) if phase == "s"]
    assert len(steps) >= 3
    for i in steps:
        assert relative(watch.gradients[i], sft_gradient(watch, i, share)) < 1e-3
    if alpha is None:
        assert not any(watch.masks)
        return
    begins = importance(watch, alpha)
    assert len(begins) >= 2
    for i, c in begins.items():
        for n, mask in watch.masks[i].items():
            assert int(mask.sum()) == -(-mask.numel() // 2)
            assert c[n][mask].min() >= c[n][~mask].max() * (1 - 1e-4)
            for k in (i, i + 1):
                assert (watch.weights[k + 1][n] == watch.weights[k][n])[mask].all()
                assert (watch.weights[k + 1][n] != watch.weights[k][n]).any()
        assert watch.masks[i].keys() == c.keys()
    assert not any(watch.masks[i] for i, phase in enumerate(watch.phases) if phase == "r")


@pytest.mark.parametrize("name", ["relift", "interleave"])
def test_relift_keeps_the_moments_of_its_sft_steps(make_trainer: MakeTrainer, name: str) -> None:
    watch, _ = run(name, make_trainer)
    counted = [count for count, phase in zip(watch.moments, watch.phases, strict=True) if phase == "s"]
    assert len(counted) >= 2
    if name == "relift":  # one step a phase
        assert "ss" not in watch.phases
        assert counted == list(range(1, len(counted) + 1))
    else:
        assert counted == [1, 2] * (len(counted) // 2)
    in_rl = [count for count, phase in zip(watch.moments, watch.phases, strict=True) if phase == "r"]
    assert in_rl == list(range(1, 6))


def test_relift_takes_a_thousandth_of_the_entropy_off_its_sft_loss(make_trainer: MakeTrainer) -> None:
    watch, _ = run("relift", make_trainer)
    steps = [i for i, phase in enumerate(watch.phases) if phase == "s"]
    assert len(steps) >= 2
    for i in steps:
        assert relative(watch.gradients[i], sft_gradient(watch, i, 1.0, bonus=0.001)) < 2e-5
        assert relative(watch.gradients[i], sft_gradient(watch, i, 1.0)) > 5e-5


def loss_of_a_token(name: str, watch: Watch) -> Callable[[Question, Tensor, Tensor], Tensor]:
    """The loss of a token of a question by its probability and logits; what is from before training is of the base."""
    base, (k, r, strength) = load_policy("embedded"), (2, 0.7, 1.0)
    if name == "interleave_flow":
        means = {q.id: -by_hand(base, q.prompt, q.demonstration)[0].detach().mean() for q in watch.questions}
        middle = torch.stack(list(means.values())).quantile(0.5)
    if name == "interleave_sed":
        sums = sorted(sums_by_hand(base, watch.questions, k))
        tau = sums[-int(r * len(sums))]

    def loss(q: Question, p: Tensor, logits: Tensor) -> Tensor:
        if name == "interleave_sed":
            is_open = logits.softmax(-1).topk(k).values.sum() < tau
            return -p.log() + strength * is_open * (p - 0.5) ** 2
        if name == "interleave_flow":
            return -(-means[q.id] / middle).exp() * p.log()
        return -p.log() * (p.detach() if name == "interleave_dft" else naive_eaft(logits.detach(), 1.0))

    return loss


@pytest.mark.parametrize("name", [name for name in BUFFERED if name.startswith("interleave_")])
def test_the_loss_of_interleaved_phases(make_trainer: MakeTrainer, name: str) -> None:
    watch, _ = run(name, make_trainer)
    loss, steps = loss_of_a_token(name, watch), [i for i, phase in enumerate(watch.phases) if phase == "s"]
    assert len(steps) >= 3
    assert len(watch.questions) == 64
    for i in steps:
        policy = load_policy("embedded")
        policy.load_state_dict({n.removeprefix("policy."): w for n, w in watch.weights[i].items()}, strict=False)
        terms = [
            loss(q, logits.softmax(-1)[target], logits)
            for q in watch.items[i]["questions"]
            for target, logits in zip(q.demonstration, logits_of(policy, q), strict=True)
        ]
        torch.stack(terms).mean().backward()
        expected = {f"policy.{n}": p.grad for n, p in policy.named_parameters() if p.grad is not None}
        assert relative(watch.gradients[i], expected) < 1e-3
        assert relative(watch.gradients[i], sft_gradient(watch, i, 1.0)) > 1e-2


@pytest.mark.parametrize(
    ("name", "clip"),
    [("relift", {"rl": 0.7, "sft": 1.0}), ("luffy", {"rl": 1.0})],
)
def test_the_optimizers_of_published_methods(name: str, clip: dict[str, float]) -> None:
    for phase, largest in clip.items():
        settings = AdamWSettings(**merged(name, "model", "optimizer", phase))
        assert (tuple(settings.betas), settings.weight_decay, settings.clip) == ((0.9, 0.999), 0.01, largest)


def test_own_rollouts_are_learned_from_the_first_correct_one(make_trainer: MakeTrainer, tokenizer: Any) -> None:
    engine = Noting()
    watch, _ = run("own_rollouts", make_trainer, engine=engine)
    pairs = [(prompt, group) for prompts, groups in engine.drawn for prompt, group in zip(prompts, groups, strict=True)]
    first: dict[tuple[int, ...], list[int]] = {}
    for prompt, group in pairs:
        texts = tokenizer.batch_decode([c.tokens for c in group], skip_special_tokens=True)
        right = [c.tokens for c, r in zip(group, Coin()(texts, [""] * 4), strict=True) if r and c.finished]
        if 1 <= len(right) <= 2:
            assert tuple(prompt) not in first
            first[tuple(prompt)] = right[0]
    shown = [q for work in watch.items if work["phase"] == "sft" for q in work["questions"]]
    assert len(shown) >= 16
    for q in shown:
        assert q.demonstration == first[tuple(q.prompt)]
        assert q.answer_start is None
    for i in (i for i, phase in enumerate(watch.phases) if phase == "s"):
        assert relative(watch.gradients[i], sft_gradient(watch, i, 1.0)) < 1e-3
