"""What a run used: steps, questions, demonstrations, tokens, FLOPs and seconds, by phase kind."""

import time
from collections import defaultdict
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn

from mifo_callbacks.collectives import gather_ranks
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.ownership import claim, renew
from mifo_lightning.common.errors import InputError
from mifo_lightning.monitors.activity import ActivityProfiler
from mifo_lightning.monitors.phase_monitor import PhaseMonitor

TOKENS = ("generated", "scored", "trained")


class Costs(Callback):
    """Keeps one account per phase kind, over all ranks, in the checkpoint too.

    An account has `optimizer_steps`, `questions` (answered by rollouts), `demonstrations` (trained on; with
    repetitions), `generated_tokens`, `scored_tokens` (forwarded without gradient), `trained_tokens`, `flops` and
    `seconds` (wall seconds of the training batches on the first rank; what callbacks do before a batch, such as drawing
    masks, is under `callbacks`, given an `ActivityProfiler`). What Self-SFT draws before training is in the tokens of
    the first step, whatever its kind, and in no seconds. Evaluation, phase monitors and FLOW's pass before training
    are not in the accounts. Logs `costs/flops` and `costs/<kind>_tokens`, cumulative. Costs one gathering of a few
    integers per optimizer step.

    FLOPs are those of the matrix products with weights: 2 N per generated or scored token, 4 N + 2 T per trained token,
    N as `multiplying` counts and T those of them that are trained: all, all but frozen ones, or the adapters' alone.
    Attention between tokens and recomputed activations are left out.

    Raises:
        InputError: If `training_step` returns no `work`.
    """

    summary_key = "costs"

    def __init__(self) -> None:
        self.accounts: dict[str, dict[str, float]] = {"rl": _empty(), "sft": _empty()}
        self.questions: set[int] = set()
        self.demonstrations: set[int] = set()
        self._weights = self._trained = 0  # N and T
        self._began = 0.0
        self._profiler: Any = None
        self._callbacks: list[Callback] = []
        self._earlier: dict[str, float] = {}  # seconds of callbacks before the run was resumed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the weights."""
        claim(self, pl_module)
        model: Any = pl_module.policy.model  # type: ignore[union-attr]
        self._weights, self._trained = multiplying(model), multiplying(model, trained=True)
        self._profiler, self._callbacks = trainer.profiler, trainer.callbacks  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._began = time.perf_counter() - _monitoring(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Enter an optimizer step of all ranks."""
        account = self.accounts[batch["phase"]]
        account["seconds"] += time.perf_counter() - _monitoring(trainer) - self._began
        if "work" not in outputs:
            raise InputError(
                f"costs: {type(pl_module).__name__}.training_step returns no 'work' in phase {batch['phase']!r}; it "
                f"must be a dict of {', '.join(TOKENS)} and demonstrations"
            )
        # groups, not the batch: a step may draw more questions than it trains on
        questions = [group["id"] for group in outputs.get("groups", [])]
        account["optimizer_steps"] += 1
        work = gather_ranks({**outputs["work"], "questions": questions})
        for kind in TOKENS:
            account[f"{kind}_tokens"] += sum(each[kind] for each in work)
        for name, distinct in (("questions", self.questions), ("demonstrations", self.demonstrations)):
            ids = [i for each in work for i in each[name]]
            account[name] += len(ids)
            distinct.update(ids)
        totals = {f"{kind}_tokens": sum(a[f"{kind}_tokens"] for a in self.accounts.values()) for kind in TOKENS}
        totals["flops"] = sum(flops(a, self._weights, self._trained) for a in self.accounts.values())
        log_metrics(trainer, {f"costs/{name}": value for name, value in totals.items()})

    def summary(self) -> dict[str, Any]:
        """Plain JSON: both accounts, distinct questions and demonstrations, seconds of callbacks by group."""
        accounts = {phase: {**a, "flops": flops(a, self._weights, self._trained)} for phase, a in self.accounts.items()}
        distinct = {"distinct_questions": len(self.questions), "distinct_demonstrations": len(self.demonstrations)}
        return {**accounts, **distinct, "callbacks": self._seconds_of_callbacks()}

    def _seconds_of_callbacks(self) -> dict[str, float]:
        seconds = defaultdict(float, self._earlier)
        if isinstance(self._profiler, ActivityProfiler):
            for name, spent in self._profiler.by_callback(self._callbacks).items():
                seconds[name] += spent
        return dict(seconds)

    def state_dict(self) -> dict[str, Any]:
        """Accounts, distinct ids and seconds."""
        return {
            "accounts": {phase: dict(account) for phase, account in self.accounts.items()},
            "questions": sorted(self.questions),
            "demonstrations": sorted(self.demonstrations),
            "callbacks": self._seconds_of_callbacks(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        renew(self)
        self.accounts = {phase: dict(account) for phase, account in state_dict["accounts"].items()}
        self.questions, self.demonstrations = set(state_dict["questions"]), set(state_dict["demonstrations"])
        self._earlier = dict(state_dict["callbacks"])


def _monitoring(trainer: Trainer) -> float:
    """Seconds that the monitors of phases have taken so far."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(callback.seconds for callback in callbacks if isinstance(callback, PhaseMonitor))


def _empty() -> dict[str, float]:
    counts = ("optimizer_steps", "questions", "demonstrations", *(f"{kind}_tokens" for kind in TOKENS))
    return {**dict.fromkeys(counts, 0), "seconds": 0.0}


def multiplying(model: nn.Module, trained: bool = False) -> int:
    """N: weights that a token is multiplied with; all but an input embedding that is not also the head.

    Args:
        model: A Hugging Face causal LM, sharded or not.
        trained: Those alone that are trained: T.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embedding.weight
    looked_up = set() if tied else set(embedding.parameters())
    return sum(p.numel() for p in model.parameters() if p not in looked_up and (p.requires_grad or not trained))


def flops(account: dict[str, float], weights: int, trained: int) -> float:
    """Floating-point operations of the matrix products of an account: 2 N forward, 2 N + 2 T backward per token."""
    forward = 2 * weights * (account["generated_tokens"] + account["scored_tokens"])
    return forward + (4 * weights + 2 * trained) * account["trained_tokens"]
