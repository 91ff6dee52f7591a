"""What a run says on the terminal besides its tables: one line for an error, one for each warning of ours."""

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import lightning  # noqa: F401  it sets the format of warnings, which ours falls back to
from rich.markup import escape

import mifo_callbacks

# C0 but for tab and new line, DEL, C1, half characters, and what turns the direction of writing round
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with every character that a terminal would obey written out, as in `\\x1b`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def table_text(text: str) -> str:
    """`text` for a rich table: printable, and `[red]` stands there as it is."""
    return escape(printable(text))


def fail(message: str, status: int = 2) -> NoReturn:
    """Print one line on standard error and exit, with status 2 for bad input."""
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    raise SystemExit(status)


def quiet() -> None:
    """Silence warnings that are about Lightning's own insides or that this framework answers by design."""
    for text in (
        ".*LeafSpec.*",  # Lightning calls a deprecated function of torch
        ".*overridden `transfer_batch_to_device`.*",  # on purpose: questions are no tensors
        ".*LightningCLI's args parameter.*",  # `main` is called from Python on purpose
        ".*does not have many workers.*",  # questions are in memory
        ".*The dirpath has changed from.*",  # a resumed run has a directory of its own
        ".*Checkpoint directory.*is not empty.*",  # a run that goes on; any other is refused (`keep_earlier`)
        ".*Total length of `dict` across ranks is zero.*",  # no validation was asked for
        ".*in eval mode at the start of training.*",  # on purpose: no dropout
        ".*recommended to use `self.log.*sync_dist=True.*",  # torchmetrics has synchronised them
        ".*`compute`` method of metric.*was called before.*",  # a source without demonstrations
    ):
        warnings.filterwarnings("ignore", text)
    # the tip of a product that Lightning prints at every start
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    logging.setLogRecordFactory(PrintableRecord)
    warnings.formatwarning = one_line_warning


class PrintableRecord(logging.LogRecord):
    """A line of any library's log, which may quote a model or a file."""

    def getMessage(self) -> str:
        """The text, printable."""
        return printable(super().getMessage())


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


_lightnings_format = warnings.formatwarning  # as Lightning, imported above, has set it
_OWN = (Path(__file__).parents[1], Path(mifo_callbacks.__file__).parent)


def one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What this framework says to its user, without the place in its source; others' warnings as they come."""
    if any(Path(filename).is_relative_to(directory) for directory in _OWN):
        return f"warning: {printable(str(message))}\n"
    return printable(_lightnings_format(message, category, filename, lineno, line))
