"""One RL step without Lightning: draw, grade, prepare, cut into micro-batches, loss."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mifo_callbacks import Seed
from mifo_callbacks.sharding import sum_over, world_group
from mifo_callbacks.tokens import select_tokens
from mifo_lightning.data.loader import WorkItem
from mifo_lightning.distributed import gather_ranks, rank, ranks
from mifo_lightning.losses.policy import kl_k3, policy_loss, token_weights
from mifo_lightning.losses.sft import mean_over, sft_loss, sft_weights
from mifo_lightning.policy.ending import padding, response_texts
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.question import Question
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.grading import FailureWatch, check_solved_at, grade_answers
from mifo_lightning.rollout.batch import Rollout, score_without_gradient
from mifo_lightning.rollout.draw import draw
from mifo_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from mifo_lightning.rollout.graded import Chosen, Graded
from mifo_lightning.seeds import stable_key
from mifo_lightning.steps.mixing import Rows, training_rows
from mifo_lightning.steps.settings import Mixing, RLSettings, check_rl


class Reinforcement:
    """Everything of an RL step but the forward pass with a gradient.

    Args:
        engine: Draws responses.
        tokenizer: The model's.
        reward: Grades responses.
        sampling: How rollouts are drawn.
        settings: The policy loss.
        group_size: G, rollouts per question.
        solved_at: Reward from which a rollout counts as correct.
        seed: Seed of all rollouts.
        mixing: How demonstrations are mixed into RL steps; None mixes none in.

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
        seed: Seed,
        mixing: Mixing | None = None,
    ) -> None:
        check_rl(group_size, sampling, settings, mixing)
        check_solved_at(solved_at, reward)
        self.engine, self.tokenizer, self.reward = engine, tokenizer, reward
        self.sampling, self.settings, self.mixing = sampling, settings, mixing
        self.group_size, self.solved_at, self.seed = group_size, solved_at, seed
        # in a list: the reference is no part of the module, its parameters no part of checkpoints
        self.references: list[Policy] = []
        self._warned = False  # of dynamic sampling that came to its end

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL term."""
        return self.settings.kl_coefficient > 0

    def set_reference(self, reference: Policy | None) -> None:
        """Keep the frozen initial model for the KL term."""
        self.references = [] if reference is None else [reference.requires_grad_(False)]

    def roll_out(
        self,
        policy: Policy,
        item: WorkItem,
        more: Callable[[], list[Question]],
        profile: Callable[[str], AbstractContextManager[None]],
    ) -> tuple[Graded, Chosen]:
        """Draw and grade until there is enough to train on; collective.

        Args:
            policy: The model.
            item: The first micro-batch of an RL step.
            more: Gives this rank's share of the next batch of questions.
            profile: Measures an activity by name.

        Returns:
            All that was drawn, and which of its questions train.
        """
        drawn: Graded | None = None
        questions, wanted, attempts = item["questions"], len(item["questions"]) * ranks(), 0
        while True:
            with profile("rollout"):
                completions = self.draw(policy, questions, item["rollout"], attempts)
            with profile("reward"):
                graded = self.grade(questions, completions)
            drawn, attempts = graded if drawn is None else drawn + graded, attempts + 1
            chosen = self.choose(drawn, attempts, wanted)
            if chosen is not None:
                return drawn, chosen
            questions = more()

    def draw(self, policy: Policy, questions: list[Question], rollout: int, attempt: int = 0) -> list[list[Completion]]:
        """Responses to each question, the same whatever the number of ranks; a demonstration may take one's place."""
        again = (attempt,) if attempt else ()
        keys = [stable_key(self.seed.value, "rl", rollout, q.id, *again) for q in questions]
        prompts = [q.prompt for q in questions]
        n = self.group_size - (self.mixing is not None and self.mixing.in_group)
        return draw(self.engine, policy, self.tokenizer, prompts, keys, n, self.sampling)

    def grade(self, questions: list[Question], completions: list[list[Completion]]) -> Graded:
        """Grade responses; one that did not end by itself gets at most 0 (MIFO, buffer rule); collective.

        Raises:
            InputError: Every check of all ranks failed.
        """
        flat = [c for group in completions for c in group]
        texts = response_texts(self.tokenizer, [c.tokens for c in flat], self.sampling.stop)
        asked = [q for q, group in zip(questions, completions, strict=True) for _ in group]
        watch = FailureWatch(self.reward)
        scores = grade_answers(self.reward, asked, texts, [len(c.tokens) for c in flat], [c.finished for c in flat])
        watch.end(len(flat), "the responses of an RL step")
        rewards, judged, *parts = (
            torch.tensor(values).view(len(questions), -1)
            for values in (scores.rewards, scores.judged, *scores.components.values())
        )
        components = dict(zip(scores.components, parts, strict=True))
        own_judge = judged if self.reward.solved_by is not None else None
        return Graded(questions, completions, rewards, self.solved_at, own_judge, components)

    def choose(self, graded: Graded, attempts: int, wanted: int) -> Chosen | None:
        """Which of this rank's questions train; None if dynamic sampling wants further questions; collective.

        Args:
            graded: All that was drawn for this RL step so far, on this rank.
            attempts: How many batches of questions that were.
            wanted: Groups that the RL step trains on, over all ranks.
        """
        if not self.settings.dynamic_sampling:
            everything = list(range(len(graded.questions)))
            return Chosen(everything, everything, len(everything))
        # dealt out like cards: the order, and with it the choice, is that of a single process
        flags = [flag for row in zip(*gather_ranks(graded.undecided.tolist()), strict=True) for flag in row]
        chosen = [i for i, flag in enumerate(flags) if flag][:wanted]
        if len(chosen) < wanted and attempts < self.settings.dynamic_sampling:
            return None
        if len(chosen) < wanted and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"model.policy.dynamic_sampling: {attempts} batches of questions gave {len(chosen)} of {wanted} groups "
                "with unequal rewards, so a step trains on fewer (rollout/groups_trained says how many); set more "
                "batches, or questions that are neither solved nor hopeless"
            )
        mine = [(i // ranks(), place) for place, i in enumerate(chosen) if i % ranks() == rank()]
        # a rank without any group still takes part: a group without a signal weighs nothing
        picked, places = zip(*(mine or [(0, 0)]), strict=True)
        return Chosen(list(picked), list(places), max(len(chosen), 1))

    def prepare(self, policy: Policy, item: WorkItem, drawn: Graded, chosen: Chosen) -> Rollout:
        """Pack rows, advantages and weights and, where the updates need them, old and reference log-probabilities."""
        device, temperature = policy.device, self.sampling.temperature
        graded = drawn.select(chosen.picked)
        rows = training_rows(graded, self.settings, self.mixing, self._demonstration_rewards(graded))
        prompts = [graded.questions[i].prompt for i in rows.question.tolist()]
        sequences = Sequences.pack(prompts, rows.tokens, padding(self.tokenizer)).to(device)
        minibatch = torch.tensor(chosen.place)[rows.question] * item["minibatches"] // chosen.total
        weights = self._weights(rows, sequences.mask(), minibatch.to(device), item["minibatches"])
        rollout = Rollout(
            sequences=sequences,
            advantages=rows.advantages.to(device),
            weight=weights["policy"],
            minibatch=minibatch.to(device),
            active=rows.active.to(device),
            question=torch.tensor([graded.questions[i].id for i in rows.question.tolist()], device=device),
        )
        if self.mixing is not None:
            rollout.demonstrated, rollout.sft_weight = rows.demonstrated.to(device), weights["sft"]
        if self.settings.entropy_bonus and self.settings.aggregation == "sum":
            rollout.bonus_weight = weights["bonus"]
        masked = self.settings.entropy_fraction < 1
        if item["updates"] > 1 or masked:
            logp, entropy = score_without_gradient(policy, sequences, temperature)
            # with a single update the ratio is 1 by definition; scores of another batch shape would only add rounding
            rollout.logp_old = logp if item["updates"] > 1 else None
            rollout.keep = self._forking_tokens(entropy, rollout, item["minibatches"]) if masked else None
        for reference in self.references:
            reference.to(device)
            rollout.logp_ref = score_without_gradient(reference, sequences, temperature)[0]
        return rollout

    def _demonstration_rewards(self, graded: Graded) -> Tensor | None:
        """[Q] fp32 rewards of the demonstrations by the verifier that grades rollouts, if they are in groups."""
        if self.mixing is None or not self.mixing.in_group:
            return None
        shown = [i for i, q in enumerate(graded.questions) if q.demonstration]
        responses = [graded.questions[i].demonstration or [] for i in shown]
        texts = response_texts(self.tokenizer, responses)
        rewards = torch.zeros(len(graded.questions))
        if shown:
            questions = [graded.questions[i] for i in shown]
            scores = grade_answers(self.reward, questions, texts, [len(r) for r in responses])
            rewards[shown] = torch.tensor(scores.rewards)
        return rewards

    def _weights(self, rows: Rows, mask: Tensor, minibatch: Tensor, minibatches: int) -> dict[str, Tensor]:
        """[B, L] weights of the `policy` loss, the `sft` loss and a `bonus` that is a mean over tokens.

        They are made of the counts of each whole optimizer step.
        """
        device, s = mask.device, self.settings
        in_policy, demonstrated = rows.in_policy.to(device), rows.demonstrated.to(device)
        own = rows.active.to(device) & ~demonstrated  # with a bonus all are active whose rollouts train
        lengths = mask.sum(-1)
        questions = torch.zeros_like(in_policy)
        questions[torch.searchsorted(rows.question, rows.question.unique()).to(device)] = True
        counted = torch.stack(
            [in_policy, in_policy * lengths, demonstrated, demonstrated * lengths, questions, own * lengths]
        ).double()
        counts = torch.zeros(6, minibatches, device=device, dtype=torch.double).index_add_(1, minibatch, counted)
        counts = sum_over(counts, world_group())
        weights = {name: torch.zeros(mask.shape, device=device) for name in ("policy", "sft", "bonus")}
        for m, (sequences, tokens, shown, shown_tokens, asked, own_tokens) in enumerate(counts.T.tolist()):
            here = minibatch == m
            weights["policy"][here] = token_weights(
                mask[here] & in_policy[here, None],
                s.aggregation,
                sequences=max(sequences, 1.0),
                tokens=max(tokens, 1.0),
                max_length=self.sampling.max_new_tokens,
                sum_sequences=s.sum_sequences,
            )
            weights["bonus"][here] = (mask[here] & own[here, None]) / max(own_tokens, 1.0)
            if shown:
                # failed questions lend at full weight, as HPT has it: how many there are does not matter
                share = 1.0 if self.mixing is not None and self.mixing.questions == "failed" else shown / asked
                weights["sft"][here] = (mask[here] & demonstrated[here, None]) * (share / shown_tokens)
        return weights

    def _forking_tokens(self, entropy: Tensor, rollout: Rollout, minibatches: int) -> Tensor:
        """[B, L] bool: the tokens of highest entropy of each optimizer step, over all ranks, and all demonstrations."""
        keep = torch.zeros_like(rollout.weight, dtype=torch.bool)
        mask = rollout.weight > 0
        if rollout.demonstrated is not None:
            keep |= rollout.demonstrated[:, None]
            mask = mask & ~rollout.demonstrated[:, None]
        for m in range(minibatches):
            rows = rollout.minibatch == m
            fraction = self.settings.entropy_fraction
            keep[rows] |= select_tokens(entropy[rows], mask[rows], fraction=fraction, group=world_group()).mask
        return keep

    def micro_batch(self, rollout: Rollout, item: WorkItem) -> Rollout:
        """The rows that the update of `item` works on in its micro-batch.

        Rows that cannot give a gradient, those of advantage 0 above all, are left out; they still count.
        """
        rows = (rollout.minibatch == item["update"] % item["minibatches"]).nonzero()[:, 0]
        active = rows[rollout.active[rows]]
        mine = active.tensor_split(item["micro_batches"])[item["micro"]]
        if len(mine):
            return rollout.rows(mine)
        # every rank runs every backward: one row that weighs nothing gives gradients of exactly 0
        part = rollout.rows(torch.zeros(1, dtype=torch.long, device=rows.device))
        nothing = torch.zeros_like(part.weight)
        others: dict[str, Any] = {k: nothing for k in ("sft_weight", "bonus_weight") if getattr(part, k) is not None}
        return replace(part, weight=nothing, **others)

    def loss(self, part: Rollout, logp: Tensor, entropy: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Policy loss, KL, entropy bonus and the SFT loss on demonstrations, of one micro-batch.

        Args:
            part: From `micro_batch`.
            logp: [B, L] log-probabilities in nats, with gradient.
            entropy: [B, L] entropies in nats, with gradient if there is a bonus.
            step: Number of the RL step, from 0.
        """
        s, mixing = self.settings, self.mixing
        own = part.weight
        advantages = part.advantages
        if part.demonstrated is not None and mixing is not None:
            own = part.weight.masked_fill(part.demonstrated[:, None], 0.0)
            if mixing.own == "sign":
                factor = mixing.positive_weight * mean_over(entropy, own > 0)[:, 0].exp()
                advantages = torch.where(~part.demonstrated & (advantages > 0), advantages * factor, advantages)
        loss, metrics = policy_loss(
            logp,
            logp.detach() if part.logp_old is None else part.logp_old,
            advantages,
            part.weight,
            surrogate=s.surrogate,
            ratio=s.ratio,
            clip_low=s.clip_low,
            clip_high=s.clip_high,
            ratio_cap=s.ratio_cap,
            keep=part.keep,
            demonstrated=part.demonstrated,
            shape=mixing.shape if mixing else 0.1,
        )
        if part.logp_ref is not None:
            kl = (kl_k3(logp, part.logp_ref) * own).sum()
            loss, metrics["kl_ref"] = loss + s.kl_coefficient * kl, kl.detach()
        if s.entropy_bonus:
            bonus = (entropy * (own if part.bonus_weight is None else part.bonus_weight)).sum()
            loss, metrics["entropy"] = loss - s.entropy_bonus * bonus, bonus.detach()
        if mixing is not None and part.sft_weight is not None and (mu := mixing.sft_at(step)):
            weight = sft_weights(mixing.token_weight, logp, entropy, part.sft_weight > 0)
            sft, described = sft_loss(logp, part.sft_weight, 1.0, weight)
            loss, metrics["sft_loss"] = (1 - mu if mixing.convex else 1) * loss + mu * sft, described["loss"]
        return loss, metrics
