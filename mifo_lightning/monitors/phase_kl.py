"""How far each phase moves the policy, as KL on training prompts."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from mifo_callbacks.collectives import gather_dealt, sum_ranks
from mifo_callbacks.logging import log_metrics
from mifo_lightning.common.errors import require
from mifo_lightning.common.question import Question
from mifo_lightning.monitors.phase_monitor import PhaseMonitor
from mifo_lightning.monitors.trained import Trained, as_trained
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.policy import Sequences
from mifo_lightning.policy.scoring import kl_k3, score_without_gradient


class PhaseKL(PhaseMonitor):
    """Estimates KL(policy before the phase || policy after it) on responses drawn when the phase begins.

    Logs `phase_kl/<phase>` (nats per token, estimator k3) and `phase_kl/<phase>_response` (nats per response, the plain
    log-ratio, which can be below 0) when a phase ends. Prompts are training questions chosen by seed, the same in every
    phase; temperature is that of the rollouts. Costs one response and two forwards per prompt and phase; ranks share
    the work. Responses and their scores are in the checkpoint.

    Args:
        prompts: How many training questions to use.

    Raises:
        InputError: If the number is not allowed.
    """

    summary_key = "phase_kl"

    def __init__(self, prompts: int = 32) -> None:
        super().__init__()
        require("phase_kl.prompts", prompts, prompts >= 1, "at least 1")
        self.prompts = prompts
        self._probe: list[Question] = []  # this rank's
        self._responses: list[list[int]] = []  # to the questions of all ranks
        self._before: list[list[float]] = []  # log-probabilities of their tokens when the phase began

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the questions."""
        super().on_train_start(trainer, pl_module)
        questions: list[Question] = trainer.train_dataloader.questions  # type: ignore[union-attr]
        key = as_trained(pl_module, "phase_kl").responder.key
        ranked = sorted(questions, key=lambda q: key("phase_kl", q.id))
        self._probe = self.deal(trainer, ranked[: self.prompts])

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and score one response to each prompt."""
        module = as_trained(pl_module, "phase_kl")
        keys = [module.responder.key("phase_kl", sum(self._numbers.values()), q.id) for q in self._probe]
        prompts = [q.prompt for q in self._probe]
        drawn = module.responder.draw(module.policy, prompts, keys, 1, module.sampling)
        responses = [group[0].tokens for group in drawn]
        # scored as at the end, not with the engine's own numbers: what has not moved gives exactly 0
        scores = self._score(module, responses)
        before = [row[: len(r)] for row, r in zip(scores.tolist(), responses, strict=True)]
        self._responses, self._before = gather_dealt(responses), gather_dealt(before)

    def end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> dict[str, Any]:
        """Score the same responses again."""
        responses = self.deal(trainer, self._responses)
        after = self._score(as_trained(pl_module, "phase_kl"), responses)
        before = _padded(self.deal(trainer, self._before)).to(after)
        mask = _padded([[1.0] * len(r) for r in responses]).to(after).bool()
        counts = [mask.sum(), torch.tensor(len(mask), device=mask.device)]
        k3, plain, tokens, n = (float(x) for x in sum_ranks([*kl_sums(before, after, mask), *counts]))
        found = {"kl": k3 / tokens, "kl_response": plain / n}
        log_metrics(trainer, {f"phase_kl/{phase}": found["kl"], f"phase_kl/{phase}_response": found["kl_response"]})
        return found

    def _score(self, module: Trained, responses: list[list[int]]) -> Tensor:
        """Log-probabilities [B, L] in nats of this rank's responses; collective under FSDP2."""
        policy = module.policy
        with policy.sampling():
            if not responses:
                return torch.zeros(0, 0, device=policy.device)
            pad = padding(module.tokenizer)
            sequences = Sequences.pack([q.prompt for q in self._probe], responses, pad).to(policy.device)
            return score_without_gradient(policy, sequences, module.sampling.temperature)[0]

    def own_state(self) -> dict[str, Any]:
        """The responses of the running phase and their scores when it began."""
        return {"responses": self._responses, "before": self._before}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._responses, self._before = state["responses"], state["before"]


def kl_sums(before: Tensor, after: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens drawn from `before` whose means estimate KL(before || after), in nats.

    Args:
        before: [B, L] log-probabilities in nats under the policy that drew the tokens.
        after: [B, L] the same tokens under the other policy.
        mask: [B, L] bool, the tokens that count.

    Returns:
        The sum of k3, `exp(d) - d - 1` with d = after - before: divided by the tokens it is KL per token, never below
        0; and the sum of -d: divided by the responses it is KL per response.
    """
    return (kl_k3(before, after) * mask).sum(), ((before - after) * mask).sum()


def _padded(rows: list[list[float]]) -> Tensor:
    """[B, L] fp32, 0 after the end of a row."""
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows]).view(len(rows), width)
