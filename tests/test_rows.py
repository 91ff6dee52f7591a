"""Reading rows: every source gives the same rows; every kind of bad input gives one line that names it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.rows import read_rows
from mifo_lightning.data.source import Row, RowSource

DATA = Path(os.environ.get("MIFO_DATA", Path(__file__).parents[2] / "shared" / "data"))


def row(number: int, **changes: Any) -> Row:
    """A row in the full format of the files, columns included that only rewards read."""
    return {
        "data_source": f"source{number % 2}",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"{number}+1? ÷\u2028"},
        ],
        "target": [{"role": "assistant", "content": f"\\boxed{{{number + 1}}}"}] if number % 3 else None,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"index": number, "split": "train"},
        **changes,
    }


ROWS = [row(number) for number in range(7)]
READ = ROWS  # all columns: a reward may want one


def write(path: Path, rows: list[Any]) -> Path:
    """`rows` as a file of the kind that the suffix says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps(each, ensure_ascii="\\ud" in json.dumps(each)) + "\n" for each in rows),
            encoding="utf-8",
        )
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


class Given(RowSource):
    def __init__(self, rows: list[Any]) -> None:
        self.given = rows

    def rows(self) -> list[Row]:
        return self.given


def plain(value: Any) -> bool:
    """Whether only dict, list, str, int, float, bool and None occur, not even subclasses of them."""
    if type(value) is dict:
        return all(plain(item) for pair in value.items() for item in pair)
    if type(value) is list:
        return all(plain(item) for item in value)
    return type(value) in (str, int, float, bool, type(None))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json"])
def test_every_file_format_gives_the_same_plain_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    for source in (path, str(path), [str(path)]):
        rows = read_rows(source)
        assert rows == READ
        assert plain(rows)


def test_numpy_and_arrow_values_become_plain() -> None:
    odd = row(
        1,
        data_source=np.str_("source1"),
        prompt=np.array(ROWS[1]["prompt"], dtype=object),
        target=pa.array([ROWS[1]["target"]])[0],
        reward_model={"style": pa.scalar("rule"), "ground_truth": np.str_("2")},
    )
    rows = read_rows(Given([odd]))
    assert rows == READ[1:2]
    assert plain(rows)


def test_a_directory_is_its_files_in_order_of_name(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", ROWS[3:])
    write(tmp_path / "a.parquet", ROWS[:3])
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "z.parquet").mkdir()
    assert read_rows(str(tmp_path)) == READ


def test_a_list_is_its_sources_one_after_the_other(tmp_path: Path) -> None:
    file = str(write(tmp_path / "rows.json", ROWS[:2]))
    assert read_rows([file, Given(ROWS[2:5]), file]) == READ[:5] + READ[:2]


def test_a_truth_may_be_absent_where_that_is_said(tmp_path: Path) -> None:
    bare = {key: value for key, value in ROWS[1].items() if key != "reward_model"}
    silent = [bare, {**ROWS[1], "reward_model": None}, {**ROWS[1], "reward_model": {"ground_truth": None}}]
    for name in ("rows.parquet", "rows.jsonl"):
        path = write(tmp_path / name, [ROWS[2], *silent])
        assert [r["reward_model"]["ground_truth"] for r in read_rows(path, unanswered=True)] == ["3", "", "", ""]
        with pytest.raises(InputError, match="row 2: "):
            read_rows(path)
    wrong = write(tmp_path / "wrong.jsonl", [{**ROWS[1], "reward_model": {"ground_truth": " "}}])
    with pytest.raises(InputError, match="a Unicode text, not empty, or a number"):
        read_rows(wrong, unanswered=True)


def test_target_may_be_absent_and_lines_may_be_blank(tmp_path: Path) -> None:
    bare = {key: value for key, value in ROWS[1].items() if key != "target"}
    for name in ("rows.parquet", "rows.jsonl"):
        (read,) = read_rows(write(tmp_path / name, [bare]))
        assert read == {**READ[1], "target": None}
    marked = tmp_path / "marked.jsonl"
    marked.write_text(json.dumps(bare), encoding="utf-8-sig")
    assert len(read_rows(marked)) == 1, "a byte order mark is no text"
    spaced = tmp_path / "spaced.jsonl"
    spaced.write_text("\n" + json.dumps(bare) + "\n  \n\n")
    assert len(read_rows(spaced)) == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_carriage_returns_and_byte_order_marks_are_no_text(tmp_path: Path, name: str, mark: str) -> None:
    text = mark + write(tmp_path / name, ROWS).read_text(encoding="utf-8").replace("\n", "\r\n")
    (tmp_path / name).write_bytes(text.encode())
    assert read_rows(tmp_path / name) == READ


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.parquet", None, r"absent\.parquet: cannot be read: No such file"),
        ("absent.jsonl", None, r"absent\.jsonl: cannot be read: No such file"),
        ("deep/down/there", None, "there: cannot be read: No such file"),
        ("empty.parquet", b"", "empty.parquet: the file is empty"),
        ("empty.jsonl", b"", "empty.jsonl: the file is empty"),
        ("blank.jsonl", b"\n \n", "blank.jsonl: holds no rows"),
        ("none.json", b"[]", "none.json: holds no rows"),
        ("text.parquet", b"data_source,prompt\n" * 9, "text.parquet: not a readable parquet file"),
        (
            "head.parquet",
            b"PAR1" + b"\x00" * 40,
            "head.parquet: (not a readable parquet file|cannot be read)",
        ),
        ("rows.xlsx", b"PK", r"rows\.xlsx: allowed are \.parquet, \.jsonl, \.json, \.csv"),
        ("head.csv", b"data_source,prompt\n", "head.csv: holds no rows"),
        ("blank.csv", b"\n\n", "blank.csv: holds no rows"),
        ("latin.csv", b"caf\xe9\n1\n", "latin.csv: not UTF-8"),
        ("open.csv", b'a,b\n"1,2\n', "open.csv: not CSV: unexpected end of data"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", "ragged.csv, row 2: has 3 cells, the first line names 2 columns"),
        ("twice.csv", b"a,b,a\n1,2,3\n", "twice.csv: its first line names column `a` twice"),
        ("no_suffix", b"{}", "no_suffix: allowed are"),
        ("latin.jsonl", b'{"data_source": "caf\xe9"}\n', "latin.jsonl: not UTF-8"),
        ("cut.jsonl", b'{}\n{"data_source": "a", "pro', "cut.jsonl, line 2: not JSON"),
        ("cut.json", b'[{"data_source"', "cut.json: not JSON"),
        ("one.json", b'{"data_source": "a"}', "one.json: a .json file must be one list"),
        ("digits.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"digits\.jsonl, line 1: not JSON"),
        ("nested.json", b"[" * 100_000, r"nested\.json: not JSON"),
        ("array.jsonl", b"[1, 2]\n", "array.jsonl, row 1: a row must be an object"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^data\.train: .*{message}") as caught:
        read_rows(str(tmp_path / name), "data.train")
    assert "\n" not in str(caught.value)


def test_a_cut_parquet_file_is_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.parquet", ROWS).read_bytes()
    for keep in (3, len(whole) // 2, len(whole) - 9):
        (tmp_path / "cut.parquet").write_bytes(whole[:keep])
        with pytest.raises(InputError, match=r"cut\.parquet") as caught:
            read_rows(tmp_path / "cut.parquet")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["folder", "folder.parquet"])
def test_a_directory_without_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name}: this directory holds no .* but nothing"):
        read_rows(str(tmp_path / name))
    (tmp_path / name / "data.arrow").write_bytes(b"x")
    with pytest.raises(InputError, match=r"but data\.arrow"):
        read_rows(str(tmp_path / name))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.chmod(0)
    with pytest.raises(InputError, match=r"rows\.jsonl: cannot be read: Permission denied"):
        read_rows(path)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json"])
@pytest.mark.parametrize("column", ["prompt", "reward_model"])
def test_a_missing_column_is_named_with_what_is_there(tmp_path: Path, name: str, column: str) -> None:
    rows = [{key: value for key, value in each.items() if key != column} for each in ROWS]
    with pytest.raises(
        InputError, match=f"{name}.*column `{column}` is missing; data.columns.* names another; there are .*ability"
    ):
        read_rows(write(tmp_path / name, rows))


MESSAGE = {"role": "user", "content": "1+1?"}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("data_source", None),
        ("data_source", ""),
        ("data_source", 3),
        ("prompt", 11),
        ("prompt", None),
        ("prompt", MESSAGE),
        ("prompt", []),
        ("prompt", [MESSAGE, "1+1?"]),
        ("prompt", [{"role": "user"}]),
        ("prompt", [{"role": "user", "content": None}]),
        ("prompt", [{"role": 1, "content": "1+1?"}]),
        ("prompt", [{"role": "user", "content": "half a character: \ud83e"}]),
        ("prompt", [{"role": "us\ud83eer", "content": "1+1?"}]),
        ("prompt", [MESSAGE, {"role": "assistant", "content": "It is"}]),
        ("data_source", "half\ud83e"),
        ("reward_model", "2"),
        ("reward_model", {"style": "rule"}),
        ("reward_model", {"style": "rule", "ground_truth": [2]}),
        ("reward_model", {"style": "rule", "ground_truth": True}),
        ("reward_model", {"style": "rule", "ground_truth": float("nan")}),
        ("reward_model", {"style": "rule", "ground_truth": None}),
        ("reward_model", {"style": "rule", "ground_truth": ""}),
        ("reward_model", {"style": "rule", "ground_truth": " \n"}),
        ("reward_model", {"style": "rule", "ground_truth": "\ude80"}),
        ("target", 2),
        ("target", []),
        ("target", [MESSAGE]),
        ("target", [{"role": "assistant", "content": "2"}] * 2),
        ("target", {"role": "assistant", "content": "2"}),
    ],
)
def test_a_row_of_the_wrong_type_is_named_by_file_and_number(tmp_path: Path, column: str, value: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS[:4], row(4, **{column: value}), *ROWS[5:]])
    with pytest.raises(InputError, match=rf"rows\.jsonl, row 5: `{column}[.a-z_]*` must be .*, got ") as caught:
        read_rows(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_wrong_type_in_parquet_is_found_too(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [row(number, prompt=["text"]) for number in range(3)])
    with pytest.raises(
        InputError, match=r"rows\.parquet, row 1: `prompt` must be a text, or a list .*, got list \['te"
    ):
        read_rows(path)


@pytest.mark.parametrize("source", [Given([]), Given([row(0), 7]), []], ids=["empty", "no row", "no source"])
def test_generators_and_lists_are_checked_like_files(source: Any) -> None:
    with pytest.raises(InputError, match=r"^data\.val: (Given: holds no rows|Given, row 2: a row|no source)"):
        read_rows(source, "data.val")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A hub that knows `owner/name` only; the list fills with what was asked for."""
    import datasets

    asked = []

    def load(name: str, *config: str, split: str) -> datasets.Dataset:
        asked.append((name, *config, split))
        if name != "owner/name":
            raise ConnectionError("no route\nto the hub")
        return datasets.Dataset.from_list(ROWS if split == "train" else [{"question": "1+1?"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_hub_names_with_and_without_a_split(hub: list[tuple[str, ...]]) -> None:
    rows = read_rows("owner/name")
    assert rows == READ
    assert plain(rows)
    with pytest.raises(InputError, match=r"owner/name:test, row 1: column `prompt` is missing; .*there are question"):
        read_rows("owner/name:test")
    assert read_rows("owner/name:main:train") == READ, "some data sets have several configurations"
    assert hub == [("owner/name", "train"), ("owner/name", "test"), ("owner/name", "main", "train")]


def test_what_is_neither_file_nor_on_the_hub_is_one_line(hub: list[tuple[str, ...]]) -> None:
    for name in ("owner/other", "nowhere"):
        with pytest.raises(InputError, match=f"data: {name}: no such file.*ConnectionError: no route") as caught:
            read_rows(name)
        assert "\n" not in str(caught.value)


def test_what_looks_like_a_path_is_never_looked_for_on_the_hub(
    hub: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "train.parquet",
        "data/train.jsonl",
        "./data",
        "../data",
        "~/no_such_file",
        "/no/such",
        "a/b/c",
    ):
        with pytest.raises(InputError):
            read_rows(name)
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "part.jsonl", ROWS)
    assert read_rows("owner") == READ, "an existing directory wins over a hub name"
    with pytest.raises(InputError, match="owner/misspelt: cannot be read: No such file"):
        read_rows("owner/misspelt")
    assert hub == []


@pytest.mark.skipif(not (DATA / "gsm8k_train.parquet").exists(), reason="the GSM8K file is not here")
def test_real_files() -> None:
    rows = read_rows(DATA / "gsm8k_train.parquet")
    assert len(rows) == 7473
    assert all(each["target"] for each in rows)
    assert {each["target"] for each in read_rows(DATA / "gsm8k_test.parquet")} == {None}


def test_two_sets_that_would_be_measured_as_one_are_refused(tmp_path: Path) -> None:
    bare = [{key: value for key, value in row.items() if key != "data_source"} for row in ROWS]
    places = []
    for name in ("aime", "amc"):
        (tmp_path / name).mkdir()
        places.append(str(write(tmp_path / name / "test.jsonl", bare)))
    with pytest.raises(InputError, match=r"^data\.test: .*amc/test\.jsonl: its rows have no column `data_source`"):
        read_rows(places, "data.test")
    assert len(read_rows(places, "data.train")) == 2 * len(bare)  # what is trained on is not told apart
    write(tmp_path / "amc" / "test.jsonl", ROWS)
    assert len(read_rows(places, "data.test")) == 2 * len(bare)


def test_subsets_of_one_hub_set_are_one(hub: list[tuple[str, ...]]) -> None:
    assert len(read_rows(["owner/name", "owner/name:train"], "data.test")) > 0
