"""Evaluation by sampling: avg@k, pass@k, greedy accuracy, length, truncation and loss on demonstrations."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from mifo_lightning.common.errors import InputError, require
from mifo_lightning.common.question import Question
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.scoring import score_without_gradient
from mifo_lightning.rewards.grading import FailureWatch, grade_answers
from mifo_lightning.rewards.marker import MarkedReward
from mifo_lightning.rollout.at_k import AverageAtK, PassAtK
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.graded import Graded
from mifo_lightning.rollout.respond import Responder

WITHOUT_MARKER, STRICT, WHOLE_TEXT = MARKER_METRICS = ("without_marker", "strict", "whole_text")


@dataclass(frozen=True)
class EvaluationSampling:
    """How evaluation draws responses; what is null is as in rollouts, `model.rollout.sampling`.

    Args:
        temperature: Logits are divided by it; 0 takes the most likely token. Evaluation's own.
        top_p: Keep the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: Keep the k most likely tokens; 0 keeps all.
        max_new_tokens: Longest response in tokens; null: as rollouts.
        stop: Strings that end a response; null: those of rollouts.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None
    stop: list[str] | None = None


def beside(own: EvaluationSampling | Sampling, rollouts: Sampling) -> Sampling:
    """How evaluation draws: as its own settings say and, where they are null, as rollouts are drawn."""
    longest = rollouts.max_new_tokens if own.max_new_tokens is None else own.max_new_tokens
    return Sampling(own.temperature, own.top_p, own.top_k, longest, rollouts.stop if own.stop is None else own.stop)


@dataclass(frozen=True)
class Evaluation:
    """How validation and test draw responses.

    Args:
        samples: Sampled responses per question: n of avg@n and of the unbiased pass@k; 0 draws none.
        greedy: Whether to add one greedy response per question.
        sampling: How the sampled responses are drawn; the greedy one shares its length limit and stop strings.
        demonstration_loss: Whether to measure the loss on demonstrations, where questions have one.
    """

    samples: int = 1
    greedy: bool = True
    sampling: EvaluationSampling = field(default_factory=EvaluationSampling)
    demonstration_loss: bool = True

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        beside(self.sampling, Sampling()).check(f"{key}.sampling")
        some = self.samples >= 1 or (self.samples == 0 and self.greedy)
        require(f"{key}.samples", self.samples, some, "at least 1, or 0 with greedy true")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise InputError(
                f"{key}.samples: {self.samples} samples at temperature 0 are all the same; set a temperature"
            )


class SourceScores:
    """The metrics of one data source.

    Args:
        samples: Sampled responses per question.
        greedy: Whether there is a greedy response.
        device: Where they count.
        parts: Names of further means.
    """

    def __init__(self, samples: int, greedy: bool, device: torch.device, parts: Collection[str] = ()) -> None:
        self.at_k: dict[str, AverageAtK | PassAtK] = {"greedy": AverageAtK()} if greedy else {}
        if samples:
            self.at_k[f"avg@{samples}"] = AverageAtK()
            tries = {2**i for i in range(1, samples.bit_length()) if 2**i < samples} | {samples}
            self.at_k.update({f"pass@{k}": PassAtK(k) for k in sorted(tries) if k > 1})
        self.means = {name: MeanMetric() for name in ("length", "truncated", "demonstration_loss", *parts)}
        for metric in (*self.at_k.values(), *self.means.values()):
            metric.to(device)

    def values(self) -> dict[str, Tensor]:
        """All metrics, synchronised over ranks; those that saw nothing are left out."""
        computed = {name: metric.compute() for name, metric in (*self.at_k.items(), *self.means.items())}
        return {name: value for name, value in computed.items() if not value.isnan()}


class Evaluator:
    """Draws and grades responses to evaluation questions and keeps score per source and overall.

    Args:
        responder: Draws and grades responses; every evaluation of a run draws with the same randomness.
        settings: How to draw.
        rollouts: How rollouts are drawn, which evaluation follows in what its own settings leave open.
    """

    def __init__(self, responder: Responder, settings: Evaluation, rollouts: Sampling = Sampling()) -> None:
        self.sampling = beside(settings.sampling, rollouts)
        self.responder, self.settings = responder, settings
        self.reward, self.success_threshold = responder.reward, responder.success_threshold
        self.watch, self.checked, self.warned = FailureWatch(self.reward), 0, False
        self.sources: list[str] = []
        self.scores: list[SourceScores] = []

    def reset(self, sources: list[str], device: torch.device) -> None:
        """Begin an evaluation of these sources; the last entry of `scores` is over all of them."""
        self.sources = sources
        samples, greedy = self.settings.samples, self.settings.greedy
        parts = [f"reward/{name}" for name in self.reward.components]
        if isinstance(self.reward.judge, MarkedReward) and self.reward.judge.opener:
            parts += MARKER_METRICS
        self.scores = [SourceScores(samples, greedy, device, parts) for _ in (*sources, "all")]
        self.watch.begin()
        self.checked = 0

    def update(self, policy: Policy, questions: list[Question], source: int) -> list[dict[str, Any]]:
        """Add questions of one source; returns one graded sample per question as text."""
        samples: list[dict[str, Any]] = []
        if self.settings.samples:
            samples = self._respond(policy, questions, source, self.settings.samples, greedy=False)
        if self.settings.greedy:
            greedy = self._respond(policy, questions, source, 1, greedy=True)
            samples = samples or greedy
        if self.settings.demonstration_loss:
            self._demonstration_loss(policy, questions, source)
        return samples

    def compute(self, stage: str) -> dict[str, Tensor]:
        """`<stage>/<source>/<metric>`, `<stage>/<metric>` over all questions, and `<stage>/<metric>_macro`; collective.

        The last is the mean over the sources that have the metric, each counting the same; there from two sources on.

        Raises:
            InputError: Every check of the reward failed.
        """
        self.watch.end(self.checked, f"the responses of `{stage}`")
        found = [scores.values() for scores in self.scores]
        if not found[-1].get(WITHOUT_MARKER, torch.zeros(())) > 0:  # decided once: a macro mean takes all sources
            found = [{name: v for name, v in values.items() if name not in MARKER_METRICS} for values in found]
        self._warn(found[-1])
        names = [f"{stage}/{name}" for name in self.sources] + [stage]
        metrics = {
            f"{name}/{metric}": value.float()
            for name, values in zip(names, found, strict=True)
            for metric, value in values.items()
        }
        if len(self.sources) > 1:
            for metric in found[-1]:
                each = [values[metric].float() for values in found[:-1] if metric in values]
                metrics[f"{stage}/{metric}_macro"] = torch.stack(each).mean()
        return metrics

    def _respond(
        self, policy: Policy, questions: list[Question], source: int, n: int, *, greedy: bool
    ) -> list[dict[str, Any]]:
        sampling = self._greedy_sampling() if greedy else self.sampling
        graded = self._graded(policy, questions, n, sampling)
        flat = [c for group in graded.completions for c in group]
        if not flat:
            return []
        self.checked += len(flat)
        correct = graded.correct.to(policy.device).sum(-1)
        means = {f"reward/{name}": values.flatten() for name, values in graded.components.items()}
        if unknown := sorted(means.keys() - self.scores[source].means.keys()):
            name = unknown[0].removeprefix("reward/")
            raise InputError(
                f"reward: {type(self.reward).__name__} has the component {name!r} only once it has graded; its "
                "constructor must name all of `components`"
            )
        if not greedy or not self.settings.samples:
            means |= self._marker(graded)
        for scores in (self.scores[source], self.scores[-1]):
            for name, metric in scores.at_k.items():
                if (name == "greedy") == greedy:
                    metric.update(correct, n)
            if not greedy or not self.settings.samples:
                scores.means["length"].update(torch.tensor([float(len(c.tokens)) for c in flat]))
                scores.means["truncated"].update(torch.tensor([float(not c.finished) for c in flat]))
                for name, values in means.items():
                    scores.means[name].update(values)
        return [graded.samples(i)[0] for i in range(len(questions))]

    def greedy_correct(self, policy: Policy, questions: list[Question]) -> Tensor:
        """Whether the greedy response to each of this rank's questions is correct, [n] bool; collective.

        Adds nothing to the scores.
        """
        return self._graded(policy, questions, 1, self._greedy_sampling()).correct.flatten()

    def _greedy_sampling(self) -> Sampling:
        return Sampling(0.0, max_new_tokens=self.sampling.max_new_tokens, stop=self.sampling.stop)

    def _graded(self, policy: Policy, questions: list[Question], n: int, sampling: Sampling) -> Graded:
        """n responses to each question."""
        keys = [self.responder.key("evaluation", q.source, q.id) for q in questions]
        return self.responder.respond(policy, questions, keys, n, sampling)

    def _marker(self, graded: Graded) -> dict[str, Tensor]:
        """Of each response, as 0 or 1: its thought never ended; it is correct strictly; it is by its whole text."""
        judge = self.reward.judge
        if not (isinstance(judge, MarkedReward) and judge.opener):
            return {}
        texts = [text for group in graded.texts for text in group]
        flat = [c for group in graded.completions for c in group]
        questions = [q for q, group in zip(graded.questions, graded.texts, strict=True) for _ in group]
        unended = judge.unended(texts, [q.text for q in questions])
        strict = [
            float(right and not no_end)
            for right, no_end in zip(graded.correct.flatten().tolist(), unended, strict=True)
        ]
        whole = list(strict)
        if lost := [i for i, no_end in enumerate(unended) if no_end]:
            with judge.grading_as("whole"):
                lengths, finished = [len(flat[i].tokens) for i in lost], [flat[i].finished for i in lost]
                again = grade_answers(judge, [questions[i] for i in lost], [texts[i] for i in lost], lengths, finished)
            for i, value in zip(lost, again.judged, strict=True):
                whole[i] = float(value >= self.success_threshold)
        found = {WITHOUT_MARKER: [float(no_end) for no_end in unended], STRICT: strict, WHOLE_TEXT: whole}
        return {name: torch.tensor(values) for name, values in found.items()}

    def _warn(self, values: dict[str, Tensor]) -> None:
        """Say once if most thoughts never end: then the score, and the buffer, are about the marker."""
        if self.warned or values.get(WITHOUT_MARKER, torch.zeros(())) <= 0.5:
            return
        self.warned = True
        share, strict, whole = (float(values[name]) for name in MARKER_METRICS)
        rank_zero_warn(
            f"{share:.0%} of the responses open a thought and never end it: {strict:.3f} are correct if those count as "
            f"wrong, {whole:.3f} by their whole text; in training nearly every question would enter the buffer. Longer "
            f"responses help, or `missing_marker: whole` of the reward"
        )

    def _demonstration_loss(self, policy: Policy, questions: list[Question], source: int) -> None:
        """Mean negative log-likelihood in nats per demonstration token."""
        nll, tokens = self.demonstration_nll(policy, questions)
        nll = torch.where(nll.isnan(), torch.inf, nll)  # which a mean shows; what is no number would be left out of it
        if tokens:
            for scores in (self.scores[source], self.scores[-1]):
                scores.means["demonstration_loss"].update(nll / tokens, tokens)

    def demonstration_nll(self, policy: Policy, questions: list[Question]) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood in nats of this rank's demonstrations, and their tokens; collective."""
        shown = [q for q in questions if q.demonstration]
        with policy.sampling():
            if not shown:
                return torch.zeros((), device=policy.device), torch.zeros((), device=policy.device)
            pad = padding(self.responder.tokenizer)
            sequences = Sequences.pack([q.prompt for q in shown], [q.demonstration or [] for q in shown], pad)
            logp, _ = score_without_gradient(policy, sequences.to(policy.device), temperature=1.0)
            return -logp.sum(), sequences.response_lengths.sum().to(policy.device).float()
