"""Word problems from equations: what is made of the upstream format, what is left out, and that nothing leaks."""

import csv
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import terse_demonstrations, word_problems
from experiments.word_problems import SVAMP, TRAIN, VAL, as_text, main, make_row, make_rows, work_out
from mifo_lightning.data.rows import read_rows
from mifo_lightning.rewards.math_reward import MathReward

COLUMNS = ["Question", "Numbers", "Equation", "Answer", "group_nums", "Body"]
BOXES = "she found number0 boxes , each with number1 scarves and number2 mittens . how many pieces ?"


def source(question: str, numbers: str, equation: str, answer: str) -> dict[str, str]:
    return dict(zip(COLUMNS, [question, numbers, equation, answer, '"[1, 2]"', ""], strict=True))


def write(root: Path, name: str, rows: list[dict[str, str]]) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with (root / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def sums(start: int, count: int) -> list[dict[str, str]]:
    """Questions of one and of two operations, in turn."""
    return [
        source("ann has number0 and gets number1 . how many ?", f"{i}.0 3.0", "+ number0 number1", f"{i + 3}.0")
        if i % 2
        else source(BOXES, f"{i} 4 6", "* number0 + number1 number2", f"{10 * i}.0")
        for i in range(start, start + count)
    ]


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """The files of the repository of SVAMP, small; the held-out fold repeats a question of training in capitals."""
    root = tmp_path / "rows" / "source"
    write(root, TRAIN[0], sums(1, 40))
    write(root, TRAIN[1], sums(41, 20))
    again = source("Ann has number0 and gets number1 . how many ?", "5 3", "+ number0 number1", "8")
    write(root, VAL[0], [again, *sums(100, 8)])
    write(root, VAL[1], sums(200, 4))
    write(root, SVAMP[0], sums(300, 6))
    return root


def test_an_equation_becomes_its_calculations() -> None:
    row = make_row(source(BOXES, "8.0 4.0 6.0", "* number0 + number1 number2", "80.0"), "words")
    assert row is not None
    (prompt,), (demonstration,) = row["prompt"], row["target"]
    assert prompt["content"].startswith("She found 8 boxes, each with 4 scarves and 6 mittens. how many pieces? Write ")
    assert demonstration["content"] == "4 + 6 = 10\n8 * 10 = 80\n\\boxed{80}"
    assert (row["data_source"], row["reward_model"]["ground_truth"]) == ("words2", "80")


@pytest.mark.parametrize(
    ("equation", "numbers", "lines"),
    [
        ("- number0 number1", "8 2", ["8 - 2 = 6"]),
        ("- number1 number0", "2 8.50", ["8.5 - 2 = 6.5"]),
        ("* number0 0.01", "70", ["70 * 0.01 = 0.7"]),
        ("/ - number0 number1 number2", "19 11 2", ["19 - 11 = 8", "8 / 2 = 4"]),
        ("/ number0 number1", "10 3", None),  # four decimals do not write it
        ("/ number0 number1", "10 0", None),
        ("+ number0", "1 2", None),
        ("+ number0 number1 number1", "1 2", None),
        ("+ number0 number5", "1 2", None),
        ("^ number0 number1", "1 2", None),
        ("", "1", None),
    ],
)
def test_what_is_worked_out(equation: str, numbers: str, lines: list[str] | None) -> None:
    found = work_out(equation, numbers.split())
    assert (found and found[0]) == lines


def test_tokenised_questions_are_read_as_a_person_writes_them() -> None:
    text = "mrs. hilt 's dog has $ number0 , and number1 % more . she did n't spend it . how much ?"
    assert as_text(text, ["2.50", "10"]) == "Mrs. hilt's dog has $2.5, and 10% more. she didn't spend it. how much?"


@pytest.mark.parametrize(
    ("equation", "answer"),
    [("+ number0 number1", "10"), ("number0", "4"), ("+ + + number0 number0 number0 number1", "17"), ("+ 1 2", "x")],
)
def test_what_is_no_question_of_one_or_two_operations_with_its_answer_is_left_out(equation: str, answer: str) -> None:
    assert make_row(source("number0 and number1 ?", "4 5", equation, answer), "words") is None


def test_the_files_share_no_question_and_every_demonstration_is_right(
    upstream: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(word_problems, "COLD", 7)
    monkeypatch.setattr(sys, "argv", ["word_problems", "--out", str(upstream.parent)])
    main()
    names = ("words_cold", "words_rl", "words_val", "svamp")
    read = {name: read_rows(str(upstream.parent / f"{name}.parquet")) for name in names}
    assert {name: len(rows) for name, rows in read.items()} == {
        "words_cold": 7,
        "words_rl": 53,
        "words_val": 12,
        "svamp": 6,
    }
    assert {row["data_source"] for row in read["words_cold"]} == {"words1"}
    assert {row["data_source"] for row in read["words_rl"]} == {"words1", "words2"}
    asked = [row["prompt"][0]["content"].lower() for rows in read.values() for row in rows]
    assert len(set(asked)) == len(asked)
    rows = [row for each in read.values() for row in each]
    reward = MathReward()
    try:
        right = reward(
            [row["target"][0]["content"] for row in rows], [row["reward_model"]["ground_truth"] for row in rows]
        )
    finally:
        reward.close()
    assert right == [1.0] * len(rows)


def test_the_order_of_the_source_changes_nothing(upstream: Path) -> None:
    before = make_rows(upstream)
    write(upstream, TRAIN[0], list(reversed(sums(1, 40))))
    assert make_rows(upstream) == before


def test_what_cannot_be_loaded_is_one_line_that_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(word_problems, "ADDRESS", (tmp_path / "nowhere").as_uri() + "/")
    monkeypatch.setattr(sys, "argv", ["word_problems", "--out", str(tmp_path / "rows")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "https://github.com/arkilpatel/SVAMP" in line
    assert str(tmp_path / "rows" / "source") in line


def test_files_are_loaded_once_and_whole(upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_problems, "ADDRESS", upstream.as_uri() + "/")
    made = make_rows(tmp_path / "copy")
    assert made == make_rows(upstream)
    monkeypatch.setattr(word_problems, "ADDRESS", "http://127.0.0.1:9/")
    assert make_rows(tmp_path / "copy") == made


def test_terse_demonstrations_are_the_answers_alone_and_all_else_stays(
    upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(upstream)["words_rl"]
    nothing = pa.array([None] * len(rows), pa.string())
    table = pa.Table.from_pylist(rows).append_column("note", nothing)
    pq.write_table(table, tmp_path / "rows.parquet")
    terse_demonstrations.main(["--rows", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "out/terse.parquet")])
    short = pq.read_table(tmp_path / "out/terse.parquet")
    assert short.schema.equals(table.schema)
    assert short.drop_columns("target").equals(table.drop_columns("target"))
    texts = [target[0]["content"] for target in short["target"].to_pylist()]
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    assert texts == [f"\\boxed{{{truth}}}" for truth in truths]
    assert MathReward()(texts, truths) == [1.0] * len(rows)
    plain = pa.table({"target": ["2+3\n#### 5", "#### 6"]})
    pq.write_table(plain, tmp_path / "plain.parquet")
    terse_demonstrations.main(
        ["--rows", str(tmp_path / "plain.parquet"), "--marker", "####", "--out", str(tmp_path / "plain_terse.parquet")]
    )
    assert pq.read_table(tmp_path / "plain_terse.parquet")["target"].to_pylist() == ["#### 5", "#### 6"]

    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "bare.parquet")
    pq.write_table(pa.table({"target": ["#### 5", None]}), tmp_path / "gap.parquet")
    for arguments, said in (
        (["--rows", "rows", "--marker", "####"], "rows.parquet, row 0: its target has no '####'"),
        (["--rows", "gap", "--marker", "####"], "gap.parquet, row 1: its target is None"),
        (["--rows", "bare"], "bare.parquet: has no column target, but prompt"),
        (["--rows", "none"], "none.parquet"),
        (["--rows", "plain", "--marker", "####", "--out", str(tmp_path)], f"--out {tmp_path}: "),
    ):
        asked = [*arguments, *([] if "--out" in arguments else ["--out", str(tmp_path / "other.parquet")])]
        asked[1] = str(tmp_path / f"{asked[1]}.parquet")
        with pytest.raises(SystemExit) as end:
            terse_demonstrations.main(asked)
        assert end.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "other.parquet").exists()
