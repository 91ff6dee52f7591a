"""What a whole run forgets, apart from chance; how far it moves on old prompts; and how well RL still learns."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from mifo_callbacks.collectives import gather_dealt
from mifo_callbacks.logging import log_metrics
from mifo_lightning.common.errors import InputError, require
from mifo_lightning.common.files import make_writable
from mifo_lightning.common.question import Question
from mifo_lightning.monitors.divergence import load_beside, response_kl, weights_of
from mifo_lightning.monitors.kept import beginning, kept
from mifo_lightning.monitors.phase_monitor import PhaseMonitor, same_questions
from mifo_lightning.monitors.plasticity import Plasticity
from mifo_lightning.monitors.trained import Trained, as_trained
from mifo_lightning.monitors.transitions import transitions
from mifo_lightning.policy.loading import load_tokenizer
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.function import as_reward
from mifo_lightning.rewards.isolation import release
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.graded import Graded
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.steps.guards import check_lengths

SETS = 3  # of samples of the initial model: those that choose questions, `before`, and `again`
Cells = dict[str, dict[str, float]]  # what is found of each source, and under "" of all questions together


class Retention(PhaseMonitor):
    """Compares the model at the end of a run with the initial one: what it answers, and how far apart they are.

    Samples change from one draw to the next though the model does not. So each question gets three sets of samples at
    temperature 1 before training and one after it: the first set chooses questions, and the two others say what chance
    alone turns round (`transitions`). The first tokens of one response a question, of the set `before`, stay fixed:
    along them KL(initial || trained) is taken over the whole vocabulary (`exact_kl`), at temperature 1 and in the run's
    precision. The initial model is loaded again for it when training is over.

    Logs at the end `retention/<metric>` over all questions and `retention/<source>/<metric>`, which `summary.json` has
    under `after` too, as metrics of the final evaluation. Its records of RL phases say how well RL still learns
    (`Plasticity`).

    Costs 4 x `samples` responses a question, and 1 to a question without an answer; at the end 4 forwards of one
    response a question, and 4 more for each of `others`. At the end alone a second model is held on the device beside
    the trained one, and a third one while one of `others` is compared, 4 bytes a weight each; under FSDP2 two are whole
    on every rank meanwhile. Ranks share the work. What the initial model answered is in the checkpoint, and a sum of
    its weights: where others are loaded, or none can be, a line says so and there is no KL.

    Args:
        questions: How many questions to use of each source, the first ones.
        samples: Responses in a set.
        at_least: Questions count from this share right in the set that chooses; 0 takes all.
        tokens: How many tokens of a response the KL is taken along.
        prompts: A file or hub name of rows as `data.train` takes them, which may lack an answer and then count for the
            KL alone; null takes validation questions.
        reward: Says which responses are right, by the run's `success_threshold`; null takes the run's own.
        others: Models by name, whose KL is a scale: the untouched model, or another cold start.
        cache: A directory that keeps what initial models answered, and KLs in which no trained model has a part: of
            runs that begin alike, as the arms of a study on one base do, the first finds them for all that start
            later. What is compared is everything but the code, which is yours to remember. null keeps nothing.

    Raises:
        InputError: If a number is not allowed; before training, if there are no questions, one is too long, or a model
            of `others` cannot be read or has another vocabulary.
    """

    summary_key = "retention"

    def __init__(
        self,
        questions: int = 64,
        samples: int = 8,
        at_least: float = 0.25,
        tokens: int = 64,
        prompts: str | None = None,
        reward: Reward | None = None,
        others: dict[str, str] | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"questions": questions, "samples": samples, "tokens": tokens}.items():
            require(f"retention.{name}", value, value >= 1, "at least 1")
        require("retention.at_least", at_least, 0 <= at_least <= 1, "between 0 and 1")
        self.questions, self.samples, self.at_least, self.tokens = questions, samples, at_least, tokens
        self.prompts, self.others, self.cache = prompts, others or {}, cache
        self.reward = None if reward is None else as_reward(reward)
        self.responses = 0
        self._asked: list[Question] = []  # of all ranks, as all that follows
        self._unjudged: list[Question] = []  # those without an answer
        self._start: list[dict[str, Any]] = []  # of each of both: source, shares right by set, one response's tokens
        self._weights = 0  # fingerprint of the initial ones
        self._asked_before: int | None = None  # a key of the questions
        self._found: Cells = {}
        self._plasticity = Plasticity()

    # --- before training ------------------------------------------------------------------------------------------

    def preflight(self, trainer: Trainer, sources: Any) -> None:
        """Choose the questions, of `sources` one loader each or of the rows given, and refuse what cannot be."""
        pl_module: Any = trainer.lightning_module
        module = as_trained(pl_module, "retention")
        if self.prompts is not None:
            found = trainer.datamodule.further(self.prompts, "retention.prompts")  # type: ignore[attr-defined]
        else:
            found = [q for loader in sources.values() for q in loader.questions]
        if not found:
            raise InputError("retention: needs questions; retention.prompts and data.val are null, data.holdout is 0")
        groups = _places([q.source for q in found]).values()
        chosen = [found[i] for group in groups for i in group[: self.questions]]
        self._asked, self._unjudged = [q for q in chosen if q.truth], [q for q in chosen if not q.truth]
        longest = max(self._sampling(module).max_new_tokens, self.tokens if self._unjudged else 0)
        check_lengths(module.policy.model.config, chosen, "model.evaluation.sampling", longest)
        self._judge(module)
        if self.cache is not None:
            make_writable(self.cache, "retention.cache", ", or null")  # not after the answers are drawn
        for name, model in self.others.items():
            try:
                tokenizer = load_tokenizer(model, pl_module.loading.trust_remote_code)
            except InputError as error:
                raise InputError(f"retention.others.{name}: {error}") from error
            same = tokenizer.get_vocab() == module.tokenizer.get_vocab()
            require(f"retention.others.{name}", model, same, "a model with the vocabulary of model.model")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the questions, those of the checkpoint if there is one."""
        super().on_train_start(trainer, pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.preflight(trainer, {} if data is None else data.val_dataloader())
        now, then = [q.source for q in self._questions], [drawn["source"] for drawn in self._start]
        if then and now != then:
            raise InputError(
                f"ckpt_path: retention began with {len(then)} questions and would go on with {len(now)}, or others; "
                "keep data.val, data.holdout, retention.questions and retention.prompts the same for a whole run"
            )
        self._asked_before = same_questions("retention", self._asked_before, self._questions)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count anew; before the first step of a run also draw what the initial model answers."""
        self._plasticity.begin()
        if not self._start:
            module = as_trained(pl_module, "retention")
            self._weights = weights_of(module.policy)
            self._start = self._kept(trainer, module, lambda: self._ask(trainer, module))

    def _kept(
        self, trainer: Trainer, module: Trained, find: Callable[[], list[Any]], anew: bool = False, **further: object
    ) -> list[Any]:
        """What `find` finds of the initial model: now, or in a run that began alike and looked for the same."""
        if self.cache is not None:
            judge, sizes = self._judge(module), {"samples": self.samples, "tokens": self.tokens}
            try:
                about = beginning(trainer, module, judge, self._questions, self._sampling(module), **sizes)
            except InputError as error:
                rank_zero_warn(f"retention.cache: not used, since {error}")
            else:
                return kept(self.cache, {**about, "weights": self._weights, **further}, find, anew)
        return find()

    def _ask(self, trainer: Trainer, module: Trained) -> list[dict[str, Any]]:
        """What the initial model answers to all questions, in their order."""
        asked = self._answered(module, self.deal(trainer, self._asked)) if self._asked else []
        unjudged = self._continued(module, self.deal(trainer, self._unjudged)) if self._unjudged else []
        self.responses += SETS * self.samples * len(self._asked) + len(self._unjudged)
        return gather_dealt(asked) + gather_dealt(unjudged)

    def _answered(self, module: Trained, mine: list[Question]) -> list[dict[str, Any]]:
        """Shares right in each set, and the first response of the second."""
        graded = self._graded(module, mine, SETS * self.samples, "start")
        shares = graded.correct.view(len(mine), SETS, self.samples).double().mean(-1).tolist()
        return [
            {"source": q.source, "shares": s, "response": group[self.samples].tokens[: self.tokens]}
            for q, s, group in zip(mine, shares, graded.completions, strict=True)
        ]

    def _continued(self, module: Trained, mine: list[Question]) -> list[dict[str, Any]]:
        """One response to each question that has no answer, no longer than needed."""
        sampling = Sampling(max_new_tokens=self.tokens, stop=self._sampling(module).stop)
        prompts, keys = [q.prompt for q in mine], _keys(module, mine, "start")
        groups = module.responder.draw(module.policy, prompts, keys, 1, sampling)
        return [
            {"source": q.source, "shares": [], "response": group[0].tokens}
            for q, group in zip(mine, groups, strict=True)
        ]

    # --- while it trains ------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what the step has logged."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._plasticity.note(batch, trainer.callback_metrics)

    def end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> dict[str, Any] | None:
        """How well RL learned after so many SFT steps."""
        return self._plasticity.end() if phase == "rl" else None

    # --- when it is over ------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the initial model; what cannot be is said in a line, since training is done."""
        super().on_train_end(trainer, pl_module)
        if not self._start:
            return
        with self.timed():
            self._found = {source: {} for source in ("", *_places([d["source"] for d in self._start]))}
            for compare in (self._transitions, self._divergences):
                try:
                    for source, values in compare(trainer, pl_module).items():
                        self._found[source] |= values
                except InputError as error:
                    rank_zero_warn(f"retention: {error}")
            log_metrics(trainer, self.final_metrics())

    def _transitions(self, trainer: Trainer, pl_module: LightningModule) -> Cells:
        """What the trained model answers to the questions that count, beside what the initial one did."""
        if not self._asked:
            return {}
        graded = self._graded(as_trained(pl_module, "retention"), self.deal(trainer, self._asked), self.samples, "end")
        after = gather_dealt(graded.correct.double().mean(-1).tolist() if graded.questions else [])
        self.responses += self.samples * len(after)
        found: Cells = {}
        for source, rows in _with_all([q.source for q in self._asked]).items():
            drawn = [(*self._start[i]["shares"], after[i]) for i in rows]
            found[source] = transitions([shares for chosen, *shares in drawn if chosen >= self.at_least])
        return found

    def _divergences(self, trainer: Trainer, pl_module: LightningModule) -> Cells:
        """KL in nats a token along the fixed responses, of the trained model and of what stands beside it."""
        nats = self._nats(trainer, pl_module)
        tokens = [len(drawn["response"]) for drawn in self._start]
        return {
            source: {name: sum(values[i] for i in rows) / sum(tokens[i] for i in rows) for name, values in nats.items()}
            for source, rows in _with_all([drawn["source"] for drawn in self._start]).items()
        }

    def _nats(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, list[float]]:
        """Each divergence by name, summed over the tokens of each response."""
        module: Any = pl_module
        trained, prompts = module.policy, [q.prompt for q in self.deal(trainer, self._questions)]
        responses = self.deal(trainer, [drawn["response"] for drawn in self._start])

        def along(p: Policy, q: Policy, regrouped: bool = False) -> list[float]:
            return gather_dealt(response_kl(p, q, prompts, responses, module.tokenizer, regrouped))

        def scale(q: Policy, regrouped: bool = False) -> list[float]:  # no part of it is the trained model's
            about = {"along": [weights_of(q), regrouped, trainer.world_size]}
            return self._kept(trainer, module, lambda: along(initial, q, regrouped), anew=True, **about)

        initial = load_beside(module, module.model_name, self._weights)
        found = {"kl": along(initial, trained), "kl_floor": scale(initial, regrouped=True)}
        for name, model in self.others.items():
            other = load_beside(module, model)
            found |= {f"kl_from_{name}": along(other, trained), f"kl_to_{name}": scale(other)}
        return found

    def final_metrics(self) -> dict[str, float]:
        """What was found, by the names under which it is logged."""
        return {
            f"retention/{source}/{name}" if source else f"retention/{name}": float(value)
            for source, cell in self._found.items()
            for name, value in cell.items()
        }

    def summary(self) -> dict[str, Any]:
        """Seconds, responses, what was found over all questions and by source, and the records of RL phases."""
        sources = {source: cell for source, cell in self._found.items() if source}
        return {**super().summary(), "responses": self.responses, "all": self._found.get("", {}), "sources": sources}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the child process of a reward of its own."""
        super().teardown(trainer, pl_module, stage)
        if self.reward is not None:
            release(self.reward)

    # --- throughout -----------------------------------------------------------------------------------------------

    @property
    def _questions(self) -> list[Question]:
        return self._asked + self._unjudged

    def _graded(self, module: Trained, mine: list[Question], samples: int, when: str) -> Graded:
        """Graded samples to this rank's questions; collective.

        Raises:
            InputError: Every check of the reward failed.
        """
        judge, sampling = self._judge(module), self._sampling(module)
        keys = _keys(module, mine, when)
        drawn = judge.draw(module.policy, [q.prompt for q in mine], keys, samples, sampling)
        return judge.grade(mine, drawn, sampling.stop, "the responses of retention")

    def _judge(self, module: Trained) -> Responder:
        ours = module.responder
        if self.reward is None:
            return ours
        return Responder(ours.engine, module.tokenizer, self.reward, ours.success_threshold, ours.seed)

    def _sampling(self, module: Trained) -> Sampling:
        """At temperature 1, as long as in evaluation."""
        own = module.evaluator.sampling
        return Sampling(max_new_tokens=own.max_new_tokens, stop=own.stop)

    def own_state(self) -> dict[str, Any]:
        """What the initial model answered, which weights it had, and how the running RL phase learns."""
        return {
            "responses": self.responses,
            "start": list(self._start),
            "weights": self._weights,
            "asked": self._asked_before,
            **self._plasticity.state_dict(),
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.responses, self._start, self._weights = state["responses"], state["start"], state["weights"]
        self._asked_before = state.get("asked")
        self._plasticity.load_state_dict(state)


def _keys(module: Trained, mine: list[Question], when: str) -> list[int]:
    return [module.responder.key("retention", when, q.source, q.id) for q in mine]


def _places(sources: Sequence[str]) -> dict[str, list[int]]:
    """Where each source stands."""
    return {source: [i for i, other in enumerate(sources) if other == source] for source in dict.fromkeys(sources)}


def _with_all(sources: Sequence[str]) -> dict[str, list[int]]:
    """Where each source stands and, under "", all of them."""
    return {"": list(range(len(sources))), **_places(sources)}
