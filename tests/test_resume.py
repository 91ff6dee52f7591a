"""Going on from a checkpoint: which one, in whose files, and what is refused in one line."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CONFIGS, refused, short
from conftest import make_data, make_module, method_callbacks
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from mifo_lightning.checkpoints.restoring import CheckedRestore
from mifo_lightning.cli import main
from mifo_lightning.cli.resume import VERSION, choose
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.monitors.kept_rows import metrics_before, samples_before
from mifo_lightning.steps.guards import check_flags

CSV = ["--config", str(CONFIGS / "logger" / "csv.yaml")]
MODULE: Any = make_module()
SHORT = Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4)
MakeTrainer = Callable[..., Trainer]
Change = Callable[[Path, dict[str, Any]], Any]


def arguments(root: Path, *more: str, steps: int = 3) -> list[str]:
    """A run that writes a checkpoint at every second step."""
    changes = {"trainer.enable_checkpointing": "true", "checkpoint.every": "2", "data.schedule.rl_steps": str(steps)}
    return [*short(root), *(text for pair in changes.items() for text in (f"--{pair[0]}", pair[1])), *more]


def with_csv(root: Path, *more: str, steps: int = 3, logger: list[str] = CSV) -> list[str]:
    """The same with metrics as CSV."""
    given = arguments(root, steps=steps)
    at = given.index("--trainer.logger")
    return [*given[:at], *given[at + 2 :], *logger, "--trainer.logger.init_args.save_dir", str(root), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has ended."""
    root = tmp_path_factory.mktemp("finished") / "run"
    main(arguments(root))
    return root


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with metrics as CSV that nobody has cut off."""
    root = tmp_path_factory.mktemp("calm")
    main(with_csv(root))
    return root


def saved(change: Callable[[dict[str, Any]], Any]) -> Change:
    def make(path: Path, state: dict[str, Any]) -> None:
        changed = change(state)
        torch.save(state if changed is None else changed, path)

    return make


def cut(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])


def drop_layer(state: dict[str, Any]) -> None:
    for name in [name for name in state["state_dict"] if ".layers.0." in name]:
        del state["state_dict"][name]


# what lies at the path -> what the line says
CASES: dict[str, tuple[Change, str]] = {
    "missing": (lambda path, state: None, "there is no file"),
    "empty": (lambda path, state: path.write_bytes(b""), "is empty"),
    "text": (lambda path, state: path.write_text("hello"), "is no checkpoint"),
    "cut off": (cut, "damaged or cut off"),
    "a directory": (lambda path, state: path.mkdir(), "is a directory"),
    "a list": (saved(lambda state: [1, 2]), "it holds a list"),
    "another program's": (saved(lambda state: {"epoch": 3}), "it has no state_dict"),
    "bare weights": (saved(lambda state: state["state_dict"]), "it has no state_dict"),
    "no Lightning's": (saved(lambda state: state.pop(VERSION) and None), f"it has no {VERSION}"),
    "weights alone": (
        saved(lambda state: {k: state[k] for k in ("state_dict", "mifo", VERSION)}),
        "holds weights alone",
    ),
    "Lightning's": (saved(lambda state: state.pop("mifo") and None), "its format is None"),
    "another depth": (saved(drop_layer), "of another model"),
    "callbacks null": (saved(lambda state: state.update(callbacks=None)), "its callbacks is no dict"),
    "a step in words": (saved(lambda state: state.update(global_step="x")), "its global_step is no int"),
    "own state in words": (saved(lambda state: state.update(mifo="x")), "its format is None"),
    "another width": (
        saved(lambda state: state["state_dict"].update({"policy.model.model.norm.weight": torch.ones(3)})),
        "policy.model.model.norm.weight is [3] there",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_cannot_be_gone_on_from_is_one_line(
    make_trainer: MakeTrainer, tmp_path: Path, finished: Path, case: str
) -> None:
    make, text = CASES[case]
    path = tmp_path / "a.ckpt"
    make(path, torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True))
    with pytest.raises(InputError) as error:
        choose(make_trainer(), MODULE, str(path), resume=False, fit=True)
    assert text in str(error.value)
    assert str(error.value).startswith("ckpt_path: ")
    assert "\n" not in str(error.value)
    if case in ("weights alone", "Lightning's"):  # evaluation needs no more
        assert choose(make_trainer(), MODULE, str(path), resume=False, fit=False) is not None


@pytest.mark.parametrize("name", ["best", "last", "hpc", "registry", "http://127.0.0.1:9/a.ckpt", "s3://bucket/a.ckpt"])
def test_names_and_addresses_are_no_checkpoints(make_trainer: MakeTrainer, name: str) -> None:
    with pytest.raises(
        InputError, match="only files on this machine are read" if "://" in name else "there is no file"
    ):
        choose(make_trainer(), MODULE, name, resume=False, fit=False)


def test_a_wrong_checkpoint_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.ckpt").write_text("hello", encoding="utf-8")
    for command in ("fit", "validate"):
        given = [command, *arguments(tmp_path / "run")[1:], "--ckpt_path", str(tmp_path / "a.ckpt")]
        assert "a.ckpt is no checkpoint" in refused(capsys, *given)
    assert "no run with a checkpoint" in refused(capsys, *arguments(tmp_path / "run", "--resume"))
    assert not (tmp_path / "run").exists()


# what is changed inside a checkpoint that looks like one of this run -> what the line names
INSIDE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda state: state.update({VERSION: "x"}), "the version"),
    "no optimizer": (lambda state: state.update(optimizer_states=[]), "the state of the optimizer"),
    "no groups": (lambda state: state["optimizer_states"][0].update(param_groups=[]), "the state of the optimizer"),
    "moments": (
        lambda state: state["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(3, 3)),
        "the state of the optimizer",
    ),
    "loops": (lambda state: state.update(loops={}), "the progress of the loops"),
    "a loop": (lambda state: state["loops"]["fit_loop"].pop("epoch_progress"), "the progress of the loops"),
    "callback": (
        lambda state: state["callbacks"].update(dict.fromkeys(state["callbacks"], "x")),
        "the state of the callbacks",
    ),
    "loader": (lambda state: state["QuestionData"]["loader"].pop("position"), "the state of the data"),
    "mifo": (lambda state: state["mifo"].pop("finite"), "mifo"),
}


def test_a_checkpoint_of_another_structure_is_one_line(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: Path
) -> None:
    def changed(case: str, source: Path) -> str:
        state = torch.load(source, weights_only=True)
        INSIDE[case][0](state)
        torch.save(state, tmp_path / f"{case}.ckpt")
        return str(tmp_path / f"{case}.ckpt")

    def restored(path: str | None) -> None:
        trainer = make_trainer(method_callbacks(), max_epochs=-1)
        trainer._checkpoint_connector = CheckedRestore(trainer)
        trainer.fit(make_module(), datamodule=make_data(schedule=SHORT), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "whole.ckpt")

    restored(None)
    for case, (_, text) in INSIDE.items():
        with pytest.raises(InputError, match=f"^ckpt_path: {text}.*does not fit this run"):
            restored(changed(case, tmp_path / "whole.ckpt"))
    for case in ("moments", "loader"):  # the command line restores so, too
        path = changed(case, finished / "checkpoints" / "last.ckpt")
        line = refused(capsys, *arguments(tmp_path / "run", steps=4), "--ckpt_path", path)
        assert re.search(f"ckpt_path: {INSIDE[case][1]}.*does not fit this run", line)


@pytest.mark.parametrize("name", ["/", "x" * 5000])
def test_paths_that_no_file_can_have_are_one_line(make_trainer: MakeTrainer, name: str) -> None:
    with pytest.raises(InputError, match=r"^ckpt_path: "):
        choose(make_trainer(), MODULE, name, resume=False, fit=True)


def test_a_damaged_last_checkpoint_is_followed_by_the_one_before(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    last, previous = root / "checkpoints" / "last.ckpt", root / "checkpoints" / "previous.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    step = torch.load(previous, weights_only=True)["global_step"]
    with pytest.warns(UserWarning, match=f"is damaged.*going on from {previous}, of step {step}"):
        main(arguments(root, "--ckpt_path", str(last)))
    assert (root / "model" / "model.safetensors").read_bytes() == (
        finished / "model" / "model.safetensors"
    ).read_bytes()
    assert f"checkpoint: {last}" in capsys.readouterr().out
    last.write_bytes(data)
    assert "is damaged" in refused(capsys, "validate", *arguments(root)[1:], "--ckpt_path", str(last))
    previous.write_bytes(data[:1000])
    assert "previous.ckpt is damaged" in refused(capsys, *arguments(root, "--resume"))


def test_resume_goes_on_with_the_newest_run_and_keeps_its_rows_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, calm: Path
) -> None:
    cut_off = tmp_path / "cut"
    shutil.copytree(calm / "csv" / "version_0", cut_off / "csv" / "version_0")  # an older run
    main(with_csv(cut_off, "--trainer.max_steps", "3"))
    (cut_off / "csv" / "version_1" / "checkpoints" / "last.ckpt").unlink()  # as if it had been killed after step 2
    with open(cut_off / "csv" / "version_1" / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("0.5,0.")  # and had been writing
    with pytest.warns(UserWarning, match="there is no file"):
        main(with_csv(cut_off, "--resume"))
    assert "resume: going on from" in capsys.readouterr().out
    assert {p.name for p in (cut_off / "csv").iterdir()} == {"version_0", "version_1"}
    ours, theirs = (rows(root / "csv" / f"version_{n}" / "metrics.csv") for root, n in ((cut_off, 1), (calm, 0)))
    ours = [row for row in ours if not row["self_check/max"] or row is ours[0]]  # a run that goes on makes its own
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if timeless(k)} == {k: v for k, v in b.items() if timeless(k)}
    for file in ("samples.jsonl", "model/model.safetensors"):
        assert (cut_off / "csv/version_1" / file).read_bytes() == (calm / "csv/version_0" / file).read_bytes()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_resume_goes_on_in_the_run_of_its_logger(tmp_path: Path, name: str) -> None:
    """The run's model and files lie where they did; W&B has one run of two parts."""
    logger = ["--config", str(CONFIGS / "logger" / f"{name}.yaml")]
    main(with_csv(tmp_path, "--trainer.max_steps", "3", logger=logger))
    main(with_csv(tmp_path, "--resume", "--trainer.max_steps", "4", logger=logger))
    (run,) = (path.parent.parent for path in tmp_path.rglob("last.ckpt"))
    (samples,) = tmp_path.rglob("samples.jsonl")
    (model,) = tmp_path.rglob("model.safetensors")
    assert samples.parent == model.parent.parent == run
    steps = [json.loads(line)["step"] for line in samples.read_text(encoding="utf-8").splitlines()]
    assert steps == sorted(steps)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 3
    if name == "wandb":
        parts = [path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")]
        assert parts == [run.name, run.name]
    else:
        assert {path.parent for path in tmp_path.rglob("events.out.tfevents.*")} == {run}


def test_a_branch_in_another_directory_carries_the_rows_and_leaves_the_old_run_alone(
    tmp_path: Path, calm: Path
) -> None:
    shutil.copytree(calm, tmp_path, dirs_exist_ok=True)
    old = tmp_path / "csv" / "version_0"
    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    main(with_csv(tmp_path, "--ckpt_path", str(old / "checkpoints" / "last.ckpt"), steps=4))
    assert {p: p.read_bytes() for p in old.rglob("*") if p.is_file()} == before
    step = torch.load(old / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    carried = rows(tmp_path / "csv" / "version_1" / "metrics.csv")
    earlier = [row for row in rows(old / "metrics.csv") if int(row["step"]) < step]
    assert [row["step"] for row in carried][: len(earlier)] == [row["step"] for row in earlier]
    assert max(int(row["step"]) for row in carried) > step
    samples = (tmp_path / "csv" / "version_1" / "samples.jsonl").read_text(encoding="utf-8")
    assert samples.startswith(samples_before((old / "samples.jsonl").read_text(encoding="utf-8"), step))


def test_a_finished_run_is_only_evaluated(capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    main(arguments(root, "--resume", "true"))
    ours, theirs = (json.loads((p / "summary.json").read_text(encoding="utf-8")) for p in (root, finished))
    assert all(ours[key] == theirs[key] for key in ("before", "after", "optimizer_steps"))
    assert (root / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()


def test_rows_of_a_run_that_left_nothing_to_go_on_from_are_set_aside(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    off = ["--export", "null", "--checkpoint", "null", "--trainer.enable_checkpointing", "false", "--history", "{}"]
    main(arguments(tmp_path, *off, steps=1))
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(left) == {"config.yaml", "samples.jsonl", "history.jsonl", "summary.json"}
    capsys.readouterr()
    main(arguments(tmp_path, "--seed_everything", "1", steps=1))
    assert "of an earlier run" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (tmp_path / "earlier-1").iterdir()} == left
    first = [json.loads(line) for line in left["samples.jsonl"].decode().split("\n")[:-1]]
    again = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert len([row for row in again if row["step"] == 0]) == len([row for row in first if row["step"] == 0])


def test_an_evaluation_leaves_the_configuration_of_the_run_that_it_evaluates(tmp_path: Path, finished: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = (root / "config.yaml").read_bytes()
    main(["validate", *arguments(root)[1:], "--ckpt_path", str(root / "checkpoints" / "last.ckpt")])
    assert (root / "config.yaml").read_bytes() == before


def test_a_callback_that_waits_for_a_validation_that_never_comes_is_refused(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for callback in (ModelCheckpoint(monitor="val/avg@1"), EarlyStopping("val/avg@1")):
        with pytest.raises(InputError, match=r"waits for val/avg@1 in vain.*trainer\.val_check_interval"):
            check_flags(make_trainer([callback], enable_checkpointing=True))
    more = ["--trainer.callbacks.mode", "max", "--trainer.callbacks.dirpath", str(tmp_path / "best")]
    best = ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.monitor", "val/avg@1", *more]
    main(arguments(tmp_path / "run", *best, "--trainer.val_check_interval", "2", steps=2))
    printed = capsys.readouterr().out
    assert f"checkpoint: {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}" in printed
    assert len(list((tmp_path / "best").iterdir())) == 1


def test_rows_are_split_at_line_ends_alone_and_a_cut_one_is_dropped() -> None:
    where = [(0, "val"), (1, "rl"), (2, "rl"), (2, "val"), (3, "rl")]
    lines = [
        json.dumps({"step": step, "stage": stage, "response": "a\u2028b\u2029c\x85d\x0ce"}, ensure_ascii=False) + "\n"
        for step, stage in where
    ]
    assert samples_before("".join(lines) + '{"step": 1, "st', 2) == "".join(lines[:3])
    text = "a,step\r\n1,0\r\n2,1\r\n,2\r\n3,1"
    assert metrics_before(text, 2) == "a,step\r\n1,0\r\n2,1\r\n"


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def timeless(key: str) -> bool:
    return not any(word in key for word in ("per_s", "seconds", "time", "epoch"))
