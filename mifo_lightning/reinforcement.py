"""One RL step without Lightning: draw, grade, prepare, cut into micro-batches, describe."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mifo_callbacks.sharding import world_group
from mifo_callbacks.tokens import select_tokens
from mifo_lightning.data.question import Question
from mifo_lightning.distributed import mean_ranks, ranks
from mifo_lightning.errors import InputError
from mifo_lightning.loader import WorkItem
from mifo_lightning.losses.policy import group_advantages
from mifo_lightning.policy import Policy
from mifo_lightning.rewards.base import Reward, score
from mifo_lightning.rollout.batch import Rollout, pack_completions, score_without_gradient
from mifo_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from mifo_lightning.seeds import stable_key


@dataclass
class RLSettings:
    """The policy loss (GRPO).

    Args:
        clip_low: Lower clip range of the probability ratio.
        clip_high: Upper clip range of the probability ratio.
        kl_coefficient: Weight of the KL to the initial model (estimator k3); 0 loads no reference.
        entropy_fraction: Share of tokens, those of highest entropy under the policy that sampled, that push the policy;
            1 takes all. The denominator stays all tokens (arXiv 2506.01939 takes 0.2).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    entropy_fraction: float = 1.0

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        allowed = [
            ("clip_low", 0 < self.clip_low < 1, "in (0, 1)"),
            ("clip_high", self.clip_high > 0, "above 0"),
            ("kl_coefficient", self.kl_coefficient >= 0, "at least 0"),
            ("entropy_fraction", 0 < self.entropy_fraction <= 1, "in (0, 1]"),
        ]
        for name, good, what in allowed:
            if not good:
                raise InputError(f"{key}.{name}: {getattr(self, name)} is not allowed; it must be {what}")


class MicroBatch(NamedTuple):
    """What one backward of an RL optimizer step sees.

    Attributes:
        part: The rows of the rollout.
        mask: [B, L] bool response mask; all false where this micro-batch has nothing to do.
        sequences: How many sequences this rank's optimizer step has, those left out included.
    """

    part: Rollout
    mask: Tensor
    sequences: int


class Reinforcement:
    """Everything of an RL step but the loss and the gradient.

    Args:
        engine: Draws responses.
        tokenizer: The model's.
        reward: Grades responses.
        sampling: How rollouts are drawn.
        settings: The policy loss.
        group_size: G, rollouts per question.
        solved_at: Reward from which a rollout counts as correct.
        seed: Seed of all rollouts.

    Raises:
        InputError: If a setting is impossible.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward,
        sampling: Sampling,
        settings: RLSettings,
        group_size: int,
        solved_at: float,
        seed: int,
    ) -> None:
        _check(group_size, solved_at, sampling, settings)
        self.engine, self.tokenizer, self.reward = engine, tokenizer, reward
        self.sampling, self.settings = sampling, settings
        self.group_size, self.solved_at, self.seed = group_size, solved_at, seed
        # in a list: the reference is no part of the module, its parameters no part of checkpoints
        self._reference: list[Policy] = []

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL term."""
        return self.settings.kl_coefficient > 0

    def set_reference(self, reference: Policy | None) -> None:
        """Keep the frozen initial model for the KL term."""
        self._reference = [] if reference is None else [reference.requires_grad_(False)]

    def draw(self, policy: Policy, item: WorkItem) -> list[list[Completion]]:
        """G responses to each of this rank's questions, the same whatever the number of ranks."""
        questions = item["questions"]
        keys = [stable_key(self.seed, "rl", item["rollout"], q.id) for q in questions]
        prompts = [q.prompt for q in questions]
        return self.engine.generate(policy, self.tokenizer, prompts, keys, self.group_size, self.sampling)

    def grade(self, questions: list[Question], completions: list[list[Completion]]) -> Tensor:
        """[B] fp32 rewards; a response that did not end by itself gets 0 (MIFO, buffer rule)."""
        flat = [c for group in completions for c in group]
        texts = self.tokenizer.batch_decode([c.tokens for c in flat], skip_special_tokens=True)
        truths = [q.truth for q in questions for _ in range(self.group_size)]
        rewards = score(self.reward, texts, truths)
        return torch.tensor([r if c.finished else 0.0 for r, c in zip(rewards, flat, strict=True)])

    def prepare(self, policy: Policy, item: WorkItem, completions: list[list[Completion]], rewards: Tensor) -> Rollout:
        """Pack and add advantages and, where the updates need them, old and reference log-probabilities."""
        device, temperature = policy.device, self.sampling.temperature
        prompts = [q.prompt for q in item["questions"]]
        sequences = pack_completions(prompts, completions, int(self.tokenizer.pad_token_id)).to(device)
        rewards = rewards.to(device)
        rollout = Rollout(
            sequences=sequences,
            rewards=rewards,
            correct=rewards >= self.solved_at,
            finished=torch.tensor([c.finished for group in completions for c in group], device=device),
            advantages=group_advantages(rewards, self.group_size),
        )
        masked = self.settings.entropy_fraction < 1
        if item["updates"] > 1 or masked:
            logp, entropy = score_without_gradient(policy, sequences, temperature)
            # with a single update the ratio is 1 by definition; scores of another batch shape would only add rounding
            rollout.logp_old = logp if item["updates"] > 1 else None
            rollout.keep = self._forking_tokens(entropy, sequences.mask(), item) if masked else None
        for reference in self._reference:
            reference.to(device)
            rollout.logp_ref = score_without_gradient(reference, sequences, temperature)[0]
        return rollout

    def _forking_tokens(self, entropy: Tensor, mask: Tensor, item: WorkItem) -> Tensor:
        """[B, L] bool: the tokens of highest entropy of each optimizer step, over all ranks."""
        parts = [
            select_tokens(entropy[rows], mask[rows], fraction=self.settings.entropy_fraction, group=world_group()).mask
            for rows in torch.arange(len(mask), device=mask.device).tensor_split(item["minibatches"])
        ]
        return torch.cat(parts)

    def micro_batch(self, rollout: Rollout, item: WorkItem) -> MicroBatch:
        """The rows that the update of `item` works on in its micro-batch.

        Rows of advantage 0 give no gradient and are left out unless there is a KL term; they still count.
        """
        everything = torch.arange(len(rollout.rewards), device=rollout.rewards.device)
        rows = everything.tensor_split(item["minibatches"])[item["update"] % item["minibatches"]]
        active = rows if self.needs_reference else rows[rollout.advantages[rows] != 0]
        mine = active.tensor_split(item["micro_batches"])[item["micro"]]
        # every rank runs every backward: one row without a valid token gives gradients of exactly 0
        part = rollout.rows(mine if len(mine) else rows[:1])
        mask = part.sequences.mask()
        return MicroBatch(part, mask if len(mine) else torch.zeros_like(mask), len(rows))

    def groups(self, rollout: Rollout, questions: list[Question]) -> list[dict[str, Any]]:
        """What BufferPhaseSwitch wants to know of each question."""
        n_correct = rollout.correct.view(-1, self.group_size).sum(-1).tolist()
        return [
            {"id": q.id, "n_correct": n, "size": self.group_size, "has_demonstration": bool(q.demonstration)}
            for q, n in zip(questions, n_correct, strict=True)
        ]

    def samples(
        self, rollout: Rollout, questions: list[Question], completions: list[list[Completion]]
    ) -> list[dict[str, Any]]:
        """The first question's responses, as text with their rewards."""
        texts = self.tokenizer.batch_decode([c.tokens for c in completions[0]])
        q, rewards = questions[0], rollout.rewards.tolist()
        return [
            {"source": q.source, "prompt": q.text, "response": text, "truth": q.truth, "reward": reward}
            for text, reward in zip(texts, rewards, strict=False)
        ]

    def describe(self, rollout: Rollout, completions: list[list[Completion]], seconds: float) -> dict[str, float]:
        """Means over the rollouts of all ranks, tokens per second of all of them, graded badly so far; collective."""
        flat = [c for group in completions for c in group]
        tokens = sum(len(c.tokens) for c in flat)
        still = (rollout.advantages.view(-1, self.group_size) == 0).all(-1)
        # every rank has equally many rollouts
        means = mean_ranks(
            {
                "reward": float(rollout.rewards.mean()),
                "correct": float(rollout.correct.float().mean()),
                "truncated": 1.0 - float(rollout.finished.float().mean()),
                "length": tokens / len(flat),
                "entropy": -sum(sum(c.logp) for c in flat) / len(flat),
                "advantage_abs": float(rollout.advantages.abs().mean()),
                "groups_without_signal": float(still.float().mean()),
                "tokens_per_s": tokens / max(seconds, 1e-9) * ranks(),
                "reward_errors": float(self.reward.errors * ranks()),
                "reward_timeouts": float(self.reward.timeouts * ranks()),
            },
            rollout.rewards.device,
        )
        # Monte-Carlo estimate: the mean over all sampled tokens of all ranks
        means["entropy"] /= means["length"]
        return means


def _check(group_size: int, solved_at: float, sampling: Sampling, settings: RLSettings) -> None:
    """Raise an InputError that names the key, its value and what is allowed."""
    sampling.check("model.sampling")
    settings.check("model.policy")
    if group_size < 2:
        raise InputError(f"model.group_size: {group_size} is not allowed; group advantages need at least 2 rollouts")
    if not 0 < solved_at <= 1:
        raise InputError(f"model.solved_at: {solved_at} is not allowed; it must be in (0, 1]")
    if sampling.temperature == 0 or sampling.top_p != 1 or sampling.top_k != 0:
        raise InputError(
            f"model.sampling: temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k} is "
            f"not allowed in RL; temperature > 0, top_p 1, top_k 0 are: the loss sees the whole vocabulary"
        )
