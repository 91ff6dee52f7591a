"""The three kinds of questions of a study from files: seen in training, unseen, out of distribution."""

from typing import Literal

from mifo_lightning.common.errors import InputError, require
from mifo_lightning.data.rows import read_rows
from mifo_lightning.data.source import Row, RowSource


class ThreeWays(RowSource):
    """As many rows of each of three files, under the data sources `seen`, `unseen` and `ood`.

    Of unseen and out-of-distribution rows val takes the first, third, ... and test the others, so that what is chosen
    by one is reported on the other; seen rows are the same in both.

    Args:
        seen: File of training questions; the first `count` rows are asked.
        unseen: File of questions of the same kind that are not trained on.
        ood: File of questions of another kind.
        split: val or test.
        count: Rows of each kind, at least 1.

    Raises:
        InputError: Another split, count < 1, or, from `rows`, a file without so many rows.
    """

    def __init__(self, seen: str, unseen: str, ood: str, split: Literal["val", "test"], count: int) -> None:
        require("split", split, split in ("val", "test"), "val or test")
        require("count", count, count >= 1, "at least 1")
        self.files, self.split, self.count = {"seen": seen, "unseen": unseen, "ood": ood}, split, count

    def rows(self) -> list[Row]:
        """All rows, kind after kind."""
        found: list[Row] = []
        for kind, file in self.files.items():
            rows = read_rows(file, kind)
            part = rows if kind == "seen" else rows[self.split == "test" :: 2]
            if len(part) < self.count:
                raise InputError(f"{kind}: {file}: {len(part)} rows for {self.split}, {self.count} are asked for")
            found += [{**row, "data_source": kind} for row in part[: self.count]]
        return found
