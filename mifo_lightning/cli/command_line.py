"""The command line: LightningCLI with named, nullable method callbacks and our monitors."""

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionYesNo
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from mifo_callbacks.logging import StepRows
from mifo_callbacks.seeds import LARGEST
from mifo_lightning.checkpoints import interruption
from mifo_lightning.checkpoints.files import with_checkpoint_io
from mifo_lightning.checkpoints.restoring import CheckedRestore
from mifo_lightning.checkpoints.safe_points import take_over
from mifo_lightning.cli.config_files import given
from mifo_lightning.cli.packaged import DEFAULTS
from mifo_lightning.cli.parser import MODE, OneLineParser, check_groups
from mifo_lightning.cli.parts import ALWAYS, METHOD, MONITORS, SEEDED, check_method, check_parts
from mifo_lightning.cli.preflight import check_run
from mifo_lightning.cli.resume import Start, choose, prepare_files
from mifo_lightning.cli.wandb_run import begin_runs, end_runs, prepare_runs
from mifo_lightning.common.errors import InputError, TrainingError, require
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.module import MifoModule
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.monitors.model_card import write_card
from mifo_lightning.monitors.run_dir import run_dir
from mifo_lightning.monitors.summary import RunSummary, print_metrics
from mifo_lightning.rewards.base import Reward

COMMAND = "mifo"  # the installed script: shells complete the words after a command, not those after `python -m`


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run's directory and into the W&B run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called on the first rank only; sizes are those that fit the data."""
        config = self.config.clone()
        for key, (_, taken) in trainer.datamodule.fitted.items():  # type: ignore[attr-defined]
            config[key.replace("buffer.", "buffer.init_args.")] = taken
        text = self.parser.dump(config, skip_none=False)
        path = run_dir(trainer) / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        if trainer.state.fn == TrainerFn.FITTING or not path.exists():  # else it is that of a fit
            path.write_text(text, encoding="utf-8")
        if isinstance(trainer.logger, WandbLogger):
            trainer.logger.log_hyperparams(yaml.safe_load(text))
            Path(trainer.logger.experiment.dir, "mifo.yaml").write_text(text, encoding="utf-8")


class MifoCLI(LightningCLI):
    """LightningCLI for `MifoModule` and `QuestionData`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        words = sys.argv[1:] if named.get("args") is None else named["args"]
        self._asked = words[0] if isinstance(words, list) and words else None
        super().__init__(*arguments, **named)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """fit, validate and test; there is nothing to predict, and checkpoints are loaded as weights only, always."""
        own = {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}
        return {name: {*skip, "weights_only"} for name, skip in own.items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the reward, the named callbacks and the links between groups."""
        parser.add_subclass_arguments(
            Reward, "reward", required=True, help="Grades responses and checks demonstrations."
        )
        parser.add_argument("--method", type=str | None, default=None, help="Name of the method; its file gives it.")
        parser.add_argument(
            "--buffer_size", type=int, default=128, help="S: what methods with a buffer take for buffer.size."
        )
        for key, cls in {**METHOD, **MONITORS}.items():
            parser.add_lightning_class_args(cls, key, subclass_mode=True, required=False)
            path = f"{cls.__module__}.{cls.__name__}"
            parser.set_defaults({key: {"class_path": path} if key in ALWAYS else None})
        for split in ("train", "val", "test"):  # a file of data is data, not the configuration of a RowSource
            parser._option_string_actions[f"--data.{split}"]._enable_path = False  # type: ignore[attr-defined]
        parser.link_arguments("reward", "model.reward", apply_on="instantiate")
        for target in ("model.seed", "data.seed", *(f"{key}.init_args.seed" for key in SEEDED)):
            parser.link_arguments("seed_everything", target, compute_fn=_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse them, unless they mix two methods, or only adjust a part that nothing has switched on."""
        values = given(sys.argv[1:] if args is None else args)
        check_method(values)
        check_parts(values)
        super().parse_arguments(parser, args)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's own table of all metrics, a column for each source, only on request: ours follows.

        Where the first word names a subcommand the others stay empty: to build their arguments would delay every start.
        """
        if self._asked in self.subcommands() and subcommand != self._asked:
            return self.init_parser()
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)
        else:
            parser.add_argument(
                "--resume",
                action=ActionYesNo,
                nargs="?",
                default=False,
                help="Go on with the newest run, in its files.",
            )
        return parser

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def _set_seed(self) -> None:
        """Seed everything, with a number that all generators take."""
        seed = self._get(self.config, "seed_everything")
        require("seed_everything", seed, isinstance(seed, bool) or 0 <= seed <= LARGEST, f"between 0 and {LARGEST}")
        super()._set_seed()

    def instantiate_classes(self) -> None:
        """Build reward, model, data and Trainer; a value that a constructor refuses is bad input."""
        self.check_configuration(self.config[self.subcommand] if self.subcommand else self.config)
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
            raise InputError(_meant(error)) from error

    def check_configuration(self, config: Any) -> None:
        """Refuse what no constructor need see."""
        try:
            self._parser(self.subcommand).validate(config, skip_unset=False)  # parsing lets null stand for any number
        except TypeError as error:
            raise InputError(str(error)) from error
        check_groups(config.model, "model", MifoModule)
        check_groups(config.data, "data", QuestionData)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the named callbacks that are not null, in their order."""
        config = with_checkpoint_io({**self._get(self.config_init, "trainer", default={}), **kwargs})
        named = [self._get(self.config_init, key) for key in (*METHOD, *MONITORS)]
        # Lightning refuses a bar or a checkpoint callback together with the flag that switches it off
        off = [(ProgressBar, "enable_progress_bar"), (Checkpoint, "enable_checkpointing")]
        unwanted = tuple(kind for kind, flag in off if config.get(flag) is False)
        callbacks = [callback for callback in named if callback is not None and not isinstance(callback, unwanted)]
        trainer = self._instantiate_trainer(config, [*callbacks, StepRows()])
        take_over(trainer)
        trainer._checkpoint_connector = CheckedRestore(trainer)
        interruption.follow(trainer.strategy.launcher)
        prepare_runs(trainer.loggers)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: on resume the command line wins over the checkpoint."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; what W&B runs it begins end with it."""
        status = 1
        try:
            super()._run_subcommand(subcommand)
            status = 0
        finally:
            end_runs(self.trainer.loggers, status)

    def before_fit(self) -> None:
        """Check, begin to log and evaluate the model as it comes, unless an earlier run is resumed."""
        start = self._choose_checkpoint()
        # before minutes of evaluation, and before config.yaml is written
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (ExportModel, LastCheckpoint)):
                callback.check_free(self.trainer, self.model, start and start.path)
        check_run(self.trainer, self.model, self.datamodule, "fit")
        prepare_files(self.trainer, start)
        begin_runs(self.trainer.loggers)
        if self._evaluates() and not start:
            self.trainer.validate(self.model, self.datamodule, verbose=False)

    def before_validate(self) -> None:
        """Verify the checkpoint and check the run, then begin to log."""
        self._choose_checkpoint()
        check_run(self.trainer, self.model, self.datamodule, "validate")
        begin_runs(self.trainer.loggers)

    def before_test(self) -> None:
        """As `validate`."""
        self._choose_checkpoint()
        check_run(self.trainer, self.model, self.datamodule, "test")
        begin_runs(self.trainer.loggers)

    def after_fit(self) -> None:
        """Evaluate the trained model, print the table before and after, and say where everything is."""
        trainer: Trainer = self.trainer
        if self._evaluates():
            trainer.validate(self.model, self.datamodule, verbose=False)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunSummary):
                callback.report(trainer)
        config = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        write_card(trainer, self.datamodule, yaml.safe_load(config), OneLineParser.arguments)
        report_places(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LastCheckpoint) and callback.failed:
                raise TrainingError(f"checkpoint: the state at the end is not saved: {callback.failed}")

    def _choose_checkpoint(self) -> Start | None:
        """The checkpoint to load, verified and put where Lightning takes it from."""
        given, resume = self._get(self.config, "ckpt_path"), self._get(self.config, "resume", default=False)
        start = choose(self.trainer, self.model, given, resume, self.subcommand == "fit")
        if start is not None:
            for config in (self.config, self.config_init):
                config[f"{self.subcommand}.ckpt_path"] = str(start.path)
                if resume:
                    config[f"{self.subcommand}.resume"] = False  # in the written configuration, the path says it
        return start

    def after_validate(self) -> None:
        """Print the table."""
        print_metrics(self.trainer, "val/")

    def after_test(self) -> None:
        """Print the table."""
        print_metrics(self.trainer, "test/")

    def _evaluates(self) -> bool:
        return bool(self.datamodule.sources["val"] or self.datamodule.holdout)


def as_script() -> bool:
    """Whether this process is the installed command rather than `python -m`."""
    return Path(sys.argv[0]).name == COMMAND


def make_cli(args: list[str] | None, run: bool = True, kind: type[MifoCLI] = MifoCLI) -> MifoCLI:
    """The command line of `args`; unless it is to run, model, data and trainer are built and nothing is written."""
    defaults = {"default_config_files": [DEFAULTS]}
    return kind(
        MifoModule,
        QuestionData,
        run=run,
        save_config_callback=SaveConfig if run else None,
        save_config_kwargs={"save_to_log_dir": False},
        parser_class=OneLineParser,
        parser_kwargs={
            "parser_mode": MODE,
            "prog": COMMAND if as_script() else "python -m mifo_lightning",
            "description": "Supervised fine-tuning inside reinforcement learning without forgetting (MIFO).",
            **(dict.fromkeys(MifoCLI.subcommands(), defaults) if run else defaults),
        },
        trainer_defaults={"max_epochs": -1, "logger": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=args,
    )


def _meant(error: BaseException) -> str:
    """What was meant for the user: argument parsing wraps the exceptions of constructors."""
    # of a value that may be one of several types: what the type that could be built from it says
    reasons = re.findall(r"^ +- (?!Expected a )(.+)$", str(error), flags=re.MULTILINE)
    if reasons and "Union subtypes" in str(error):
        return str(reasons[0])
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return str(next((e for e in chain if isinstance(e, (InputError, MisconfigurationException))), chain[-1]))


@rank_zero_only
def report_places(trainer: Trainer) -> None:
    """Say where model, checkpoint, files and W&B run are."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ExportModel) and callback.written:
            print(f"model: {callback.written}")
    for checkpoint in trainer.checkpoint_callbacks:
        if (path := getattr(checkpoint, "best_model_path", "")) and Path(path).exists():
            print(f"checkpoint: {path}")
    print(f"files: {run_dir(trainer)}")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            print(f"W&B run: {Path(logger.experiment.dir).parent}")


def _seed(value: bool | int) -> int | None:
    return None if isinstance(value, bool) else value
