"""The study of circuits as a command: records are made once, and the page is made of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import t as student

from experiments.circuits.__main__ import main
from mifo_lightning.policy.loading import export_model, load_policy, load_tokenizer, locate


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid with one finished run, whose model is the embedded base with noise, and one that is not finished."""
    policy = load_policy("embedded")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.05 * torch.randn_like(p)
    grid = tmp_path_factory.mktemp("grid")
    run = grid / "sft" / "one" / "seed3"
    export_model(policy, load_tokenizer("embedded"), run / "model", write=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"model": locate("embedded")}}))
    (run / "summary.json").write_text("{}")
    (run / "outcome.json").write_text('{"error": null, "seconds": 1.0}')
    (grid / "rl" / "one" / "seed3").mkdir(parents=True)
    return grid


def content(runs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "runs": str(runs),
        "arms": ["rl", "sft"],
        "primary_arm": "sft",
        "bases": {"one": locate("embedded")},
        "skills": ["mirrored", "sorting"],
        "untrained": ["sorting"],
        "questions": 10,
        "kept": 0.3,
        "random_sets": 2,
        "out": str(out),
    } | changes


def run(directory: Path, what: dict[str, Any]) -> None:
    file = directory / "study.yaml"
    file.write_text(yaml.safe_dump(what))
    main(["--config", str(file)])


@pytest.fixture(scope="module")
def measured(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command has left its records and page."""
    directory = tmp_path_factory.mktemp("measured")
    run(directory, content(runs, directory / "out"))
    return directory / "out"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_records_say_what_they_mean(measured: Path) -> None:
    base, sft = read(measured / "base" / "one.json"), read(measured / "sft" / "one.json")
    sorting, mirrored = base["skills"]["sorting"], base["skills"]["mirrored"]
    assert sorting["accuracy"] > 0.9
    assert (
        set(sorting["mean"])
        == set(sorting["resampled"])
        == {f"{i}.{part}" for i in range(3) for part in "012"} | {f"{i}.mlp" for i in range(3)}
    )
    assert sorting["circuit_accuracy"] >= 0.3 * sorting["accuracy"]
    assert sorting["smallest_accuracy"] >= 0.3 * sorting["accuracy"]
    assert 0 < len(sorting["smallest"]) <= len(sorting["circuit"])
    assert mirrored["accuracy"] == 0
    assert mirrored["circuit"] is None is mirrored["smallest"]
    assert base["other_sample"]["sorting"]["mean"] != sorting["mean"]

    into_tuned, into_base = (sft["transplant"]["sorting"][way] for way in ("into_tuned", "into_base"))
    assert list(sft["transplant"]) == ["sorting"]
    assert into_tuned["none"] < into_base["none"]
    assert into_base["none"] == base["other_sample"]["sorting"]["accuracy"]
    assert len(into_tuned["random"]) == 2
    for way in (into_tuned, into_base):
        size = len(sorting["circuit"])
        assert way["most_necessary_first"][size - 1] == way["circuit"]
        assert way["most_necessary_first"][8] == way["least_necessary_first"][8] == way["heads"]
    assert sft["run"].endswith("seed3")
    assert sft["random_change"]["sorting"]["accuracy"] != sorting["accuracy"]


def test_what_has_a_record_is_not_measured_again(
    runs: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in measured.glob("*/*.json")}
    assert len(before) == 2
    monkeypatch.setattr("experiments.circuits.records.Bench", None)
    run(tmp_path, content(runs, measured))
    assert {path: path.stat().st_mtime_ns for path in measured.glob("*/*.json")} == before
    printed = capsys.readouterr().out
    assert "rl/one: no finished run below" in printed
    assert "sft/one" not in printed
    monkeypatch.undo()

    (measured / "sft" / "one.json").rename(tmp_path / "kept.json")
    run(tmp_path, content(runs, measured))
    again, first = read(measured / "sft" / "one.json"), read(tmp_path / "kept.json")
    assert {**again, "cpu_seconds": 0} == {**first, "cpu_seconds": 0}
    assert (measured / "base" / "one.json").stat().st_mtime_ns == before[measured / "base" / "one.json"]


def test_other_settings_are_measured_anew(runs: Path, measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "base").mkdir(parents=True)
    (out / "base" / "one.json").write_bytes((measured / "base" / "one.json").read_bytes())
    what = content(runs, out, skills=["sorting"], questions=5, arms=["rl"], primary_arm="rl")
    with pytest.raises(SystemExit):  # no arm has a run: no page, but the base has its record
        run(tmp_path, what)
    assert read(out / "base" / "one.json")["key"] != read(measured / "base" / "one.json")["key"]


def test_the_page_is_made_of_records_alone(measured: Path, tmp_path: Path) -> None:
    page, again = tmp_path / "page", tmp_path / "again"
    main(["--report", str(measured), "--out", str(page)])
    main(["--report", str(page), "--out", str(again)])
    for name in ("report.md", "circuits.svg", "records.json"):
        assert (measured / name).read_bytes() == (page / name).read_bytes() == (again / name).read_bytes()
    text = (page / "report.md").read_text()
    assert "- sft: patching the base's circuit restores" in text
    assert "rl" not in [cell.strip() for cell in text.replace("\n", "|").split("|")]  # it has no run
    assert "most necessary first" in (page / "circuits.svg").read_text()
    commits = {read(measured / arm / "one.json")["commit"] for arm in ("base", "sft")}
    assert f"at commit {', '.join(one or '(not recorded)' for one in commits)}, of the models below" in text


def test_the_primary_comparison_is_the_mean_over_bases(measured: Path, tmp_path: Path) -> None:
    """Three bases on which the order of heads makes a difference of .5, .7 and .3."""
    study = read(measured / "study.json") | {"bases": ["a", "b", "c"]}
    for base, most in (("a", 0.7), ("b", 0.9), ("c", 0.5)):
        for arm in ("base", "sft"):
            made = read(measured / arm / "one.json")
            if arm == "sft":
                made["transplant"]["sorting"]["into_tuned"] |= {
                    "none": 0.1, "circuit": most + 0.05, "random": [0.2, 0.3],
                    "most_necessary_first": [most] * 8 + [0.0], "least_necessary_first": [0.2] * 8 + [0.0],
                }  # fmt: skip
            (tmp_path / arm).mkdir(exist_ok=True)
            (tmp_path / arm / f"{base}.json").write_text(json.dumps(made))
    (tmp_path / "study.json").write_text(json.dumps(study))
    main(["--report", str(tmp_path)])
    page = (tmp_path / "report.md").read_text()
    half = student.ppf(0.975, 2) * 0.2 / 3**0.5
    assert f"+0.500 [{0.5 - half:+.3f}, {0.5 + half:+.3f}], ahead on 3 of 3 bases, p = 0.250, not significant" in page
    assert "restores 0.650 [" in page
    assert "as many random heads restore 0.150 [0.150, 0.150]" in page


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"kept": 1.5}, "kept: 1.5 is not allowed; it must be above 0, at most 1"),
        ({"questions": 0}, "questions: 0 is not allowed; it must be 1 or more"),
        ({"given": 12}, "given: 12 is not allowed"),
        ({"skills": ["sorting", "juggling"]}, "skills: ['sorting', 'juggling'] is not allowed"),
        ({"untrained": ["reversal"]}, "untrained: ['reversal'] is not allowed; it must be one or more of `skills`"),
        ({"primary_arm": "mifo"}, "primary_arm: mifo is not allowed; it must be one of rl, sft"),
        ({"arms": ["sft", "base"]}, "none 'base'"),
        ({"question": 1}, "unknown key question; allowed are runs"),
        ({"bases": {"one": "nowhere"}}, "bases.one: nowhere is no model directory"),
        ({"questions": "many"}, "questions"),
    ],
)
def test_bad_input_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], line: str
) -> None:
    with pytest.raises(SystemExit) as end:
        run(tmp_path, content(runs, tmp_path / "out", **change))
    assert end.value.code == 2
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert line in last


def test_a_run_from_another_base_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.symlink_to(locate("embedded"))
    with pytest.raises(SystemExit):
        run(tmp_path, content(runs, tmp_path / "out", bases={"one": str(other)}, questions=2, skills=["sorting"]))
    assert f"seed3 started from {locate('embedded')}" in capsys.readouterr().err


def test_records_of_other_settings_make_no_page(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = read(measured / "study.json")
    (tmp_path / "study.json").write_text(json.dumps({**study, "questions": 11}))
    for arm in ("base", "sft"):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "one.json").write_bytes((measured / arm / "one.json").read_bytes())
    with pytest.raises(SystemExit) as end:
        main(["--report", str(tmp_path)])
    assert end.value.code == 2
    assert "one.json: was measured with other settings" in capsys.readouterr().err


def test_a_directory_without_records_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--report", str(tmp_path)])
    assert end.value.code == 2
    assert "has no study.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"study": {}}', '{"study": {}, "records": []}', '{"study": {}, "records": {}}']
)
def test_damaged_records_of_a_page_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["--report", str(tmp_path)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'records.json'}: is damaged: ")
    assert (tmp_path / "records.json").read_text() == text


def test_the_shipped_file_is_read() -> None:
    from experiments.circuits.study import read_study

    study = read_study(Path(__file__).parents[1] / "experiments" / "circuits.yaml")
    assert len(study.bases) == 12
    assert study.arms == ["rl", "sft", "sft_then_rl", "interleave", "mifo"]
