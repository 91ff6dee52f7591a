"""The program `mifo`: run a command line; whatever ends it early is one line and an exit status."""

import errno
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from mifo_callbacks.collectives import leave_group
from mifo_lightning.checkpoints import interruption
from mifo_lightning.cli.command_line import MifoCLI, as_script, make_cli
from mifo_lightning.cli.config_files import Given, check_characters, given, left_empty, with_place
from mifo_lightning.cli.parser import OneLineParser
from mifo_lightning.cli.parts import SEEDED
from mifo_lightning.cli.plan import plan
from mifo_lightning.cli.renamed import COMMAND, new_name, translate
from mifo_lightning.common.errors import InputError, Interrupted, TrainingError, out_of_memory
from mifo_lightning.common.terminal import fail, quiet

PLAN = "plan"  # the subcommand that runs nothing
LIGHTNINGS = "trainer.accumulate_grad_batches"  # a key that Lightning still has: 1 is allowed, others are refused later
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR)  # whatever was being written: a log, a table, the model


def main(args: list[str] | None = None) -> None:
    """Run the command line; what ends it early prints one line.

    The exit status is 2 for bad input, 1 where training broke down, 128 + n for signal number n.
    """
    # more threads than free cores make small steps several times slower; OMP_NUM_THREADS asks for more
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    quiet()
    OneLineParser.arguments = sys.argv[1:] if args is None else args
    if OneLineParser.arguments[:1] == ["translate"]:
        return translate(OneLineParser.arguments[1:])
    if as_script():
        sys.path.append(os.getcwd())  # as `python -m` does: rewards of one's own lie there
    try:
        with interruption.handled(OneLineParser.arguments):
            check_characters(OneLineParser.arguments)
            values = given(OneLineParser.arguments)
            check_names(values)
            OneLineParser.empty, OneLineParser.places = left_empty(values), {one.key: one.place for one in values}
            check_seeds(OneLineParser.arguments)
            check_configured(OneLineParser.arguments)
            with to_its_end(), out_of_the_group():
                if OneLineParser.arguments[:1] == [PLAN]:
                    print(plan(OneLineParser.arguments[1:]))
                else:
                    make_cli(args)
    except (InputError, MisconfigurationException) as error:
        fail(with_place(str(error), OneLineParser.empty))
    except TrainingError as error:
        fail(str(error), status=1)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fail(
            f"memory ran out: {str(error).splitlines()[0]}; raise model.optimizer.micro_batches (or lower "
            "micro_batch_tokens), set model.loading.gradient_checkpointing or lower data.schedule.sft_batch; what was "
            "saved stays",
            status=1,
        )
    except OSError as error:
        if error.errno not in FULL:
            raise
        fail(f"{error.filename or 'the disk'} cannot be written: {error.strerror}; what was saved stays", status=1)
    except OmegaConfBaseException as error:
        what = str(error).split("\n")[0]
        up = "." * str(error.full_key).count(".")  # one dot is the group that holds the key; the first part is `fit`
        fail(
            f"{error.full_key}: {what}; write ${{{up}group.key}} for another group here, ${{oc.env:NAME,default}} "
            "for a variable"
        )


@contextmanager
def out_of_the_group() -> Iterator[None]:
    """Leave the process group where all ranks end together: one that fails alone would wait for the others."""
    try:
        yield
    except Interrupted as stop:
        if stop.together:
            leave_group()
        raise
    leave_group()


@contextmanager
def to_its_end() -> Iterator[None]:
    """Refuse a `sys.exit()` of code that the configuration names: the status would be that of a whole run.

    Raises:
        InputError: Something other than the parser has ended the program without a status of its own.
    """
    OneLineParser.done = False
    try:
        yield
    except SystemExit as end:
        if (isinstance(end.code, int) and end.code != 0) or OneLineParser.done:
            raise
        last = traceback.extract_tb(end.__traceback__)[-1]
        raise InputError(
            f"{last.filename}, line {last.lineno}: ended the program with sys.exit({end.code!r:.80}); code that a "
            "configuration names must return or raise"
        ) from end


def check_configured(arguments: list[str]) -> None:
    """Refuse a subcommand alone: the parser would name the first key that it misses.

    Raises:
        InputError: A subcommand stands alone.
    """
    if len(arguments) == 1 and arguments[0] in (*MifoCLI.subcommands(), PLAN):
        raise InputError(
            f"{arguments[0]}: needs a configuration, such as --config tiny --config methods/mifo, or files of your "
            "own; `--help` lists all keys"
        )


def check_names(values: Iterable[Given]) -> None:
    """Refuse keys of an earlier version, which the parser would call unknown.

    Raises:
        InputError: There is one; the line names it, its place and its new name.
    """
    for one in values:
        if one.key != LIGHTNINGS and (new := new_name(one.key)):
            what = f"; `{COMMAND}` translates a saved configuration" if ", line " in one.place else ""
            raise InputError(f"{one.place}: {one.key} is now {new}{what}")


def check_seeds(arguments: list[str]) -> None:
    """Refuse a flag for a linked seed, which the parser would overwrite without a word.

    A file may hold such a seed: the printed configuration does.

    Raises:
        InputError: A flag names the seed of a callback.
    """
    linked = {f"--{key}.{path}seed" for key in SEEDED for path in ("", "init_args.")}
    for flag in (argument.partition("=")[0] for argument in arguments):
        if flag in linked:
            raise InputError(f"{flag}: it follows seed_everything; give --seed_everything instead")
