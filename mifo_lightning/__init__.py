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
    from mifo_lightning.data.skills import Skills
    from mifo_lightning.data.source import RowSource
    from mifo_lightning.module import MifoModule
    from mifo_lightning.rewards.base import Reward
    from mifo_lightning.rewards.function import FunctionReward
    from mifo_lightning.rewards.last_answer import LastAnswerReward
    from mifo_lightning.rewards.math_reward import MathReward
    from mifo_lightning.rewards.weighted import WeightedRewards
    from mifo_lightning.rollout.engine import Sampling
    from mifo_lightning.rollout.evaluation import Evaluation
    from mifo_lightning.steps.optimizer import AdamWSettings
    from mifo_lightning.steps.settings import Mixing, RLSettings

__version__ = version("mifo_lightning")

_HOMES = {
    "AdamWSettings": "steps.optimizer",
    "Columns": "data.columns",
    "Evaluation": "rollout.evaluation",
    "FunctionReward": "rewards.function",
    "GeneralPoints": "data.general_points",
    "LastAnswerReward": "rewards.last_answer",
    "MathReward": "rewards.math_reward",
    "MifoModule": "module",
    "Mixing": "steps.settings",
    "QuestionData": "data.datamodule",
    "RLSettings": "steps.settings",
    "Reward": "rewards.base",
    "RowSource": "data.source",
    "Sampling": "rollout.engine",
    "Schedule": "data.schedule",
    "Skills": "data.skills",
    "WeightedRewards": "rewards.weighted",
}

__all__ = [
    "AdamWSettings",
    "Columns",
    "Evaluation",
    "FunctionReward",
    "GeneralPoints",
    "LastAnswerReward",
    "MathReward",
    "MifoModule",
    "Mixing",
    "QuestionData",
    "RLSettings",
    "Reward",
    "RowSource",
    "Sampling",
    "Schedule",
    "Skills",
    "WeightedRewards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
