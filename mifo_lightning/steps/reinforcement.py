"""One RL step up to its `Batch`, without Lightning: draw, grade, choose, prepare."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mifo_callbacks.collectives import gather_ranks, mean_ranks, rank, ranks
from mifo_callbacks.sharding import full_on_first_rank
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import WorkItem
from mifo_lightning.losses.corrections import as_correction
from mifo_lightning.losses.kl import KL_ESTIMATORS
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.scoring import score_without_gradient
from mifo_lightning.rollout.engine import Completion
from mifo_lightning.rollout.graded import Chosen, Graded
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.rollout.settings import Rollout
from mifo_lightning.steps.batch import Batch
from mifo_lightning.steps.objective import Objective
from mifo_lightning.steps.reference import follow, take
from mifo_lightning.steps.rl_batch import forking_tokens, rl_batch
from mifo_lightning.steps.rows import as_completion, training_rows
from mifo_lightning.steps.settings import PolicyLoss, check_rl

More = Callable[[], list[Question]]
Profile = Callable[[str], AbstractContextManager[None]]


class Fresh(NamedTuple):
    """What is new where a rollout was drawn.

    Attributes:
        drawn: All that was drawn.
        work: Tokens that were `generated`, and `scored` without a gradient.
        metrics: What is logged of it, over all ranks.
    """

    drawn: Graded
    work: dict[str, int]
    metrics: dict[str, float]


class Reinforcement:
    """Everything of an RL step but the forward pass with a gradient.

    Args:
        responder: Draws and grades responses.
        rollout: How rollouts are drawn.
        settings: The policy loss.
        mixing: How demonstrations are mixed into RL steps; None mixes none in.

    Raises:
        InputError: If a setting is impossible.
    """

    def __init__(
        self, responder: Responder, rollout: Rollout, settings: PolicyLoss, mixing: Mixing | None = None
    ) -> None:
        check_rl(rollout, settings, mixing)
        self.responder, self.sampling, self.settings = responder, rollout.sampling, settings
        self.group_size, self.mixing = rollout.group_size, mixing
        # in a list: the reference is no part of the module, its parameters no part of checkpoints
        self.references: list[Policy] = []
        weight: dict[str, Any] = {} if mixing is None else {"sft_weight": mixing.token_weight}
        self.objective = Objective(
            settings.objective(),
            settings.ratio,
            correction=as_correction(settings.correction),
            mixing=mixing,
            kl=KL_ESTIMATORS[settings.kl_estimator],
            **weight,
        )
        self._under_way: Batch | None = None  # a rollout with updates to come, or the last one being done
        self._used_up = False
        self._warned = False  # of dynamic sampling that came to its end

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or the reward has a KL term."""
        return self.settings.kl_coefficient > 0

    def set_reference(self, reference: Policy | None) -> None:
        """Keep the frozen initial model for the KL term."""
        self.references = [] if reference is None else [reference.requires_grad_(False)]

    def sync_reference(self, policy: Policy, steps: int) -> None:
        """Let the reference follow the policy if, after so many RL optimizer steps, it is time."""
        every = self.settings.reference_sync_steps
        if every and steps % every == 0:
            for reference in self.references:
                kept = dict(reference.to(policy.device).named_parameters())
                follow(kept, dict(policy.named_parameters()), self.settings.reference_mixup)

    def reference_state(self) -> dict[str, Tensor]:
        """Weights of a reference that follows the policy, on the first rank; collective."""
        kept = self.references if self.settings.reference_sync_steps else []
        return full_on_first_rank({name: p.detach() for each in kept for name, p in each.named_parameters()})

    def load_reference(self, state: dict[str, Tensor]) -> None:
        """Go on with the reference of a checkpoint; without one it stays the initial model."""
        for reference in self.references if state else []:
            take(dict(reference.named_parameters()), state)

    def batch(self, policy: Policy, item: WorkItem, more: More, profile: Profile) -> "tuple[Batch, Fresh | None]":
        """What the rollout under way trains on, and what is new of it: its first update draws it; collective then.

        Args:
            policy: The model.
            item: One update of an RL step.
            more: Gives this rank's share of the next batch of questions.
            profile: Measures an activity by name.
        """
        fresh = None
        if item["update"] == 0:
            self._under_way = None  # the old one is not needed while the new one is made
            start = time.perf_counter()
            drawn, chosen = self.roll_out(policy, item, more, profile)
            seconds = time.perf_counter() - start
            with profile("score"):
                self._under_way = self.prepare(policy, item, drawn, chosen)
            work = self.work(drawn, self._under_way)
            fresh = Fresh(drawn, work, self.describe(drawn, self._under_way, seconds))
        assert self._under_way is not None, "the loader begins every rollout with its first update"
        self._used_up = item["update"] + 1 == item["updates"]
        return self._under_way, fresh

    def end_update(self) -> None:
        """Let go of a rollout whose last update is done: no checkpoint need hold it."""
        if self._used_up:
            self._under_way = None

    def state_dict(self) -> dict[str, Any] | None:
        """This rank's rollout under way, as plain types and tensors; None between two."""
        return None if self._under_way is None else self._under_way.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None, device: torch.device) -> None:
        """Go on inside that rollout."""
        self._under_way = None if state is None else Batch.from_state_dict(state, device)

    def roll_out(self, policy: Policy, item: WorkItem, more: More, profile: Profile) -> tuple[Graded, Chosen]:
        """Draw and grade until there is enough to train on; collective. Arguments as in `batch`.

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
        keys = [self.responder.key("rl", rollout, q.id, *again) for q in questions]
        n = self.group_size - (self.mixing is not None and self.mixing.in_group)
        return self.responder.draw(policy, [q.prompt for q in questions], keys, n, self.sampling)

    def grade(self, questions: list[Question], completions: list[list[Completion]]) -> Graded:
        """Grade responses; one that did not end by itself gets at most 0 (MIFO, buffer rule); collective.

        Raises:
            InputError: Every check of all ranks failed.
        """
        return self.responder.grade(questions, completions, self.sampling.stop, "the responses of an RL step")

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
                f"model.loss.dynamic_sampling: {attempts} batches of questions gave {len(chosen)} of {wanted} groups "
                "with unequal rewards, so a step trains on fewer (rollout/groups_trained says how many); set more "
                "batches, or questions that are neither solved nor hopeless"
            )
        mine = [(i // ranks(), place) for place, i in enumerate(chosen) if i % ranks() == rank()]
        # a rank without any group still takes part: a group without a signal weighs nothing
        picked, places = zip(*(mine or [(0, 0)]), strict=True)
        return Chosen(list(picked), list(places), max(len(chosen), 1))

    def prepare(self, policy: Policy, item: WorkItem, drawn: Graded, chosen: Chosen) -> Batch:
        """Pack rows, advantages and weights and, where the updates need them, old and reference log-probabilities."""
        settings, minibatches = self.settings, item["minibatches"]
        graded = drawn.select(chosen.picked)
        scales = (1.0, 0.0) if self.mixing is None else self.mixing.scales(item["rollout"])
        shown = self._demonstration_rewards(graded)
        rows = training_rows(graded, settings, self.mixing, shown, scales[1] > 0)
        questions = [graded.questions[i] for i in rows.question.tolist()]
        sequences = Sequences.pack([q.prompt for q in questions], rows.tokens, padding(self.responder.tokenizer))
        minibatch = torch.tensor(chosen.place)[rows.question] * minibatches // chosen.total
        sequences, minibatch = sequences.to(policy.device), minibatch.to(policy.device)
        longest, charged = self.sampling.max_new_tokens, None
        if settings.kl_in_reward:
            charged = self._charged(policy, sequences)
            taken = charged.cpu().view_as(graded.rewards)
            rows = training_rows(graded, settings, self.mixing, shown, scales[1] > 0, taken)
        batch = rl_batch(rows, sequences, minibatch, minibatches, scales, settings, self.mixing, longest)
        batch.question = torch.tensor([q.id for q in questions], device=policy.device)
        batch.temperature, batch.charged = self.sampling.temperature, charged
        if self._corrects(policy):
            if unlike := [(len(t), len(x)) for t, x in zip(rows.tokens, rows.logp, strict=True) if len(t) != len(x)]:
                engine = type(self.responder.engine).__name__
                raise InputError(
                    f"model.loss.correction: {engine} gave {unlike[0][1]} log-probabilities for a response of "
                    f"{unlike[0][0]} tokens; it needs one for each"
                )
            padded = pad_sequence([torch.tensor(logp) for logp in rows.logp], batch_first=True)
            batch.logp_sampler = padded.to(policy.device)
        masked = settings.entropy_fraction < 1
        if item["updates"] > 1 or masked:
            logp, entropy = score_without_gradient(policy, sequences, batch.temperature, grouped=True)
            # with a single update the ratio is 1 by definition; scores of another batch shape would only add rounding
            batch.logp_old = logp if item["updates"] > 1 else None
            batch.keep = forking_tokens(entropy, batch, minibatches, settings.entropy_fraction) if masked else None
        if charged is None and (self.references or (self.needs_reference and policy.adapter is not None)):
            with self._reference(policy) as reference:
                batch.logp_ref = score_without_gradient(reference, sequences, batch.temperature, grouped=True)[0]
        return batch

    def _charged(self, policy: Policy, sequences: Sequences) -> Tensor:
        """[B] fp32: the KL of each whole response, under the policy that sampled, by its coefficient."""
        now = score_without_gradient(policy, sequences, self.sampling.temperature, grouped=True)[0]
        with self._reference(policy) as reference:
            then = score_without_gradient(reference, sequences, self.sampling.temperature, grouped=True)[0]
        kl = KL_ESTIMATORS[self.settings.kl_estimator](now, then)
        return self.settings.kl_coefficient * (kl * sequences.mask()).sum(-1)

    @contextmanager
    def _reference(self, policy: Policy) -> Iterator[Policy]:
        """The initial model: the kept one, or the policy itself without its adapter."""
        if policy.adapter is None:
            yield self.references[0].to(policy.device)
        else:
            with policy.adapter.disabled():
                yield policy

    def _corrects(self, policy: Policy) -> bool:
        """Whether the engine drew from other numerics than those that train, or is said to have done so."""
        if self.settings.correction != "auto":
            return self.settings.correction is not None
        with policy.numerics():
            mixed = torch.is_autocast_enabled(policy.device.type)
        return mixed or self.responder.own_numerics

    def _demonstration_rewards(self, graded: Graded) -> Tensor | None:
        """[Q] fp32 rewards of the demonstrations by the verifier that grades rollouts, if they are in groups."""
        if self.mixing is None or not self.mixing.in_group:
            return None
        shown = [q for q in graded.questions if q.demonstration]
        rewards = torch.zeros(len(graded.questions))
        if shown:
            where = torch.tensor([bool(q.demonstration) for q in graded.questions])
            rewards[where] = self.responder.grade(shown, [[as_completion(q)] for q in shown], []).rewards[:, 0]
        return rewards

    def describe(self, drawn: Graded, batch: Batch, seconds: float) -> dict[str, float]:
        """What is logged of a fresh rollout, as means or sums over all ranks; collective.

        Args:
            drawn: All that was drawn.
            batch: What trains.
            seconds: That drawing and grading took here.
        """
        assert batch.advantages is not None, "an RL step has advantages"
        rest = {
            "advantage_abs": float(batch.advantages.abs().mean()),
            "tokens_per_s": drawn.tokens / max(seconds, 1e-9) * ranks(),
            "groups_trained": float(batch.question[batch.active].unique().numel() * ranks()),
            "reward_errors": float(self.responder.reward.errors * ranks()),
            "reward_timeouts": float(self.responder.reward.timeouts * ranks()),
        }
        if batch.charged is not None:
            rest["kl_penalty"] = float(batch.charged.mean())
        device = batch.question.device
        return drawn.describe(device) | mean_ranks(rest, device)

    def work(self, drawn: Graded, batch: Batch) -> dict[str, int]:
        """Tokens that drawing ran through the model, and those that were scored without a gradient."""
        scored = (batch.logp_old is not None or batch.keep is not None) + (batch.logp_ref is not None)
        scored += 2 * (batch.charged is not None)
        return {"generated": drawn.tokens, "scored": scored * batch.sequences.token_count()}
