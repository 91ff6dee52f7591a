"""The bases that studies share: what is kept is what was made, rounded once, and every machine reads the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import bases
from experiments.base_training import build_model, build_tokenizer
from experiments.make_base import VOCABULARY


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for seed in (2, 10):
        torch.manual_seed(seed)
        build_model(VOCABULARY).save_pretrained(tmp_path / f"made/seed{seed}")
        build_tokenizer(VOCABULARY).save_pretrained(tmp_path / f"made/seed{seed}")
    return tmp_path / "made"


def test_bases_are_kept_rounded_once_and_written_as_they_are_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bases, "ASSETS", tmp_path / "assets")
    task = bases.Task(VOCABULARY, {"first weight": lambda model: model.lm_head.weight[0, 0].item()})
    monkeypatch.setitem(bases.TASKS, "skills", task)
    bases.main(["skills", "--pack", str(made), "--seeds", "2", "10"])
    printed = capsys.readouterr().out
    bases.main(["skills", "--out", str(tmp_path / "out")])
    for seed in (2, 10):
        before = AutoModelForCausalLM.from_pretrained(made / f"seed{seed}").state_dict()
        after = AutoModelForCausalLM.from_pretrained(tmp_path / f"out/seed{seed}").state_dict()
        assert {name: w.dtype for name, w in after.items()} == dict.fromkeys(before, torch.float32)
        for name, w in before.items():
            assert torch.equal(after[name], w.half().float())
        assert f"| seed{seed} | {after['lm_head.weight'][0, 0].item():.4f} |" in printed
    files = {path.name for path in (made / "seed2").iterdir()}
    assert {path.name for path in (tmp_path / "out/seed2").iterdir()} == files
    assert AutoTokenizer.from_pretrained(tmp_path / "out/seed2").get_vocab() == build_tokenizer(VOCABULARY).get_vocab()


def test_a_base_that_is_not_there_is_one_line(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bases, "ASSETS", tmp_path / "assets")
    for arguments, said in (
        (["--pack", str(made), "--seeds", "2", "3"], f"--pack {made}: has no seed3"),
        (["--out", str(tmp_path / "out")], "these bases have not been kept yet"),
        (["--out", str(tmp_path / "out"), "--seeds", "2"], "--seeds: goes with --pack"),
    ):
        with pytest.raises(SystemExit) as end:
            bases.main(["skills", *arguments])
        assert end.value.code == 2
        assert said in capsys.readouterr().err.strip().split("\n")[-1]


def test_models_of_another_task_leave_what_is_kept_as_it_is(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bases, "ASSETS", tmp_path)
    kept = tmp_path / "points_bases.safetensors"
    kept.write_bytes(b"kept")
    with pytest.raises(SystemExit) as end:
        bases.main(["points", "--pack", str(made), "--seeds", "2"])
    assert end.value.code == 2
    assert "seed2 is no base of this task" in capsys.readouterr().err
    assert kept.read_bytes() == b"kept"


@pytest.mark.parametrize("task", sorted(bases.TASKS))
def test_twelve_bases_are_kept_and_all_differ(task: str) -> None:
    file = bases.ASSETS / f"{task}_bases.safetensors"
    models = bases.unpack(file, bases.TASKS[task].vocabulary)
    assert len(models) == 12
    assert len({model.lm_head.weight.sum().item() for model in models.values()}) == 12
