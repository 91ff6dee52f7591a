"""The best checkpoint of an SFT run: chosen on validation, the earliest of equals, and written as a model."""

import json
from pathlib import Path

import pytest
import torch
from small_grid import BASE, ROOT
from transformers import AutoModelForCausalLM

from experiments.sft_checkpoints import best, main


def test_the_highest_is_chosen_and_of_equals_the_earliest() -> None:
    assert best({0: {"a": 0.1}, 5: {"a": 0.4}, 10: {"a": 0.4}, 20: {"a": 0.3}}, "a") == 5


def test_two_bases_of_one_name_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bases = [tmp_path / place / "seed0" for place in ("a", "b")]
    for base in bases:
        base.mkdir(parents=True)
        (base / "config.json").write_text("{}", encoding="utf-8")
    assert main(["--bases", *map(str, bases), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert "--bases: seed0 is the name of two" in line


@pytest.mark.slow
def test_the_chosen_model_is_that_of_the_run_after_so_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    small = tmp_path / "small.yaml"
    counts = {"train": {"init_args": {"count": 64}}, "val": {"init_args": {"count": 16}}}
    small.write_text(json.dumps({"data": {**counts, "schedule": {"sft_batch": 8}}}), encoding="utf-8")
    arguments = ["--config", "tiny", str(small), "--bases", BASE, "--steps", "0", "2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.split("\n") if line.startswith("| base |") and "step" not in line]
    chosen = int(row.split("|")[-2])
    recorded = json.loads((tmp_path / "out/chosen.json").read_text(encoding="utf-8"))["base"]
    assert recorded["chosen"] == chosen
    measured = [f"{recorded['validation'][step]['avg@1']:.3f}" for step in ("0", "2")]
    assert measured == row.replace(" ", "").split("|")[2:4]
    (made,) = (tmp_path / "out/runs").glob("sft/base/seed0")
    weights = {
        place: AutoModelForCausalLM.from_pretrained(place).state_dict()["lm_head.weight"]
        for place in (tmp_path / "out/base", made / "model-0", made / "model-2", ROOT / BASE)
    }
    found, start, end, base = weights.values()
    assert torch.equal(start, base)
    assert not torch.equal(start, end)
    assert torch.equal(found, {0: start, 2: end}[chosen])
    written = (made / "outcome.json").stat().st_mtime
    assert main(arguments) == 0
    assert (made / "outcome.json").stat().st_mtime == written
