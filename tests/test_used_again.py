"""Objects that are changed, subclassed or used again from Python: what is said holds, or is refused in one line."""

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLING, make_data, make_module
from lightning import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim.lr_scheduler import LambdaLR

import mifo_lightning as mifo
from mifo_callbacks import BufferPhaseSwitch, GradientFreezing
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.module import HOOKS

MakeTrainer = Callable[..., Trainer]
SHORT = Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4)


def rows(skill: str) -> list[dict[str, Any]]:
    return list(Skills([skill], 16).rows())


def first_of(data: Any, module: Any, trainer: Trainer) -> str:
    """Fit, and the text of the first question that was trained on."""
    trainer.fit(module, datamodule=data)
    return str(data._loader.questions[0].text)


def test_the_next_trainer_reads_what_data_are_then(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    easy, hard, module = rows("addition"), rows("mirrored"), make_module()
    data = make_data(train=easy, schedule=SHORT)
    begun = first_of(data, module, make_trainer())
    data.train = hard
    assert data.sources["train"] is hard
    other = first_of(data, module, make_trainer())
    assert other != begun
    path = tmp_path / "rows.jsonl"
    for kind, text in ((easy, begun), (hard, other)):
        path.write_text("".join(json.dumps(row) + "\n" for row in kind))
        data.train = str(path)
        assert first_of(data, module, make_trainer()) == text
    data.train = easy
    for row in easy:
        row["target"] = None
    first_of(data, module, make_trainer())
    assert not any(q.demonstration for q in data._loader.questions)


def test_a_seed_of_data_may_be_said_anew(make_trainer: MakeTrainer) -> None:
    data, module, orders = make_data(seed=5, schedule=SHORT), make_module(), []
    for seed in (5, 6, 5, None):
        data.seed = seed
        make_trainer().fit(module, datamodule=data)
        orders.append(data._loader.seed)
    assert orders == [5, 6, 5, module.seed.value]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reward", mifo.LastAnswerReward()),
        ("sampling", SAMPLING),
        ("success_threshold", 0.5),
        ("seed", 3),
        ("loss", mifo.PolicyLoss()),
        ("optimizer", mifo.OptimizerSettings()),
    ],
)
def test_what_a_module_is_made_of_stands_still(name: str, value: Any) -> None:
    module = make_module()
    with pytest.raises(InputError, match=rf"^MifoModule\.{name}: .*from_model"):
        setattr(module, name, value)
    module.loss = 0.5  # a subclass may keep what it likes under a name that is not taken
    assert module.loss == 0.5


def test_settings_that_modules_share_cannot_be_changed() -> None:
    module = mifo.MifoModule("embedded", mifo.LastAnswerReward())
    rl = module.reinforcement.settings
    for settings in (module.sampling, rl, module.optimizer_settings.rl, module.evaluator.settings, module.loading):
        name = next(iter(vars(settings)))
        with pytest.raises(FrozenInstanceError):
            setattr(settings, name, None)


def test_arguments_that_a_callback_has_handed_on_cannot_be_set_in_vain() -> None:
    switch, freezing = BufferPhaseSwitch(2, max_accuracy=0.25), GradientFreezing(selector="random")
    assert (switch.max_accuracy, freezing.selector) == (0.25, "random")
    with pytest.raises(AttributeError):
        switch.max_accuracy = 1.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        freezing.selector = "none"  # type: ignore[misc]


def test_generate_asks_as_its_own_fit_did_whoever_has_the_data_since(make_trainer: MakeTrainer) -> None:
    first, second = make_module(), make_module(seed=1)
    data = make_data(schedule=SHORT)
    make_trainer().fit(first, datamodule=data)
    before = first.generate(["123+456="], samples=4)
    data.prompts.chat_template = "{% for x in messages %}99{{ x['content'] }}{% endfor %}"
    make_trainer().fit(second, datamodule=data)
    assert first.generate(["123+456="], samples=4) == before
    asked = first._template
    make_trainer().fit(first, datamodule=data)
    assert first._template is not asked


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_a_hook_without_super_ends_the_first_step(hook: str, make_trainer: MakeTrainer) -> None:
    module = make_module()
    module.__class__ = type("Own", (mifo.MifoModule,), {hook: lambda self, *a, **k: None})
    with pytest.raises(InputError, match=rf"^Own\.{hook}: .* calls super\(\)\.{hook}"):
        make_trainer().fit(module, datamodule=make_data(schedule=SHORT))


@pytest.mark.parametrize("kind", ["scheduler", "groups"])
def test_an_optimizer_that_phases_would_write_over_is_refused(kind: str, make_trainer: MakeTrainer) -> None:
    class Own(mifo.MifoModule):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            if kind == "scheduler":
                return [optimizer], [LambdaLR(optimizer, lambda _: 0.0)]
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
            return optimizer

    module = make_module()
    module.__class__ = Own
    with pytest.raises(InputError, match=r"^configure_optimizers: 1 optimizers with . groups .* and . schedulers"):
        make_trainer().fit(module, datamodule=make_data(schedule=SHORT))


def test_averaging_by_epochs_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(InputError, match="StochasticWeightAveraging is not allowed"):
        make_trainer([StochasticWeightAveraging(1e-2)]).fit(make_module(), datamodule=make_data(schedule=SHORT))


def test_weights_of_fewer_bits_are_not_trained_on(make_trainer: MakeTrainer) -> None:
    module, data = make_module(), make_data(schedule=SHORT)
    make_trainer().fit(module, datamodule=data)
    module.bfloat16()
    with pytest.raises(InputError, match=r"dtype is torch\.bfloat16; it must be fp32"):
        make_trainer().fit(module, datamodule=data)
    module.float()
    make_trainer().fit(module, datamodule=data)
