"""One optimizer step: a work item becomes a `Batch`, which goes through one `Objective` in chunks."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from mifo_lightning.data.loader import WorkItem
from mifo_lightning.policy.policy import Policy
from mifo_lightning.policy.scoring import score_without_gradient
from mifo_lightning.steps.batch import Batch
from mifo_lightning.steps.metrics import StepMetrics
from mifo_lightning.steps.objective import Objective
from mifo_lightning.steps.optimizer import OptimizerSettings
from mifo_lightning.steps.reinforcement import Reinforcement
from mifo_lightning.steps.supervision import Supervision, selected


class OptimizerStep:
    """One optimizer step of either kind, up to its last backward pass.

    Args:
        reinforcement: RL steps.
        supervision: SFT steps.
        settings: Say how many chunks each rank cuts a step into.
        metrics: Takes what is logged of a step.

    Attributes:
        last_reward: Mean reward of the last rollout; None before the first.
    """

    def __init__(
        self,
        reinforcement: Reinforcement,
        supervision: Supervision,
        settings: OptimizerSettings,
        metrics: StepMetrics,
    ) -> None:
        self.reinforcement, self.supervision = reinforcement, supervision
        self.settings, self.metrics = settings, metrics
        self.last_reward: float | None = None

    def __call__(self, trainer: Trainer, policy: Policy, item: WorkItem, select_tokens: Any) -> dict[str, Any]:
        """The `loss` of the step, `work` for accounts, and `groups` and `samples` of a rollout in its first update.

        Args:
            trainer: Has loader, strategy and profiler.
            policy: The model.
            item: What the loader hands out.
            select_tokens: What `EntropyTokenSelection` put on the module; None takes all tokens.
        """
        output: dict[str, Any] = {"work": {"generated": 0, "scored": 0}}
        is_rl = item["phase"] == "rl"
        if is_rl:
            objective, whole = self.reinforcement.objective, self._rl_batch(trainer, policy, item, output)
        else:
            objective, whole = self.supervision.objective, self._sft_batch(trainer, policy, item)
        settings, shared = self.settings, is_rl and policy.share_prompts
        cut = item["update"] % item["minibatches"], settings.micro_batches, settings.micro_batch_tokens, shared
        chunks = whole.chunks(*cut)
        late = None if is_rl else select_tokens
        if late is not None and len(chunks) > 1:
            whole, late = self._select(trainer, policy, whole, select_tokens, output), None
            chunks = whole.chunks(*cut)
        output["loss"] = self._descend(trainer, policy, chunks, objective, item["phase"], late)
        shown = [chunk.teacher.token_count() for chunk in chunks if chunk.teacher is not None and not chunk.idle]
        output["work"]["scored"] += sum(shown)
        output["work"]["generated"] += self.supervision.take_decoded()
        output["work"] |= {
            "trained": sum(chunk.sequences.token_count() for chunk in chunks if not chunk.idle),
            "demonstrations": [i for chunk in chunks if not chunk.idle for i in chunk.demonstrations],
        }
        return output

    def _rl_batch(self, trainer: Trainer, policy: Policy, item: WorkItem, output: dict[str, Any]) -> Batch:
        """What the rollout under way trains on; its first update draws and grades it, and says so in `output`."""
        more: Any = getattr(trainer.train_dataloader, "more", None)
        batch, fresh = self.reinforcement.batch(policy, item, more, lambda activity: profiled(trainer, activity))
        if fresh is not None:
            groups = self.supervision.groups(fresh.drawn)
            output |= {"groups": groups, "samples": fresh.drawn.samples(), "work": fresh.work}
            self.metrics.put("rollout", fresh.metrics)
            self.last_reward = fresh.metrics["reward"]
        return batch

    def _sft_batch(self, trainer: Trainer, policy: Policy, item: WorkItem) -> Batch:
        """What an SFT step trains on, drawn first where the model learns from responses of its own."""
        phase: Any = getattr(trainer.train_dataloader, "phase", None)
        with profiled(trainer, "rollout") if self.supervision.draws else nullcontext():
            questions, metrics = self.supervision.answered(policy, item, phase)
        self.metrics.put("sft", metrics)
        return self.supervision.batch(questions, policy.device)

    def _select(
        self, trainer: Trainer, policy: Policy, batch: Batch, select_tokens: Any, output: dict[str, Any]
    ) -> Batch:
        """The demonstrations of a step of several chunks, and which of their tokens it learns from.

        The threshold belongs to the optimizer step: all entropies are needed before the first backward.
        """
        output["work"]["scored"] = batch.sequences.token_count()
        with profiled(trainer, "entropies"):
            entropy = score_without_gradient(policy, batch.sequences, temperature=1.0)[1]
        return selected(batch, select_tokens, entropy)

    def _descend(
        self, trainer: Trainer, policy: Policy, chunks: list[Batch], objective: Objective, phase: str, late: Any
    ) -> Tensor:
        """The loss of the whole step, with the graph of its last chunk; the gradients of the others are there already.

        Only the last backward is Lightning's: its hooks see the whole gradient, once. `late` selects tokens of a step
        that is a single chunk by the entropies of its own forward.
        """
        before = torch.zeros((), device=policy.device)
        synchronises_late = getattr(trainer.strategy, "block_backward_sync", nullcontext)
        for chunk in chunks:
            with_bonus = chunk.bonus is not None and chunk.bonus.scale > 0
            with profiled(trainer, "forward"):
                states, head = self.supervision.shown(policy, chunk)
                scores = policy(
                    chunk.sequences,
                    chunk.temperature,
                    entropy_gradient=with_bonus,
                    grouped=phase == "rl",
                    top_k=objective.top_k if chunk.ce is not None else 0,
                    teacher=states,
                    teacher_head=head,
                )
            chosen = chunk if late is None else selected(chunk, late, scores[1].detach())
            loss, metrics = objective(chosen, *scores)
            self.metrics.add(phase, metrics)
            loss = loss * trainer.world_size  # undo the strategy's mean over ranks: our denominators count all
            if chunk is chunks[-1]:
                break
            # outside of the Trainer's autocast, as Lightning's own; its cache would keep casts with a used graph
            with profiled(trainer, "backward"), synchronises_late(), torch.autocast(policy.device.type, enabled=False):
                loss.backward()
            torch.clear_autocast_cache()
            before += loss.detach()
        return before + loss


def profiled(trainer: Trainer, activity: str) -> AbstractContextManager[None]:
    """Measures an activity with the Trainer's profiler, as `mifo.<activity>`."""
    timed: AbstractContextManager[None] = trainer.profiler.profile(f"mifo.{activity}")  # type: ignore[attr-defined]
    return timed
