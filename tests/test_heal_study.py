"""The heal study as a command: bad input is one line, a small study runs through, and runs nothing twice."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import warm
import yaml
from small_grid import BASE, ROOT

from experiments.heal import measure, sweep
from experiments.heal.__main__ import main
from experiments.heal.measure import describe
from experiments.heal.records import Records, open_records
from experiments.heal.settings import Study, read_study
from experiments.heal.three_ways import ThreeWays
from experiments.make_points_base import Recipe, make
from experiments.prune_update import read_weights
from mifo_lightning.common.errors import InputError
from mifo_lightning.lab import runner
from mifo_lightning.lab.cell import LOCK, held
from mifo_lightning.losses.advantages import GroupStd

SMALL: dict[str, Any] = {
    "name": "small",
    "config": ["points"],
    "set": {
        "updates": None,
        "data.train.init_args.count": 64,
        "data.val.init_args.count": 24,
        "data.schedule.prompts_per_step": 4,
        "data.schedule.sft_batch": 16,
        "model.rollout.group_size": 2,
    },
    "id": "points-ten/avg@1",
    "id_seen": "points-ten-seen/avg@1",
    "ood": "points-literal/avg@1",
    "evaluation": {
        "val": {"data.val.init_args.split": "val"},
        "test": {
            "data.val": {
                "class_path": "mifo_lightning.data.general_points.GeneralPoints",
                "init_args": {"rules": ["ten", "ten-seen", "literal"], "count": 24, "split": "test"},
            }
        },
    },
    "signal_questions": 4,
    "draws": 2,
    "sweep": {"steps": [0, 1, 3]},
    "protected": 0.25,
    "rl": {"grpo": {"configs": ["methods/rl"], "set": {"data.schedule.rl_steps": 1}, "start": [0, "peak", "end"]}},
    "spectra": {"k": [1, "1/4"]},
    "edits": {
        "primary": "either top 1/4",
        "kinds": ["either", "as_published", "reverse"],
        "k": ["1/4"],
        "thirds": False,
        "published": [["1/8", "0"]],
        "seeds": 1,
        "interpolation": [0.5],
    },
}


def write(root: Path, **changes: Any) -> Path:
    """A study of one base, with some keys changed; None leaves a key out, a dict changes keys of a group."""
    content = {**SMALL, "bases": {"shipped": str(ROOT / BASE)}, "out": str(root / "out")}
    for key, value in changes.items():
        content[key] = (
            {**content[key], **value} if isinstance(value, dict) and isinstance(content.get(key), dict) else value
        )
    path = root / "study.yaml"
    text = yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"ood": None}, "ood"),
        ({"colour": "red"}, "unknown key colour; allowed are name, config"),
        ({"sweep": {"stepps": [0, 1]}}, "sweep: unknown key stepps; allowed are steps, configs, set"),
        ({"sweep": {"steps": [1, 2]}}, "sweep.steps: [1, 2] is not allowed; it must be ascending"),
        ({"sweep": {"steps": [0, 4, 2]}}, "sweep.steps: [0, 4, 2] is not allowed"),
        ({"rl": {"grpo": {"start": [0, 5]}}}, "rl.grpo.start: [5] is not allowed; it must be some of 0, 1"),
        ({"rl": {"grpo": {"start": ["end"]}}}, "rl.grpo.start: ['end'] is not allowed; it must be a list"),
        ({"rl": {"grpo": {"strat": [0]}}}, "rl.grpo: unknown key strat"),
        ({"rl": []}, "rl: [] is not allowed; it must be at least one name"),
        ({"spectra": {"k": ["3/2"]}}, "spectra.k: 3/2 is not allowed; it must be whole numbers"),
        ({"spectra": {"k": ["1/0"]}}, "spectra.k: 1/0 is not allowed"),
        ({"spectra": {"steps": [2]}}, "spectra.steps: [2] is not allowed; it must be some of"),
        ({"edits": {"primary": "either top 1/3"}}, "edits.primary: either top 1/3 is not allowed; it must"),
        ({"edits": {"kinds": ["ether"]}}, "edits.kinds: ['ether'] is not allowed; it must be some"),
        ({"edits": {"published": [["1/8"]]}}, "edits.published: ['1/8'] is not allowed; it must be pairs"),
        ({"edits": {"interpolation": [1.5]}}, "edits.interpolation: [1.5] is not allowed"),
        ({"evaluation": {"test": None}, "bases": {"a": "x"}}, "evaluation"),
        ({"bases": {"a": "nowhere"}, "make_bases": "make them"}, "bases.a: nowhere is no model directory; make it"),
        ({"set": {"model.model": "x"}}, "set: model.model is not allowed; it must be left out: the study gives it"),
        ({"sweep": {"set": {"export.steps": [1]}}}, "sweep.set: export.steps is not allowed"),
        ({"config": ["pionts"]}, "configs: pionts: neither a file nor the name of a packaged configuration; did you"),
        ({"jobs": 0}, "jobs"),
        ({"protected": 1.5}, "protected: 1.5 is not allowed; it must be a share between 0 and 1, or null"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], line: str
) -> None:
    assert main(["--config", str(write(tmp_path, **changes))]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert line in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/heal/*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_right_but_for_their_bases_and_every_key_has_a_comment(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    copy = tmp_path / path.name
    content = yaml.safe_load(text)
    content["bases"] = dict.fromkeys(content["bases"], str(ROOT / BASE))
    copy.write_text(yaml.safe_dump(content), encoding="utf-8")
    study = read_study(copy)
    assert set(content) == {key for key in vars(study) if key in content}
    keys = [line for line in text.splitlines() if line and line[0] not in " #"]
    assert [key for key in keys if "#" not in key] == []


def test_what_rl_has_to_work_with() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    found = describe(rewards, GroupStd()(rewards))
    assert found["groups with signal"] == 0.5
    assert found["positive"] == pytest.approx(7 / 16)
    # advantages: 0 eight times, one for the right and three for the wrong of the first group, two and two of the last
    p = torch.tensor([8, 1, 3, 2, 2]) / 16
    assert found["advantage entropy"] == pytest.approx(float(-(p * p.log()).sum()))
    still = torch.ones(3, 4)
    assert describe(still, GroupStd()(still))["advantage entropy"] == 0.0


def test_records_are_kept_and_never_mixed_with_those_of_other_settings(tmp_path: Path) -> None:
    path, calls = tmp_path / "records" / "a.json", []

    def measure_it() -> dict[str, float]:
        calls.append(1)
        return {"value": 1 / 3, "none": float("nan")}

    for _ in range(2):
        assert Records(path, {"id": "x"}).once("stage", "name", measure_it) == {"value": 0.333333, "none": None}
    assert len(calls) == 1
    with pytest.raises(InputError, match=r"was made with another id; choose another `out`"):
        Records(path, {"id": "y"})


@pytest.mark.parametrize(
    "text", ["{", "<<<<<<< HEAD", "[]", "{}", '{"study": 3}', '{"study": {}, "sweep": []}', "\xff"]
)
def test_damaged_records_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "records" / "shipped.json"
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    assert main(["--config", str(write(tmp_path, records=str(path.parent)))]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {path}: no readable records: ")
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("key", ["records", "out"])
def test_a_place_that_cannot_be_written_is_one_line_before_the_first_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    monkeypatch.setattr(runner, "run_here", None)
    assert main(["--config", str(write(tmp_path, **{key: str(tmp_path / "taken")}))]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {key}: ")
    assert "taken" in said


def test_three_ways_of_files(tmp_path: Path) -> None:
    files = {}
    for kind in ("seen", "unseen", "ood"):
        rows = [
            {"data_source": "x", "prompt": f"{kind} {i}", "reward_model": {"ground_truth": str(i)}} for i in range(6)
        ]
        files[kind] = str(tmp_path / f"{kind}.parquet")
        pq.write_table(pa.Table.from_pylist(rows), files[kind])
    asked = {split: ThreeWays(**files, split=split, count=2).rows() for split in ("val", "test")}
    for rows in asked.values():
        assert [row["data_source"] for row in rows] == ["seen"] * 2 + ["unseen"] * 2 + ["ood"] * 2
    truths = {split: [row["reward_model"]["ground_truth"] for row in rows] for split, rows in asked.items()}
    assert truths == {"val": ["0", "1", "0", "2", "0", "2"], "test": ["0", "1", "1", "3", "1", "3"]}
    with pytest.raises(InputError, match=r"unseen: .*3 rows for test, 4 are asked for"):
        ThreeWays(**files, split="test", count=4).rows()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has been run, of a base that was made for it."""
    warm.ready()
    root = tmp_path_factory.mktemp("heal")
    make(0, root / "base", 4, Recipe(steps=30, batch=32, warmup=5, decay_from=20, pool=400))
    path = write(root, bases={"tiny": str(root / "base")})
    content = yaml.safe_load(path.read_text())
    content["bases"].pop("shipped")
    path.write_text(yaml.safe_dump(content))
    assert main(["--config", str(path)]) == 0
    return path


@pytest.mark.slow
def test_a_study_runs_through_and_its_controls_control(small: Path) -> None:
    out = small.parent / "out"
    page = (out / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# small\n")
    assert all((out / name).is_file() for name in ("curve.svg", "window.svg"))
    records = json.loads((out / "records.json").read_text())
    base = records["bases"]["tiny"]
    assert set(base["questions"].values()) == {8}
    assert base["rl"]["no update/3"]["norm"] == 0.0
    assert base["rl"]["no update/3"]["test"] == base["sweep"]["3"]["test"]
    assert base["rl"]["grpo/3"]["optimizer steps"] == 1
    model = out / "fits" / "tiny" / "sweep" / "base" / "seed0"
    start, first = (read_weights(model / f"model-{step}") for step in (0, 1))
    assert all(torch.equal(start[n], w) for n, w in read_weights(small.parent / "base").items())
    assert any(not torch.equal(start[n], w) for n, w in first.items())
    assert {f"{label} -> rl" for label in ("base", "end")} <= base["spectra"].keys()
    tries = base["tries"]
    assert tries.keys() == {f"{arm}/{step}" for arm in ("SFT", "grpo") for step in {0, base["peak"], 3}}
    for found in tries.values():
        assert found["points-ten/avg@5"] <= found["points-ten/pass@5"]
        assert set(found) >= {"points-literal/greedy", "points-ten-seen/pass@5"}
    if base["edits"]:
        assert base["edits"]["interpolation 1"]["norm"] > 0
    for run in ("protected 0.25", "protected at random 0.25"):
        assert base[run]["0"]["test"] == base["sweep"]["0"]["test"]
        held = out / "fits" / "tiny" / run.replace(" ", "_") / "base" / "seed0"
        before, after = (read_weights(held / f"model-{step}") for step in (0, 3))
        for name in (n for n, w in before.items() if w.ndim == 2 and "layers" in n):
            change, own = (after[name] - before[name]).double(), torch.linalg.svd(before[name].double())[0]
            k = min(change.shape) // 4
            still = float((own[:, :k].T @ change).norm() / change.norm())
            assert (still < 1e-3) == (run == "protected 0.25"), (name, still)
    assert "trained tokens" not in json.dumps(records)


@pytest.mark.slow
def test_the_same_command_runs_nothing_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = small.parent / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was done already")

    monkeypatch.setattr(runner, "run_here", never)
    monkeypatch.setattr(measure.Bench, "evaluate", never)
    assert main(["--config", str(small)]) == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_second_call_waits_for_the_first(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status: list[int] = []
    second = threading.Thread(target=lambda: status.append(main(["--config", str(small)])))
    with held(small.parent / "out" / LOCK):
        second.start()
        said = ""
        while second.is_alive() and "another call runs this study" not in said:
            said += capsys.readouterr().out
        assert status == []
    second.join(60)
    assert status == [0]
    assert "wrote" not in said


@pytest.mark.slow
def test_a_measured_base_needs_no_fits_and_is_gone_on_with_from_its_own_weights_alone(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(small.read_text())
    kept = tmp_path / "records" / "tiny.json"
    kept.parent.mkdir()
    shutil.copy(small.parent / "out" / "records" / "tiny.json", kept)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content | {"records": str(kept.parent), "out": str(tmp_path / "new")}))
    with monkeypatch.context() as patch:  # on another machine, which has the records alone
        patch.setattr(runner, "run_here", None)
        assert main(["--config", str(path)]) == 0
    pages = [(out / "report.md").read_text() for out in (small.parent / "out", tmp_path / "new")]
    assert pages[0] == pages[1]
    lacking = json.loads(kept.read_text())
    del lacking["seconds"]["measure spectra"]
    lacking["facts"]["end"] = "of another CPU"
    kept.write_text(json.dumps(lacking))
    path.write_text(yaml.safe_dump(content | {"records": str(kept.parent)}))
    capsys.readouterr()
    assert main(["--config", str(path)]) == 2
    assert "model-3 has other weights than those that were measured" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # of the base it can be told before the first fit
        patch.setattr(runner, "run_here", None)
        kept.write_text(json.dumps(lacking | {"facts": {**lacking["facts"], "start": "of another CPU"}}))
        assert main(["--config", str(path)]) == 2
        assert "is another base than the one that its fits began with" in capsys.readouterr().err
    del lacking["seconds"]["measure sweep"], lacking["sweep"]["1"]  # cut off within the sweep
    kept.write_text(json.dumps(lacking))
    assert main(["--config", str(path)]) == 2
    assert "model-3 has other weights than those that were measured" in capsys.readouterr().err
    assert "1" not in json.loads(kept.read_text())["sweep"]


@pytest.mark.slow
def test_what_is_missing_of_a_stage_is_measured_again_and_comes_out_the_same(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study: Study = read_study(small)
    records = open_records(study, "tiny")
    lost = records.content[sweep.SWEEP].pop("1")
    records.path.write_text(json.dumps(records.content))
    sweep.measure_sweep(study, "tiny")
    assert open_records(study, "tiny").content[sweep.SWEEP]["1"] == lost
    for changes, status in (({"name": "worded otherwise"}, 0), ({"draws": 3}, 2)):
        other = write(small.parent, bases={"tiny": str(small.parent / "base")}, **changes)
        content = yaml.safe_load(other.read_text())
        content["bases"].pop("shipped")
        other.write_text(yaml.safe_dump(content))
        assert main(["--config", str(other)]) == status
