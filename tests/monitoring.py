"""What the tests of the monitors share."""

from typing import Any

from conftest import make_data
from lightning.pytorch.loggers import Logger

from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.costs import Costs
from mifo_lightning.monitors.forgetting import Forgetting
from mifo_lightning.monitors.heldout import HeldOutLoss
from mifo_lightning.monitors.history import History
from mifo_lightning.monitors.layer_updates import LayerUpdates
from mifo_lightning.monitors.overlap import FrozenOverlap
from mifo_lightning.monitors.phase_kl import PhaseKL
from mifo_lightning.monitors.retention import Retention
from mifo_lightning.monitors.update_norm import UpdateNorm
from mifo_lightning.rollout.engine import Completion

SECONDS = ("seconds", "callbacks")


class Records(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "records"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(dict(metrics))

    def series(self, *names: str) -> list[float]:
        """All values of these metrics, in the order in which they came."""
        return [values[name] for values in self.metrics for name in names if name in values]


def answer(tokenizer: Any, prompt: list[int], right: bool) -> Completion:
    """A response of six tokens to an addition or a mirrored one; a wrong one is one too much."""
    text = tokenizer.decode(prompt).rstrip("=")
    total = f"{sum(map(int, text.replace('x', '+').split('+'))) + (not right):04d}"
    tokens = tokenizer.encode(f">{total[::-1] if 'x' in text else total}<eos>", add_special_tokens=False)
    return Completion(tokens, [-1.0] * len(tokens), True)


class Sums:
    """Answers additions; right where `right` says so of the number of the call, otherwise one too much."""

    def __init__(self, *right: bool) -> None:
        self.right = right
        self.asked: list[list[str]] = []

    def generate(
        self, policy: Any, tokenizer: Any, prompts: Any, keys: Any, samples: int, sampling: Any
    ) -> list[list[Completion]]:
        right = self.right[len(self.asked) % len(self.right)]
        self.asked.append([tokenizer.decode(p) for p in prompts])
        return [[answer(tokenizer, p, right) for _ in range(samples)] for p in prompts]


def additions(**changes: Any) -> Any:
    return make_data(**{"train": Skills(["addition"], 64), **changes})


def monitors(questions: int = 4) -> list[Any]:
    """All monitors that keep records, in the order of the command line."""
    phases = [Forgetting(questions, every=2), PhaseKL(questions), LayerUpdates(), FrozenOverlap()]
    kept = Retention(questions, samples=2, at_least=0.0)
    return [UpdateNorm(), HeldOutLoss(), *phases, kept, Costs(), History()]


def plain(value: Any) -> Any:
    """The same without seconds, which no two runs share."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in SECONDS}
    return [plain(v) for v in value] if isinstance(value, list) else value


def summaries(callbacks: list[Any]) -> dict[str, Any]:
    return {c.summary_key: plain(c.summary()) for c in callbacks if hasattr(c, "summary_key")}
