"""Input cases by kind: what a user, an accident or an attacker hands over, and what should come of it."""

from benchmarks.stress.cases.case import Case, Pantry
from benchmarks.stress.cases.checkpoints import CHECKPOINTS
from benchmarks.stress.cases.command_line import COMMAND_LINE
from benchmarks.stress.cases.configuration import CONFIGURATION
from benchmarks.stress.cases.data import DATA
from benchmarks.stress.cases.models import MODELS
from benchmarks.stress.cases.rewards import REWARDS

KINDS: dict[str, list[Case]] = {
    "command line": COMMAND_LINE,
    "configuration": CONFIGURATION,
    "data": DATA,
    "model directory": MODELS,
    "checkpoint": CHECKPOINTS,
    "reward": REWARDS,
}

__all__ = ["KINDS", "Case", "Pantry"]
