"""How do the commands of studies end? With a status, and one line where it is not 0."""

import os
import signal
import sys
from collections.abc import Callable

from mifo_lightning.checkpoints import interruption
from mifo_lightning.common.errors import InputError, Interrupted, TrainingError
from mifo_lightning.common.terminal import printable


def exit_status(work: Callable[[], int]) -> int:
    """What `work` returns; 2 for bad input, 1 for a fit that failed, 128 + n for signal n, which reaches all fits.

    A reader that goes away, as `head` does, counts as SIGPIPE.
    """
    try:
        with interruption.noted():
            return work()
    except (InputError, TrainingError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # whoever read this has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
        return 128 + signal.SIGPIPE
    except Interrupted as stop:
        print(f"interrupted by {signal.Signals(stop.signum).name}; the same command goes on", file=sys.stderr)
        return 128 + stop.signum
