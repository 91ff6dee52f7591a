"""MifoModule on the embedded task: gradients, phases, frozen weights, exact resume, outputs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks, weights
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from rl_steps import Coin, rollout_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from mifo_callbacks import GradientFreezing
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.losses.advantages import GroupStd
from mifo_lightning.losses.distillation import SelfDistillation
from mifo_lightning.losses.sed import SED
from mifo_lightning.methods import HPT, SRFT, Chord
from mifo_lightning.module import MifoModule
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.rollout.graded import Graded
from mifo_lightning.steps.guards import check_chunks
from mifo_lightning.steps.optimizer import AdamWSettings, OptimizerSettings
from mifo_lightning.steps.settings import PolicyLoss

MakeTrainer = Callable[..., Trainer]


class Watch(Callback):
    """Records phase, gradient (before clipping) and weights of every optimizer step."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.phases.append(batch["phase"])
        self.weights.append(weights(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"loss": PolicyLoss(kl_coefficient=0.1)},
    "entropy mask": {"loss": PolicyLoss(entropy_fraction=0.2)},
    "mixed": {
        "loss": PolicyLoss(kl_coefficient=0.1, entropy_bonus=0.1, aggregation="token"),
        "mixing": SRFT(),
        "weight": "flow",
    },
    "dynamic sampling": {"loss": PolicyLoss(dynamic_sampling=3), "weight": "dft"},
    "the largest probabilities": {"mixing": Chord(0.5, token_weight="eaft"), "weight": "eaft", "sed": SED(4.0)},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_of_chunks_add_up_to_those_of_one_batch(make_trainer: MakeTrainer, setting: str) -> None:
    runs: list[Watch] = []
    for cut in ({}, {"micro_batches": 3}, {"micro_batch_tokens": 100}):
        runs.append(Watch())
        # learning rate 0 in both phases: each step's gradient is of the same weights
        still = AdamWSettings(lr=0.0)
        module = make_module(rl=still, sft=still, **cut, **SETTINGS[setting])
        schedule = Schedule(rl_steps=2, prompts_per_step=8, sft_batch=8, epochs_per_rollout=2)
        callbacks = [runs[-1], *method_callbacks(size=8)[:1], method_callbacks(size=8)[3]]
        make_trainer(callbacks).fit(module, datamodule=make_data(schedule=schedule))
    whole, *others = runs
    scales: dict[str, list[float]] = {"rl": [], "sft": []}
    for parts in others:
        assert whole.phases == parts.phases
        for phase, a, b in zip(whole.phases, whole.gradients, parts.gradients, strict=True):
            scale = max(float(g.abs().max()) for g in a.values())
            scales[phase].append(scale)
            for name in a:
                torch.testing.assert_close(b[name], a[name], atol=2e-5 * scale, rtol=1e-3)
    assert all(max(found) > 0 for found in scales.values())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_gradient_that_is_left_from_elsewhere_does_not_count(make_trainer: MakeTrainer, micro_batches: int) -> None:
    class Stain(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            for p in pl_module.parameters():
                p.grad = torch.ones_like(p)

    found = []
    for callbacks in ([], [Stain()]):
        watch = Watch()
        module = make_module(reward=Coin(), micro_batches=micro_batches)
        make_trainer([*callbacks, watch], max_steps=2).fit(module, datamodule=make_data())
        found.append(watch.gradients)
    for clean, stained in zip(*found, strict=True):
        assert all(torch.equal(clean[name], stained[name]) for name in clean)


class Passes(Callback):
    """Counts the forward passes of the first layer's MLP while training."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.policy.model.model.layers[0].mlp.register_forward_pre_hook(self.note)

    def note(self, *arguments: Any) -> None:
        self.count += 1


def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient(make_trainer: MakeTrainer) -> None:
    runs, counts = [], []
    for checkpointing in (False, True):
        watch, passes = Watch(), Passes()
        module = make_module(gradient_checkpointing=checkpointing)
        make_trainer([watch, passes, *method_callbacks()], max_steps=4).fit(module, datamodule=make_data())
        runs.append(watch.gradients)
        counts.append(passes.count)
    assert counts[1] == counts[0] + 4  # one more in each backward pass
    for plain, saved in zip(*runs, strict=True):
        for name in plain:
            torch.testing.assert_close(saved[name], plain[name])


# one of each kind of moments in bf16: they are of fp32 there too, as is seen below, so the others would be the same
@pytest.mark.parametrize(
    ("moments", "precision"),
    [("reset", "32-true"), ("keep", "32-true"), ("shared", "32-true"), ("keep", "bf16-mixed")],
)
def test_frozen_coordinates_stand_still_and_the_rest_moves(
    make_trainer: MakeTrainer, precision: str, moments: Any
) -> None:
    class Masks(Watch):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            frozen = next(c for c in trainer.callbacks if isinstance(c, GradientFreezing))
            self.masks.append({n: m.clone() for n, m in frozen.masks.items()})

        masks: list[dict[str, torch.Tensor]]

    watch = Masks()
    watch.masks = []
    module = make_module(
        rl=AdamWSettings(lr=5e-4, weight_decay=0.1), sft=AdamWSettings(lr=1e-3, weight_decay=0.1), moments=moments
    )
    schedule = Schedule(rl_steps=5, prompts_per_step=8, sft_batch=4)
    trainer = make_trainer([*method_callbacks(size=8), watch], precision=precision)
    trainer.fit(module, datamodule=make_data(schedule=schedule))
    watch.weights.append(weights(module))
    assert watch.phases.count("sft") >= 4
    state = [value for kept in trainer.optimizers[0].state.values() for value in kept.values()]
    assert {value.dtype for value in (*state, *watch.weights[-1].values())} == {torch.float32}
    for i, phase in enumerate(watch.phases):
        before, after, masks = watch.weights[i], watch.weights[i + 1], watch.masks[i]
        assert bool(masks) == (phase == "sft")
        for name in before:
            moved = before[name] != after[name]
            if masks:
                assert not moved[masks[name]].any()
                assert moved[~masks[name]].float().mean() > 0.5
            else:
                assert moved.float().mean() > 0.5


class SaveAll(ModelCheckpoint):
    """A checkpoint after every optimizer step."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=False)


EVERYWHERE = ("mifo, two passes", "self-sft, drawn anew")
PASSES, MINIBATCHES = {"epochs_per_rollout": 2}, {"minibatches": 2}
RESUMES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "mifo, two passes": ({"loss": PolicyLoss(kl_coefficient=0.05, entropy_fraction=0.5)}, PASSES),
    "keep moments, minibatches": ({"moments": "keep"}, MINIBATCHES),
    "demonstrations inside a pass": (
        {"mixing": Chord(0.9, 0.1, 3), "loss": PolicyLoss(entropy_bonus=0.1)},
        {**PASSES, "rl_steps": 2},
    ),
    "a sum, failed questions, bonuses": (
        {
            "mixing": HPT(),
            "loss": PolicyLoss("group_mean", "unclipped", aggregation="sum", entropy_bonus=0.1),
            "entropy_bonus": 0.1,
        },
        {**PASSES, "rl_steps": 2},
    ),
    "own rollouts": ({"demonstrations": "own", "reward": Coin()}, {"rl_steps": 3}),
    "self-sft": ({"demonstrations": "initial", "reward": Coin()}, {"rl_steps": 3}),
    "self-sft, drawn anew": ({"demonstrations": "refreshed", "attempts": 4, "reward": Coin()}, {"rl_steps": 4}),
    "sdft": ({"distillation": SelfDistillation(teacher_rate=0.5)}, {"rl_steps": 3}),
    "dynamic sampling, flow": ({"loss": PolicyLoss(dynamic_sampling=2), "weight": "flow"}, {"rl_steps": 3}),
    "eaft, sed": ({"weight": "eaft", "sed": SED(4.0)}, {"rl_steps": 3}),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_ends_with_the_same_bits(make_trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    changes, plan = RESUMES[name]
    data = {"schedule": Schedule(**{"rl_steps": 4, "prompts_per_step": 4, "sft_batch": 4, **plan})}
    watch = Watch()
    module = make_module(micro_batches=2, **changes)
    trainer = make_trainer([*method_callbacks(), watch, SaveAll(tmp_path)], enable_checkpointing=True)
    trainer.fit(module, datamodule=make_data(**data))
    end, steps = weights(module), trainer.global_step
    assert watch.phases.count("sft") >= 2
    # what the others keep besides was drawn at the first RL step, belongs to an SFT phase, or waits in RL for the next
    inside_sft = watch.phases.index("sft") + 1
    after_sft = watch.phases.index("rl", inside_sft) if "rl" in watch.phases[inside_sft:] else inside_sft
    assert watch.phases[inside_sft] == "sft"
    for step in range(1, steps) if name in EVERYWHERE else sorted({1, inside_sft, min(after_sft + 1, steps - 1)}):
        resumed = make_module(micro_batches=2, **changes)
        torch.manual_seed(step)  # no random state may matter
        make_trainer(method_callbacks()).fit(
            resumed, datamodule=make_data(**data), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True
        )
        for key, value in weights(resumed).items():
            assert (value == end[key]).all(), (step, watch.phases[step - 1 : step + 1], key)


def test_a_phase_begins_when_the_buffer_is_full_and_rl_goes_on(make_trainer: MakeTrainer) -> None:
    watch = Watch()
    make_trainer([*method_callbacks(size=8), watch]).fit(make_module(), datamodule=make_data())
    text = "".join(phase[0] for phase in watch.phases)
    assert text.startswith("rr")
    assert "ss" in text
    assert text.count("r") == 6
    assert text.endswith(("r", "ss"))


def test_demonstrations_alone_teach_them(make_trainer: MakeTrainer) -> None:
    schedule = Schedule(rl_steps=0, sft_before=50, sft_batch=32)
    train = Skills(["addition", "mirrored"], 1024)
    module, data = make_module(), make_data(train=train, schedule=schedule, holdout=64)
    trainer = make_trainer(limit_val_batches=1.0)
    before = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, datamodule=data)
    after = trainer.validate(module, data, verbose=False)[0]
    key = "val/mirrored-holdout/demonstration_loss"
    assert after[key] < 0.5 * before[key]


def test_rollouts_without_signal_change_nothing_but_momentum(make_trainer: MakeTrainer) -> None:
    watch = Watch()
    module = make_module()
    module.reinforcement.grade = lambda qs, drawn: Graded(  # type: ignore[method-assign]
        qs, drawn, torch.ones(len(qs), 4), 1.0, texts=[[""] * 4] * len(qs)
    )
    make_trainer([watch]).fit(module, datamodule=make_data())
    assert all((g == 0).all() for gradient in watch.gradients for g in gradient.values())


def test_chunks_share_the_rows_with_signal_and_idle_ones_give_none() -> None:
    advantages = GroupStd()(torch.tensor([[1.0, 0, 0, 0], [0.0] * 4, [1.0] * 4])).flatten()
    rollout = rollout_of(PolicyLoss(), torch.ones(12, 2, dtype=torch.bool), advantages, 14)
    rollout.active = advantages != 0
    parts = [(part, part.rl.weight) for part in rollout.chunks(0, 6) if part.rl is not None]
    assert len(parts) == 6
    assert all(len(weight) for _, weight in parts)
    busy = [part for part, weight in parts if weight.any()]
    assert torch.cat([p.question for p in busy]).tolist() == [0, 1, 2, 3]
    assert torch.cat([p.advantages for p in busy if p.advantages is not None]).tolist() == advantages[:4].tolist()
    for _, weight in parts:
        torch.testing.assert_close(weight, torch.full_like(weight, float(weight.any()) / 24))


def test_the_exported_model_is_the_trained_one(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = make_module()
    make_trainer([ExportModel(str(tmp_path / "model"))]).fit(module, datamodule=make_data())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.get_vocab() == module.tokenizer.get_vocab()
    assert module.policy is not None
    for (name, a), b in zip(module.policy.model.named_parameters(), loaded.parameters(), strict=True):
        assert (a == b).all(), name
    tokens = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded(tokens).logits, module.policy.model.eval()(tokens).logits)


def test_clipping_twice_and_half_precision_weights_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(InputError, match=r"trainer.gradient_clip_val: 0.5"):
        make_trainer(gradient_clip_val=0.5).fit(make_module(), datamodule=make_data())
    with pytest.raises(InputError, match=r"trainer.precision: bf16-true"):
        make_trainer(precision="bf16-true").fit(make_module(), datamodule=make_data())


class SaveAt(Callback):
    """A checkpoint from a hook inside the optimizer step number `step`."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step, self.path = step, path
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")


def test_a_checkpoint_from_inside_a_step_is_that_of_its_beginning(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Also inside the last update of a rollout, which is still needed then; and writing one changes nothing."""

    def fit(*callbacks: Callback, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
        module, schedule = make_module(reward=Coin()), Schedule(rl_steps=2, prompts_per_step=4, epochs_per_rollout=2)
        make_trainer([*callbacks]).fit(module, datamodule=make_data(schedule=schedule), ckpt_path=ckpt)
        return weights(module)

    undisturbed = fit()
    paths = {(hook, step): tmp_path / f"{hook}-{step}.ckpt" for hook in HOOKS for step in (0, 1)}
    assert_same(fit(*(SaveAt(hook, step, path) for (hook, step), path in paths.items())), undisturbed)
    for path in paths.values():
        assert_same(fit(ckpt=path), undisturbed)


def assert_same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []


def test_what_would_step_otherwise_than_the_module_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(InputError, match=r"accumulate_grad_batches: 2 .* model.optimizer.micro_batches"):
        make_trainer([GradientAccumulationScheduler({0: 2})]).fit(make_module(), datamodule=make_data())
    trainer: Any = SimpleNamespace(strategy=DDPStrategy(static_graph=True))
    check_chunks(trainer, OptimizerSettings())
    with pytest.raises(InputError, match=r"model.optimizer.micro_batches: 2 is not allowed with .*static_graph"):
        check_chunks(trainer, OptimizerSettings(micro_batches=2))
    with pytest.raises(InputError, match=r"model.optimizer.micro_batch_tokens: 9 is not allowed with .*static_graph"):
        check_chunks(trainer, OptimizerSettings(micro_batch_tokens=9))


def test_lightnings_own_accumulation_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(InputError, match=r"accumulate_grad_batches: 2 .* model.optimizer.micro_batches"):
        make_trainer(accumulate_grad_batches=2).fit(make_module(), datamodule=make_data())
    with pytest.raises(InputError, match=r"model.optimizer.micro_batches: 0"):
        make_module(micro_batches=0)
    with pytest.raises(InputError, match=r"model.optimizer.micro_batch_tokens: 0"):
        make_module(micro_batch_tokens=0)
    with pytest.raises(InputError, match=r"model.optimizer.micro_batches: 2 is not allowed; it must be 1 with"):
        make_module(micro_batches=2, micro_batch_tokens=100)


def test_a_finished_run_can_be_extended(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(name: str, rl_steps: int, ckpt: Path | None = None) -> MifoModule:
        module = make_module()
        schedule = Schedule(rl_steps=rl_steps, prompts_per_step=4, sft_batch=4)
        callbacks = [*method_callbacks(), LastCheckpoint(dirpath=str(tmp_path / name))]
        trainer = make_trainer(callbacks, enable_checkpointing=True, max_epochs=-1)
        trainer.fit(module, datamodule=make_data(schedule=schedule), ckpt_path=ckpt)
        return module

    fit("short", 3)
    extended, whole = fit("extended", 6, tmp_path / "short" / "last.ckpt"), fit("whole", 6)
    for (name, a), b in zip(weights(extended).items(), weights(whole).values(), strict=True):
        assert (a == b).all(), name
