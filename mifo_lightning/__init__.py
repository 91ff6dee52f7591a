"""MIFO on PyTorch Lightning: supervised fine-tuning inside reinforcement learning without forgetting.

    import mifo_lightning as mifo

Names are loaded when they are first used: `import mifo_lightning` alone imports neither torch nor transformers.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mifo_lightning.data.columns import Columns
    from mifo_lightning.data.datamodule import QuestionData
    from mifo_lightning.data.general_points import GeneralPoints
    from mifo_lightning.data.schedule import Schedule
    from mifo_lightning.data.settings import Demonstrations, Prompts
    from mifo_lightning.data.skills import Skills
    from mifo_lightning.data.source import RowSource
    from mifo_lightning.losses.advantages import Advantage
    from mifo_lightning.losses.sft_weights import SFTWeight
    from mifo_lightning.losses.surrogates import Surrogate
    from mifo_lightning.methods import HPT, SRFT, Chord, Luffy, Mixing
    from mifo_lightning.module import MifoModule
    from mifo_lightning.policy.adapter import Adapter
    from mifo_lightning.policy.loading import Loading
    from mifo_lightning.rewards.base import Reward
    from mifo_lightning.rewards.function import FunctionReward
    from mifo_lightning.rewards.last_answer import LastAnswerReward
    from mifo_lightning.rewards.math_reward import MathReward
    from mifo_lightning.rewards.weighted import WeightedRewards
    from mifo_lightning.rollout.engine import Sampling
    from mifo_lightning.rollout.evaluation import Evaluation
    from mifo_lightning.rollout.settings import Rollout
    from mifo_lightning.steps.optimizer import AdamWSettings, OptimizerSettings
    from mifo_lightning.steps.settings import PolicyLoss, SFTLoss

__version__ = version("mifo_lightning")

_HOMES = {
    "AdamWSettings": "steps.optimizer",
    "Adapter": "policy.adapter",
    "Advantage": "losses.advantages",
    "Chord": "methods",
    "Columns": "data.columns",
    "Demonstrations": "data.settings",
    "Evaluation": "rollout.evaluation",
    "FunctionReward": "rewards.function",
    "GeneralPoints": "data.general_points",
    "HPT": "methods",
    "LastAnswerReward": "rewards.last_answer",
    "Loading": "policy.loading",
    "Luffy": "methods",
    "MathReward": "rewards.math_reward",
    "MifoModule": "module",
    "Mixing": "methods",
    "OptimizerSettings": "steps.optimizer",
    "PolicyLoss": "steps.settings",
    "Prompts": "data.settings",
    "QuestionData": "data.datamodule",
    "Reward": "rewards.base",
    "Rollout": "rollout.settings",
    "RowSource": "data.source",
    "SFTLoss": "steps.settings",
    "SFTWeight": "losses.sft_weights",
    "SRFT": "methods",
    "Sampling": "rollout.engine",
    "Schedule": "data.schedule",
    "Skills": "data.skills",
    "Surrogate": "losses.surrogates",
    "WeightedRewards": "rewards.weighted",
}

__all__ = [
    "HPT",
    "SRFT",
    "AdamWSettings",
    "Adapter",
    "Advantage",
    "Chord",
    "Columns",
    "Demonstrations",
    "Evaluation",
    "FunctionReward",
    "GeneralPoints",
    "LastAnswerReward",
    "Loading",
    "Luffy",
    "MathReward",
    "MifoModule",
    "Mixing",
    "OptimizerSettings",
    "PolicyLoss",
    "Prompts",
    "QuestionData",
    "Reward",
    "Rollout",
    "RowSource",
    "SFTLoss",
    "SFTWeight",
    "Sampling",
    "Schedule",
    "Skills",
    "Surrogate",
    "WeightedRewards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
