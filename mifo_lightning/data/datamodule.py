"""QuestionData: rows from files, hub or a generator become questions for the PhaseLoader and for evaluation."""

import operator
from dataclasses import replace
from datetime import date
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from mifo_callbacks import BufferPhaseSwitch, Seed
from mifo_lightning.common.errors import InputError, check_kinds, require
from mifo_lightning.common.question import Question
from mifo_lightning.common.seeds import stable_key
from mifo_lightning.data.columns import Columns
from mifo_lightning.data.damage import damage_demonstrations
from mifo_lightning.data.evaluation_loader import EvaluationLoader
from mifo_lightning.data.loader import PhaseLoader
from mifo_lightning.data.questions import build_questions
from mifo_lightning.data.rows import read_rows
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.settings import Demonstrations, Prompts, Settings, settle
from mifo_lightning.data.source import RowSource
from mifo_lightning.policy.template import ChatTemplate, kept_template, read_template
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.grading import sum_up
from mifo_lightning.rewards.isolation import release

Rows = str | RowSource | list[str]  # str first: as a class, `rows.jsonl` would be one of a module to import


def _rows_of(split: str) -> Any:
    """An attribute that stands for the rows of a split."""
    return property(
        lambda data: data.sources[split],
        lambda data, rows: data.sources.update({split: rows}),
        doc=f"Rows of {split}; kept in `sources`.",
    )


class QuestionData(LightningDataModule):
    """Questions with demonstrations for training, and questions for evaluation.

    What is said here may be changed between two fits: the next Trainer reads rows, files and template anew. Each fit
    begins the schedule anew, and asks the same questions in the same order unless `seed` is another.

    Attributes:
        fitted: Sizes that the data could not fill, by key: what was asked for and what was taken.

    Args:
        train: Training rows: a parquet, jsonl, json or csv file, a hub name, a list of them, or the class_path of a
            RowSource.
        val: Rows of validation, as `train`; null leaves only the holdout.
        test: Rows of test, as `train`.
        columns: Names of the columns of files and hub sets, where they are not those of the row format.
        prompts: How the messages of a row become a prompt.
        demonstrations: Which demonstrations are learned from.
        holdout: Training questions to hold out for validation, under the name `<source>-holdout`; chosen by seed.
        schedule: How much of which phase, in which order.
        eval_batch: Questions evaluated at once per rank.
        seed: Seed of order, holdout and damage; None takes the module's, and without one follows `seed_everything`.
    """

    train, val, test = (_rows_of(split) for split in ("train", "val", "test"))

    def __init__(
        self,
        train: Rows,
        val: Rows | None = None,
        test: Rows | None = None,
        columns: Columns = Columns(),
        prompts: Prompts = Prompts(),
        demonstrations: Demonstrations = Demonstrations(),
        holdout: int = 0,
        schedule: Schedule = Schedule(),
        eval_batch: int = 64,
        seed: int | None = None,
    ) -> None:
        check_kinds("data", locals(), QuestionData)
        super().__init__()
        schedule.check("data.schedule")
        prompts.check("data.prompts")
        demonstrations.check("data.demonstrations")
        require("data.eval_batch", eval_batch, eval_batch >= 1, "at least 1")
        require("data.holdout", holdout, holdout >= 0, "at least 0")
        require("data.columns.truth_after", "''", columns.truth_after != "", "a text, or null for the whole")
        self.sources: dict[str, Rows | None] = {"train": train, "val": val, "test": test}
        # copies: a default is one object for all data
        self.columns, self.prompts, self.demonstrations = replace(columns), replace(prompts), replace(demonstrations)
        self.holdout, self.schedule, self.eval_batch = holdout, replace(schedule), eval_batch
        self._fitted_schedule = self.schedule  # what training takes of it
        self.fitted: dict[str, tuple[int, int]] = {}
        self.given: dict[str, Any] = dict.fromkeys(Settings._fields)
        self.settings: Settings | None = None  # those of the module, once there is one
        self._seed = self._own_seed = Seed(seed, "data.seed")
        self._made_of: tuple[Any, ...] | None = None  # what was said when the questions were made
        self._chosen_by: int | None = None  # the seed, once it has chosen what is held out and damaged
        self._template: str | None = None  # in place of the tokenizer's own
        self._teacher: str | None = None  # template of a teacher's prompts, of the module
        self._today = date.today()
        self._questions: dict[str, list[Question]] = {}
        self._loader: PhaseLoader | None = None
        self._restored: dict[str, Any] | None = None

    def standalone(
        self, reward: Reward, tokenizer: str | PreTrainedTokenizerBase, success_threshold: float = 1.0
    ) -> "QuestionData":
        """Say what else a `MifoModule` says, for use without one; one that comes nevertheless must say the same.

        Args:
            reward: Checks that demonstrations are right.
            tokenizer: Hugging Face directory or hub name, or what was loaded.
            success_threshold: Reward from which a demonstration is right.
        """
        self.given = {"reward": reward, "tokenizer": tokenizer, "success_threshold": success_threshold}
        return self

    def setup(self, stage: str) -> None:
        """Read and filter what the stage needs; the table of what was dropped is printed once."""
        self._settle()
        if stage in ("fit", "validate"):
            if stage == "fit" or self.holdout:
                self._load("train")
            self._load("val")
        if stage == "fit" and self.trainer is not None:
            self._fit_schedule()
        if stage == "test":
            self._load("test")
            if not self._questions["test"]:
                raise InputError("data.test: null; `test` needs rows to evaluate")

    def _settle(self) -> None:
        """Take what was not given from the module; what was prepared for another one is prepared anew."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        settings, theirs = settle(self.given, module), getattr(module, "seed", None)
        seed = theirs if self._own_seed.given is None and isinstance(theirs, Seed) else self._own_seed
        teacher, same = getattr(module, "teacher_template", None), self.settings is not None and seed is self._seed
        made_of = self._said()
        same = same and teacher == self._teacher and made_of == self._made_of
        if not same or any(map(operator.is_not, settings, self._settled)):
            self._questions, self.settings, self._seed, self._teacher = {}, settings, seed, teacher
            self._made_of, self.fitted = made_of, {}
            given = self.prompts.chat_template
            self._template = read_template(given, settings.tokenizer, "data.prompts.chat_template")

    def _said(self) -> tuple[Any, ...]:
        """All that decides the questions and is said here; a copy, since each of it may be changed in place."""
        rows = [list(source) if isinstance(source, list) else source for source in self.sources.values()]
        groups = [replace(group) for group in (self.columns, self.prompts, self.demonstrations)]
        return (self.trainer, *rows, *groups, self.holdout, self.schedule.fit_sizes)

    def _load(self, split: str) -> None:
        if split in self._questions:
            return
        self._questions[split] = []
        source = self.sources[split]
        if source is not None:
            where = f"data.{split}"
            questions, drops = build_questions(
                read_rows(source, where, self.columns),
                ChatTemplate(self.tokenizer, self._template, self._today),
                self.prompts,
                self.demonstrations,
                reward=self._settled.reward,
                success_threshold=self._settled.success_threshold,
                damage=self._damage if split == "train" and self.demonstrations.damaged_share else None,
                teacher=self._teacher if split == "train" else None,
                where=where,
            )
            for question in questions:
                try:
                    self._settled.reward.check_truth(question.truth, question.columns)
                except InputError as error:
                    raise InputError(f"{where}: {question.text[-60:]!r}: {error}") from None
            self._questions[split] = questions
            rank_zero_only(drops.print)()
        if split == "train":
            self._chosen_by = self.seed.value
            self._hold_out()

    def _hold_out(self) -> None:
        """Move `holdout` questions, chosen by seed, from training to validation; ids stay positions."""
        everything = self._questions["train"]
        held, asked, n = self._held_out(everything), self.holdout, len(everything)
        if asked and len(held) == n:
            raise InputError(f"data.holdout: {asked} leaves none of the {n} training questions")
        self._fit("data.holdout", asked, len(held), f"a fifth of the {n} training questions")
        chosen = {q.id for q in held}
        self._questions["train"] = [q for q in everything if q.id not in chosen]
        for position, question in enumerate(self._questions["train"]):
            question.id = position
        trained = {question.text for question in self._questions["train"]}
        if leaked := sum(question.text in trained for question in held):
            rank_zero_warn(f"data.holdout: {leaked} of {len(held)} are trained on too: data.train holds them twice")
        for question in held:
            question.source = f"{question.source}-holdout"
        self._questions["holdout"] = held

    def _held_out(self, questions: list[Question]) -> list[Question]:
        few = self.schedule.fit_sizes and self.holdout >= len(questions)
        size = max(1, len(questions) // 5) if few else self.holdout
        return sorted(questions, key=lambda q: stable_key(self.seed.value, "holdout", q.id))[:size]

    def _fit_schedule(self) -> None:
        """Make what the schedule and the buffer ask for smaller where the training questions are too few."""
        trainer, before, questions = self._trainer, self.schedule, self._questions["train"]
        self._fitted_schedule = before
        if not before.fit_sizes:
            return
        switch = next((callback for callback in trainer.callbacks if isinstance(callback, BufferPhaseSwitch)), None)
        shown = sum(q.demonstration is not None for q in questions)
        lent = len(questions) if getattr(trainer.lightning_module, "own_demonstrations", False) else shown
        size = wanted = _asked_size(switch) if switch else None
        after = before.fit_rl(len(questions), trainer.world_size)
        if switch or before.sft_before or before.sft_after:
            after, size = after.fit_sft(lent, size, trainer.world_size)
        what = f"the {len(questions)} training questions, {shown} with a demonstration"
        for name in ("prompts_per_step", "sft_batch"):
            self._fit(f"data.schedule.{name}", getattr(before, name), getattr(after, name), what)
        if switch and size is not None and wanted is not None:
            switch.size = self._fit("buffer.size", wanted, size, f"{what}; a phase waits for that many hard ones")
            vars(switch)["_fitted"] = (wanted, size)
        self._fitted_schedule = after

    def _fit(self, key: str, asked: int, taken: int, what: str) -> int:
        """What is taken; if it is not what was asked for, that is noted and said."""
        if taken == asked:
            self.fitted.pop(key, None)
        elif self.fitted.get(key) != (asked, taken):
            self.fitted[key] = (asked, taken)
            rank_zero_warn(f"{key}: {asked} → {taken}, fitted to {what}; data.schedule.fit_sizes: false refuses")
        return taken

    def _damage(self, pairs: list[tuple[Question, str | None]]) -> dict[int, str]:
        """Damage demonstrations that will be trained on; what is held out measures, so it stays right."""
        held = {q.id for q in self._held_out([q for q, _ in pairs])}
        solutions = [(q, text) for q, text in pairs if text and text.strip() and q.id not in held]
        share, marker = self.demonstrations.damaged_share, self.demonstrations.answer_after or ""
        return damage_demonstrations(solutions, share, self.seed.value, marker)

    def kept_template(self) -> str | None:
        """The chat template that prompts were built with, to be kept with the model; None: the tokenizer's own."""
        system_prompt = self.prompts.system_prompt
        if self._template is None and system_prompt is None:
            return None
        return kept_template(self.tokenizer.get_chat_template(self._template), system_prompt)

    def prompt_template(self) -> ChatTemplate:
        """How a conversation becomes a prompt of this data."""
        return ChatTemplate(self.tokenizer, self.kept_template(), self._today)

    def further(self, source: Rows, where: str) -> list[Question]:
        """Questions of rows beside the three splits, made as theirs are; without demonstrations.

        Args:
            source: Rows, which may lack a truth; it is "" then.
            where: The key that names them.

        Raises:
            InputError: As for the rows of a split; the message begins with `where`.
        """
        rows = [{**row, "target": None} for row in read_rows(source, where, self.columns, unanswered=True)]
        template = ChatTemplate(self.tokenizer, self._template, self._today)
        reward = self._settled.reward
        found, drops = build_questions(rows, template, self.prompts, Demonstrations(), reward=reward, where=where)
        if drops.dropped:
            rank_zero_only(drops.print)()
        return found

    def counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Of each split and source how many questions there are, and how many of them have a demonstration."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for split, questions in self._questions.items():
            for question in questions:
                n, shown = found.setdefault(split, {}).get(question.source, (0, 0))
                found[split][question.source] = (n + 1, shown + bool(question.demonstration))
        return found

    def train_dataloader(self) -> PhaseLoader:
        """The loader of work items."""
        trainer = self._trainer
        module = trainer.lightning_module
        lent = sum(q.demonstration is not None for q in self._questions["train"])
        if getattr(module, "needs_demonstrations", False) and not lent:
            raise InputError(
                "data.train: no question has a demonstration; model.mixing, and weight flow and sed of model.sft_loss, "
                "want one"
            )
        sizes = [callback.size for callback in trainer.callbacks if isinstance(callback, BufferPhaseSwitch)]
        self._loader = PhaseLoader(
            self._questions["train"],
            self._fitted_schedule,
            phase_size=sizes[0] if sizes else None,
            own_demonstrations=getattr(module, "own_demonstrations", False),
            seed=self.seed.value,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        if self._restored is not None:
            self._loader.load_state_dict(self._restored)
            self._restored = None
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """The loader's state: Lightning restores a loader inside an epoch, but not when a finished run is extended."""
        if self._loader is None:
            return {}
        return {
            "loader": self._loader.state_dict(),
            "today": self._today.isoformat(),
            "seed": self.seed.settled,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until there is a loader; prompts that show the date keep that of the run's beginning."""
        self._restored = state_dict.get("loader")
        began, today = state_dict.get("today"), self._today
        template = ChatTemplate(self.tokenizer, self._template, today)
        if began not in (None, today.isoformat()) and template.dated:
            rank_zero_warn(f"data.prompts.chat_template prints the date; it stays {began}, when the run began")
            self._today = date.fromisoformat(began)
            self._load_again()
        self.seed.restore(state_dict.get("seed"))
        if self._chosen_by not in (None, self.seed.value):  # held out and damaged by another seed
            self._load_again()

    def _load_again(self) -> None:
        splits = [split for split in self.sources if split in self._questions]
        self._questions = {}
        for split in splits:
            self._load(split)

    def val_dataloader(self) -> dict[str, EvaluationLoader]:
        """One loader per data source."""
        return self._evaluation_loaders(self._questions.get("holdout", []) + self._questions["val"])

    def test_dataloader(self) -> dict[str, EvaluationLoader]:
        """One loader per data source."""
        return self._evaluation_loaders(self._questions["test"])

    def _evaluation_loaders(self, questions: list[Question]) -> dict[str, EvaluationLoader]:
        by_source: dict[str, list[Question]] = {}
        for question in questions:
            by_source.setdefault(question.source, []).append(question)
        ranks, rank = self._trainer.world_size, self._trainer.global_rank
        return {source: EvaluationLoader(chosen, self.eval_batch, rank, ranks) for source, chosen in by_source.items()}

    @property
    def seed(self) -> Seed:
        """Of order, holdout and damage; may be set to a number, or to None for the module's."""
        return self._seed

    @seed.setter
    def seed(self, value: int | None) -> None:
        self._seed = self._own_seed = Seed(value, "data.seed")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the module, after `setup`."""
        return self._settled.tokenizer

    @property
    def _settled(self) -> Settings:
        assert self.settings is not None, "`setup` comes first"
        return self.settings

    @property
    def _trainer(self) -> Any:
        assert self.trainer is not None, "the Trainer attaches itself before it asks for loaders"
        return self.trainer

    def teardown(self, stage: str) -> None:
        """Say which checks of the reward failed, and stop its child process."""
        if self.settings is not None:
            for line in sum_up(self.settings.reward, TrainerFn(stage).value):
                rank_zero_warn(line)
            release(self.settings.reward)


def _asked_size(switch: BufferPhaseSwitch) -> int:
    """Its size as it was said: one that was fitted to few questions asks for its own again with more."""
    asked, taken = vars(switch).get("_fitted", (switch.size, switch.size))
    return int(asked if switch.size == taken else switch.size)
