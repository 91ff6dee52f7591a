"""What the tests share: small runs on the embedded task, in this process."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from mifo_callbacks import BufferPhaseSwitch, EntropyTokenSelection, GradientFreezing, ImportanceEMA
from mifo_lightning.common.terminal import quiet
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.settings import Demonstrations, Prompts
from mifo_lightning.data.skills import Skills
from mifo_lightning.module import MifoModule
from mifo_lightning.policy.loading import Loading, load_policy, load_tokenizer
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.evaluation import Evaluation
from mifo_lightning.rollout.settings import Rollout
from mifo_lightning.steps.optimizer import AdamWSettings, OptimizerSettings
from mifo_lightning.steps.settings import SFTLoss

torch.set_num_threads(1)
quiet()

SAMPLING = Sampling(max_new_tokens=14)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer("embedded")


@pytest.fixture
def policy() -> Policy:
    return load_policy("embedded")


def method_callbacks(size: int = 8, **entropy: Any) -> list[Callback]:
    """The four callbacks of MIFO; all questions below three quarters correct count as hard, so phases come soon."""
    return [
        EntropyTokenSelection(**entropy),
        ImportanceEMA(),
        GradientFreezing(),
        BufferPhaseSwitch(size=size, max_accuracy=0.75),
    ]


def make_module(**changes: Any) -> MifoModule:
    """A module on the embedded base model."""
    settings: dict[str, Any] = {
        "model": "embedded",
        "reward": LastAnswerReward(),
        "seed": 0,
        "group_size": 4,
        "sampling": SAMPLING,
        "rl": AdamWSettings(lr=5e-4, weight_decay=0.1),
        "sft": AdamWSettings(lr=1e-3),
        "evaluation": Evaluation(sampling=SAMPLING),
        "self_check": "engine" not in changes,  # scripted engines invent their log-probabilities
    }
    groups = {"rollout": Rollout, "sft_loss": SFTLoss, "optimizer": OptimizerSettings, "loading": Loading}
    return MifoModule(**grouped({**settings, **changes}, groups))


def grouped(settings: dict[str, Any], groups: dict[str, type]) -> dict[str, Any]:
    """The settings with those that belong to a group, by the names of its fields, in one of that class."""
    found = dict(settings)
    for name, kind in groups.items():
        own = {f.name: found.pop(f.name) for f in fields(kind) if f.name in found}
        found.setdefault(name, kind(**own))
    return found


# what data takes from the module, for data that has none; there demonstrations are verified
ALONE: dict[str, Any] = {
    "reward": LastAnswerReward(),
    "tokenizer": "embedded",
    "success_threshold": 1.0,
    "verify": True,
}


def make_data(**changes: Any) -> QuestionData:
    """64 questions, half of them too hard; 4 of them per RL step, SFT in batches of 4."""
    settings: dict[str, Any] = {
        "train": Skills(["addition", "mirrored"], 64),
        "seed": 0,
        "answer_after": ">",
        "verify": False,  # they are right, but a module may want more than 1
        "max_prompt_tokens": 16,
        "max_tokens": 14,
        "schedule": Schedule(rl_steps=6, prompts_per_step=4, sft_batch=4),
    }
    settings |= changes
    prompts = Prompts(settings.pop("system_prompt", None), settings.pop("chat_template", None))
    prompts.max_tokens = settings.pop("max_prompt_tokens")
    alone = {name: settings.pop(name) for name in ("reward", "tokenizer", "success_threshold") if name in settings}
    data = QuestionData(prompts=prompts, **grouped(settings, {"demonstrations": Demonstrations}))
    return data.standalone(**alone) if alone else data


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A silent Trainer for one epoch in a directory of the test's own."""

    def make(callbacks: list[Callback] | None = None, **changes: Any) -> Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=callbacks or [], **{**settings, **changes})

    return make


def weights(module: MifoModule) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}
