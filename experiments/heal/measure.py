"""What a model with given weights can do: accuracies, losses, and how much RL would have to work with."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from experiments.heal.settings import Study
from experiments.prune_update import Weights, evaluate, make_run
from mifo_callbacks import Seed
from mifo_lightning.common.question import Question
from mifo_lightning.lab.grid import flags
from mifo_lightning.losses.advantages import as_advantage

AT_ONCE = 64  # questions whose groups are drawn together


class Bench:
    """Evaluates weights of one architecture on the questions of one split.

    Every evaluation draws with the same randomness, so that differences between weights are no differences of draws.

    Args:
        study: Says what is evaluated, and which metrics are kept.
        base: The name of a base model, for its architecture and tokenizer.
        split: A key of `evaluation`: val or test.
        losses: Whether losses on demonstrations are measured, where the configuration has them.
        changes: Keys and values laid over those of the split.
    """

    def __init__(
        self, study: Study, base: str, split: str, losses: bool = True, changes: Mapping[str, Any] | None = None
    ) -> None:
        values = {**study.set, **study.evaluation[split], **(changes or {})}
        if not losses:
            values["model.evaluation.demonstration_loss"] = False
        self.study, self.run = study, make_run(study.config, study.bases[base], flags(values))
        self.own_seed = self.run.model.responder.seed

    def evaluate(self, weights: Weights, draw: int = 0, metrics: Sequence[str] | None = None) -> dict[str, float]:
        """The metrics that the questions have, the study's unless others are given.

        Another `draw`: other responses to the same questions.
        """
        self.run.model.responder.seed = Seed(draw, "draw") if draw else self.own_seed
        found = evaluate(self.run, weights)
        return {key: found[key] for key in metrics or self.study.metrics if key in found}

    def questions(self) -> dict[str, int]:
        """How many different questions are evaluated of each source, orderings of one once; after an evaluation.

        Four cards in another order are no other hand: answers to both say nearly as much as one.
        """
        limit = self.run.trainer.limit_val_batches
        counts = {}
        for source, loader in self.run.datamodule.val_dataloader().items():
            most = limit if isinstance(limit, int) else int(limit * len(loader))
            asked = [question for batch in loader.batches[:most] for question in batch]
            counts[source] = len({tuple(sorted(question.prompt)) for question in asked})
        return counts

    def training_questions(self) -> list[Question]:
        """Those that the configuration trains on, in order; after an evaluation."""
        self.run.datamodule.setup("fit")
        return self.run.datamodule.train_dataloader().questions

    def trained_tokens(self) -> list[int]:
        """Every token of a prompt or a demonstration that is trained on, ascending; after an evaluation."""
        found: set[int] = set()
        for question in self.training_questions():
            found.update(question.prompt, question.demonstration or [])
        return sorted(found)

    def signal(self, count: int) -> dict[str, float]:
        """`describe` of a group for each of the first training questions, by the weights that were evaluated last."""
        module = self.run.model
        chosen, rewards = self.training_questions()[:count], []
        with self._as_in_evaluation():
            for i in range(0, len(chosen), AT_ONCE):
                part = chosen[i : i + AT_ONCE]
                keys = [module.responder.key("signal", q.source, q.id) for q in part]
                size = module.reinforcement.group_size
                graded = module.responder.respond(module.policy, part, keys, size, module.sampling)
                rewards.append(graded.rewards)
        advantages = as_advantage(module.reinforcement.settings.advantage)(torch.cat(rewards))
        return describe(torch.cat(rewards), advantages)

    @contextmanager
    def _as_in_evaluation(self) -> Iterator[None]:
        """The model where and in the precision in which it is evaluated, without gradient."""
        module, trainer = self.run.model, self.run.trainer
        module.policy.to(trainer.strategy.root_device)
        module.policy.eval()
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            yield


def describe(rewards: torch.Tensor, advantages: torch.Tensor) -> dict[str, float]:
    """How much RL would have to work with.

    `groups with signal`: share of groups whose rewards are not all equal, so that an advantage is not 0. `positive`:
    share of responses with a reward above 0. `advantage entropy`: H = -sum_a p(a) ln p(a) in nats over the different
    advantages of all responses, rounded to four decimals; the paper does not say its formula, this is ours. With binary
    rewards and G responses there are at most 2 G - 1 different ones.

    Args:
        rewards: [N, G], a question a row.
        advantages: [N, G], what RL makes of them.
    """
    _, counts = torch.unique((advantages * 1e4).round(), return_counts=True)
    p = counts.double() / counts.sum()
    return {
        "groups with signal": float((rewards != rewards[:, :1]).any(-1).double().mean()),
        "positive": float((rewards > 0).double().mean()),
        "advantage entropy": float(-(p * p.log()).sum()) + 0.0,
    }
