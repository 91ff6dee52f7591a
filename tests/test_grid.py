"""What an ablation file means: what is refused, and which fits it would run."""

import itertools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_grid import BASE, GRID, ROOT, write

from mifo_lightning.cli import main
from mifo_lightning.common.errors import InputError
from mifo_lightning.lab import ablation
from mifo_lightning.lab.exit_status import exit_status
from mifo_lightning.lab.grid import cells, choose
from mifo_lightning.lab.reading import read_ablation


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tpyo": 1}, ["unknown key tpyo", "allowed are name, question"]),
        ({"arms": {"mifo": {"config": []}}}, ["arms.mifo", "unknown key config", "configs, set"]),
        ({"arms": {"mifo": None}}, ["arms.mifo", "expected"]),
        ({"arms": {"mifo": {"set": None}}}, ["arms.mifo: set: nothing is given"]),
        ({"arms": {}}, ["arms", "at least one"]),
        ({"reference": "best"}, ["reference: best", "mifo, interleave, half + lr"]),
        ({"bases": {"x": "runs/none"}, "make_bases": "make it"}, ["bases.x", "runs/none", "`make it`"]),
        ({"seeds": [1, 1]}, ["seeds: 1 given"]),
        ({"seeds": []}, ["seeds: none given"]),
        ({"seeds": "all"}, ["seeds", "all"]),
        ({"arms": {"mifo": {}, "MIFO!": {}}, "primary_contrast": ["MIFO!", "mifo"]}, ["arms: mifo given"]),
        ({"config": ["configs/none.yaml"]}, ["config: configs/none.yaml", "packaged are "]),
        (
            {"arms": {**GRID["arms"], "mifo": {"configs": ["method/mifo"]}}},
            ["arms.mifo.configs: method/mifo", "methods/mifo"],
        ),
        ({"set": {"seed_everything": 3}}, ["set.seed_everything", "seeds"]),
        ({"set": {"data.schedule.fit_sizes": True}}, ["set.data.schedule.fit_sizes", "an arm runs what it says"]),
        (
            {"arms": {**GRID["arms"], "mifo": {"set": {"trainer.logger.name": "x"}}}},
            ["arms.mifo.set.trainer.logger.name", "wandb"],
        ),
        ({"jobs": 0}, ["jobs", "0"]),
        ({"design": "random"}, ["design", "crossed", "nested", "random"]),
        ({"question": None}, ["question"]),
        ({"primary_contrast": None}, ["primary_contrast"]),
        ({"primary_contrast": ["rl", "mifo"]}, ["primary_contrast: ['rl', 'mifo']", "mifo, interleave, half + lr"]),
        ({"primary_contrast": ["mifo", "interleave, half + lr"]}, ["the reference comes second"]),
        (
            {"design": "crossed", "bases": {"a": BASE, "b": BASE}, "seeds": [0, 1]},
            ["2 bases and 2 seeds", "or nested"],
        ),
        ({"design": "crossed", "bases": dict.fromkeys("abcdef", BASE), "seeds": [0, 1, 2]}, ["6 bases and 3 seeds"]),
        (
            {"primary_contrast": ["interleave, half + lr"]},
            ["primary_contrast: ['interleave, half + lr']", "two different"],
        ),
        ({"margin": 0.0}, ["margin: 0.0", "above 0"]),
        ({"margin": float("nan")}, ["margin: nan", "above 0"]),
        ({"trade_off": {"learned": ["avg@1"]}}, ["trade_off: {'learned'", "two names"]),
        ({"trade_off": {"learned": ["avg@1"], "kept": []}}, ["trade_off: {'learned'", "each with metrics"]),
        ({"contrasts": [["mifo", "rl"]]}, ["contrasts: ['mifo', 'rl']", "mifo, interleave, half + lr"]),
        ({"contrasts": [["mifo", "mifo"]]}, ["contrasts: ['mifo', 'mifo']", "two different"]),
        ({"contrasts": [["mifo"]]}, ["contrasts: ['mifo']", "two different"]),
    ],
)
def test_a_bad_file_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    assert ablation.main(["--config", str(write(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []
    assert not (tmp_path / "out").exists()


def test_every_arm_meets_every_base_and_seed_once_in_a_directory_of_its_own(tmp_path: Path) -> None:
    config = write(tmp_path, bases={"a": BASE, "b": BASE}, seeds=[3, 5, 7], design="crossed")
    grid = cells(read_ablation(config))
    expected = set(itertools.product(GRID["arms"], ["a", "b"], [3, 5, 7]))
    assert {(cell.arm, cell.base, cell.seed) for cell in grid} == expected
    assert len(grid) == len({cell.directory for cell in grid}) == 12
    assert {(cell.arm, cell.base) for cell in grid[:4]} == {(arm, base) for arm, base, _ in expected}


def test_a_setting_that_names_a_class_reaches_the_fit_as_it_is_written(tmp_path: Path) -> None:
    rows = {"class_path": "mifo_lightning.data.skills.Skills", "init_args": {"count": 8}}
    arms = {**GRID["arms"], "mifo": {"set": {"data.train": rows}}}
    for cell in cells(read_ablation(write(tmp_path, set={"data.val": rows}, arms=arms))):
        given = dict(itertools.pairwise(cell.settings))
        assert json.loads(given["--data.val"]) == rows
        assert cell.arm != "mifo" or json.loads(given["--data.train"]) == rows


def test_in_a_nested_grid_no_two_bases_share_a_seed(tmp_path: Path) -> None:
    many = {f"b{i}": BASE for i in range(12)}
    grid = cells(read_ablation(write(tmp_path, bases=many, seeds=[0], design="nested")))
    assert [(cell.base, cell.seed) for cell in grid if cell.arm == "mifo"] == [(f"b{i}", i) for i in range(12)]
    assert all(f"--seed_everything {cell.seed} " in cell.command for cell in grid)
    several = read_ablation(write(tmp_path, bases=many, seeds=[1, 4], design="nested"))
    assert [several.seeds_of(base) for base in ("b0", "b1")] == [[1, 4], [6, 9]]
    assert len({seed for base in many for seed in several.seeds_of(base)}) == 24


def test_an_arms_settings_win_over_those_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(
        tmp_path,
        arms={
            **GRID["arms"],
            "mifo": {"configs": ["methods/mifo"], "set": {"data.schedule.rl_steps": 9, "freeze": None}},
        },
    )
    assert ablation.main(["--config", str(config), "--only", "mifo/shipped/1", "--dry_run"]) == 0
    program, *arguments = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
    assert (program, arguments[0]) == ("-m", "mifo_lightning")
    with pytest.raises(SystemExit) as end:
        main([*arguments[1:], "--print_config"])
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed_everything"] == 1
    assert printed["model"]["model"] == BASE
    assert printed["data"]["schedule"]["rl_steps"] == 9
    assert printed["freeze"] is None
    assert printed["buffer"]["init_args"]["max_accuracy"] == 0.5
    assert printed["trainer"]["default_root_dir"] == str(tmp_path / "out" / "mifo" / "shipped" / "seed1")
    assert printed["trainer"]["logger"] is False
    assert printed["data"]["schedule"]["fit_sizes"] is False
    assert not (tmp_path / "out").exists()


def test_a_setting_of_all_arms_that_replaces_what_makes_an_arm_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "data.schedule.rl_steps"

    def told(arm: dict[str, Any], **of_all: Any) -> str:
        changes = {"arms": {**GRID["arms"], "mifo": arm}, "set": {**GRID["set"], **of_all}}
        assert ablation.main(["--config", str(write(tmp_path, **changes)), "--dry_run"]) == 0
        return capsys.readouterr().err

    said = told({"configs": ["methods/sft"]}, **{key: 2})
    assert "warning: set.data.schedule.rl_steps: 2 takes the place of 0 of 'mifo' (" in said
    assert "sft.yaml, line" in said
    assert "buffer.size" not in said  # it follows the key buffer_size
    assert "set.buffer.max_accuracy: 0.5 takes the place of 0.125 of 'interleave, half + lr' (" in said
    for arm, of_all in (
        ({"configs": ["methods/sft"]}, 0),
        ({"configs": ["methods/sft"], "set": {key: 0}}, 2),
        ({"configs": ["methods/sft"], "set": {key: 3}}, 2),
        ({"configs": ["methods/rl"]}, 2),
    ):
        assert key not in told(arm, **{key: of_all})


@pytest.mark.parametrize(
    ("only", "count"),
    [
        (["mifo"], 4),
        (["p = 1/8"], 4),
        (["p_=_1_8/a"], 2),
        (["p = 1/8/b/2", "mifo/b/seed3"], 2),
        (["mifo", "mifo/a"], 4),
        ([], 8),
    ],
)
def test_only_names_arms_bases_and_seeds(tmp_path: Path, only: list[str], count: int) -> None:
    arms = {"mifo": {}, "p = 1/8": {}}
    pair = ["p = 1/8", "mifo"]
    config = write(tmp_path, bases={"a": BASE, "b": BASE}, arms=arms, primary_contrast=pair)
    grid = cells(read_ablation(config))
    assert len(choose(grid, only)) == count
    with pytest.raises(InputError, match=r"--only mif: allowed .* arms mifo, p = 1/8; bases a, b; seeds 0, 2, 1, 3"):
        choose(grid, [*only, "mif"])


def test_a_sweep_names_every_cell_by_one_value(tmp_path: Path) -> None:
    config, target = write(tmp_path), tmp_path / "sweep.yaml"
    assert ablation.main(["--config", str(config), "--sweep", str(target)]) == 0
    written = yaml.safe_load(target.read_text(encoding="utf-8"))
    grid = cells(read_ablation(config))
    assert written["method"] == "grid"
    assert [choose(grid, [value]) for value in written["parameters"]["only"]["values"]] == [[cell] for cell in grid]
    assert written["command"][-1] == "${args}"
    arguments = [*written["command"][5:-1], "--only=mifo/shipped/0", "--dry_run"]
    assert ablation.main(arguments) == 0


def test_wandb_runs_share_a_group_and_leave_the_files_in_the_cell(tmp_path: Path) -> None:
    config = write(tmp_path, wandb={"project": "p"})
    options = []
    for cell in cells(read_ablation(config)):
        logger = json.loads(cell.places[cell.places.index("--trainer.logger") + 1])["init_args"]
        assert cell.directory in Path(logger["save_dir"]).parents
        assert (logger["project"], logger["group"], logger["mode"]) == ("p", "two arms", "offline")
        assert logger["name"] == cell.name
        options.append(logger["id"])
    assert len(set(options)) == 4
    assert not any(character in "".join(options) for character in "/\\#?%:, ")


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/ablations/*.yaml")), ids=lambda path: path.stem)
def test_shipped_ablations_are_right_but_for_their_bases(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["bases"] = dict.fromkeys(content["bases"], BASE)
    copy = tmp_path / path.name
    copy.write_text(yaml.safe_dump(content), encoding="utf-8")
    grid = cells(read_ablation(copy))
    values = len(content.get("sweep", {}).get("values", [0]))
    assert len(grid) == len(content["arms"]) * values * len(content["bases"]) * len(content["seeds"])
    uncommented = [
        line for line in path.read_text(encoding="utf-8").split("\narms:")[0].splitlines() if "#" not in line
    ]
    assert [line for line in uncommented if line and not line.startswith("  ")] == []


def test_a_reader_that_goes_away_ends_a_command_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        print("# a first fit", flush=True)
        return 0

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert exit_status(work) == 141
    assert capfd.readouterr().err == ""
