"""Where rows come from: anything with `rows()`; files and hub names are read by `data.rows`."""

from abc import ABC, abstractmethod
from typing import Any

Row = dict[str, Any]


class RowSource(ABC):
    """A generator of rows in the same format as the parquet files; give its `class_path` where a path could stand.

    A row has `data_source` (str), `prompt` (list of {role, content}), `reward_model` ({style, ground_truth}) and, if it
    has a demonstration, `target` (list with one {role: assistant, content}).
    """

    @abstractmethod
    def rows(self) -> list[Row]:
        """All rows, in a fixed order that depends on the constructor's arguments only."""
