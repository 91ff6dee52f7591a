"""Columns of one's own: question and answer by name, plain texts, numbers; what is wrong is one line."""

import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rows import Given, plain, row, write

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.columns import Columns, truth_text
from mifo_lightning.data.rows import read_rows
from mifo_lightning.data.source import Row

QA = Columns(prompt="question", truth="answer")
FLAT = [{"question": f"What is {i}+{i}?", "answer": str(2 * i), "solution": f"{i}+{i}\nis {2 * i}"} for i in range(3)]


def expected(source: str, *, target: bool = False) -> list[Row]:
    return [
        {
            **each,
            "data_source": source,
            "prompt": [{"role": "user", "content": each["question"]}],
            "reward_model": {"style": "rule", "ground_truth": each["answer"]},
            "target": [{"role": "assistant", "content": each["solution"]}] if target else None,
        }
        for each in FLAT
    ]


def csv(path: Path, rows: list[dict[str, str]]) -> Path:
    cells = [list(rows[0]), *(list(each.values()) for each in rows)]
    lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    return path


@pytest.mark.parametrize("name", ["mine.parquet", "mine.jsonl", "mine.json", "mine.csv"])
def test_question_and_answer_by_name(tmp_path: Path, name: str) -> None:
    path = csv(tmp_path / name, FLAT) if name.endswith("csv") else write(tmp_path / name, FLAT)
    assert read_rows(path, columns=QA) == expected("mine")
    with_target = Columns(prompt="question", truth="answer", target="solution")
    rows = read_rows(str(path), columns=with_target)
    assert rows == expected("mine", target=True)
    assert plain(rows)


def test_rows_without_a_source_are_named_after_the_directory_not_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sums").mkdir()
    write(tmp_path / "sums" / "part-0.jsonl", FLAT[:1])
    csv(tmp_path / "sums" / "part-1.csv", FLAT[1:])
    assert read_rows(tmp_path / "sums", columns=QA) == expected("sums")
    monkeypatch.chdir(tmp_path / "sums")
    assert read_rows(".", columns=QA) == expected("sums")
    (tmp_path / "v1.5").symlink_to(tmp_path / "sums")
    assert read_rows(tmp_path / "v1.5", columns=QA) == expected("v1.5")


def test_a_hub_set_needs_no_row_format(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_list(FLAT))
    assert read_rows("openai/gsm8k:main:train", columns=QA) == expected("openai/gsm8k")


def test_the_truth_may_stand_after_a_marker_in_the_demonstration(tmp_path: Path) -> None:
    worked = [{"question": "2+2?", "answer": "#### is no heading.\n2+2 is 4\n#### 4\n"}]
    columns = Columns(prompt="question", truth="answer", target="answer", truth_after="####")
    (read,) = read_rows(write(tmp_path / "gsm8k.jsonl", worked), columns=columns)
    assert read["reward_model"]["ground_truth"] == "4"
    assert read["target"] == [{"role": "assistant", "content": worked[0]["answer"]}]
    for answer in ("it is 4", "#### \n", 4):
        with pytest.raises(InputError, match=r"row 2: `answer` must be a text with an answer after '####' .*got"):
            read_rows(
                Path(write(tmp_path / "no.jsonl", [*worked, {"question": "?", "answer": answer}])), columns=columns
            )


def test_a_path_leads_into_nested_columns_and_a_name_with_dots_comes_first(tmp_path: Path) -> None:
    nested = [{"q.text": "1+1?", "meta": {"answers": ["2", "two"], "level": "easy"}}]
    columns = Columns(prompt="q.text", truth="meta.answers.0", data_source="meta.level")
    (read,) = read_rows(write(tmp_path / "nested.jsonl", nested), columns=columns)
    assert (read["prompt"][0]["content"], read["reward_model"]["ground_truth"]) == ("1+1?", "2")
    assert read["data_source"] == "easy"
    for truth, got in (("meta.answers.7", "dict"), ("meta.answer", "dict"), ("meta.answers.first", "dict")):
        wrong = Columns(prompt="q.text", truth=truth)
        with pytest.raises(InputError, match=rf"row 1: `meta` must be an object that holds `answer.*got {got}"):
            read_rows(tmp_path / "nested.jsonl", columns=wrong)


def test_plain_prompts_targets_and_numbers_need_no_mapping() -> None:
    texts = row(1, prompt="1+1?", target="It is 2.", reward_model={"style": "rule", "ground_truth": 2})
    del texts["data_source"]
    (read,) = read_rows(Given([texts]))
    assert read["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert read["target"] == [{"role": "assistant", "content": "It is 2."}]
    assert read["reward_model"] == {"style": "rule", "ground_truth": "2"}
    assert read["data_source"] == "Given"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (72, "72"),
        (-3, "-3"),
        (72.0, "72"),
        (-0.5, "-0.5"),
        (0.1, "0.1"),
        (1e-7, "0.0000001"),
        (2.0**53, 2.0**53),
        (2**60, "1152921504606846976"),
        (Decimal("1.50"), "1.50"),
        ("1e3", "1e3"),
        (True, True),
        (None, None),
    ],
)
def test_a_number_is_the_text_that_a_person_writes(value: object, text: object) -> None:
    assert truth_text(value) == text
    assert np.isnan(truth_text(float("nan")))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": "qestion"},
            r"mine\.jsonl: column `qestion` is missing \(data\.columns\.prompt\); there are question, ",
        ),
        (
            {"truth": "a.b"},
            r"mine\.jsonl: column `a\.b` is missing \(data\.columns\.truth\); there are question, answer",
        ),
        ({"data_source": "level"}, r"column `level` is missing \(data\.columns\.data_source\); there are question"),
        ({"truth": "reward_model.ground_truth"}, "column `reward_model` is missing; data.columns.truth names another"),
        ({"target": "numbers"}, r"row 1: `numbers` must be null, a Unicode text, or a list .*got int 1"),
        ({"data_source": "numbers"}, r"row 1: `numbers` must be a name in Unicode, got int 1"),
        ({"prompt": "numbers"}, r"row 1: `numbers` must be a text, or a list of .*, got int 1"),
        ({"truth": "gaps"}, r"row 2: `gaps` must be a Unicode text, not empty, or a number, got NoneType None"),
        ({"prompt": "gaps"}, r"row 2: `gaps` must be a text, or a list of .*, got NoneType None"),
    ],
)
def test_a_wrong_mapping_is_one_line_that_lists_the_columns(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    rows = [{**each, "numbers": 1, "gaps": None if i else "a"} for i, each in enumerate(FLAT)]
    path = write(tmp_path / "mine.jsonl", rows)
    columns = Columns(**{"prompt": "question", "truth": "answer", **changes})
    with pytest.raises(InputError, match=rf"^data\.train: .*{message}") as caught:
        read_rows(path, "data.train", columns)
    assert "\n" not in str(caught.value)


def test_a_file_in_the_row_format_is_read_beside_mapped_ones_and_that_is_said(tmp_path: Path) -> None:
    mapped, rows = write(tmp_path / "mine.jsonl", FLAT), write(tmp_path / "theirs.jsonl", [row(1)])
    with pytest.warns(
        UserWarning, match=r"theirs\.jsonl: has none of the columns .*\(question, answer\); .*row format"
    ):
        read = read_rows([mapped, rows], columns=QA)
    assert read == [*expected("mine"), row(1)]
    write(tmp_path / "half.jsonl", [row(1, question="?")])
    with pytest.raises(InputError, match=r"column `answer` is missing \(data.columns.truth\)"):
        read_rows(tmp_path / "half.jsonl", columns=QA)


def test_a_file_without_the_named_demonstrations_is_read_and_that_is_said(tmp_path: Path) -> None:
    columns = Columns(prompt="question", truth="answer", target="reasoning")
    with pytest.warns(UserWarning, match=r"no column `reasoning` \(data\.columns\.target\), so no demonstrations"):
        assert read_rows(write(tmp_path / "mine.jsonl", FLAT), columns=columns) == expected("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = [FLAT[0], {**FLAT[1], "reasoning": "so"}]  # JSON lines may leave it out here and there
        read = read_rows(write(tmp_path / "some.jsonl", some), columns=columns)
    assert [each["target"] and each["target"][0]["content"] for each in read] == [None, "so"]


def test_the_cells_of_a_csv_file_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text('question,answer\n"a, ""b""\nc",007\n\n1,1e3\nnull,nan\n', encoding="utf-8")
    read = read_rows(path, columns=QA)
    assert [each["question"] for each in read] == ['a, "b"\nc', "1", "null"]
    assert [each["reward_model"]["ground_truth"] for each in read] == ["007", "1e3", "nan"]
    path.write_text("question,answer\n1+1?,\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"row 1: `answer` must be a Unicode text, not empty, or a number, got str ''"):
        read_rows(path, columns=QA)
