"""Configurations: defaults that say every key, packaged names, parts that only a method switches on."""

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from command_line import BASES, CONFIGS, MIFO, TINY, printed, refused, short
from lightning import Trainer

from mifo_lightning.cli import main
from mifo_lightning.cli.packaged import DEFAULTS, find, names
from mifo_lightning.cli.parts import METHOD, MONITORS
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.module import MifoModule

ROWS = {"model.model", "model.reward", "data.train"}  # a base gives them
LINKED = {"model.seed", "data.seed"}  # seed_everything
MEANT = {  # defaults of the command line that are not those of the constructors, and why
    "model.evaluation.greedy": False,  # the demo measures one thing
    "trainer.devices": 1,  # a run on all GPUs is asked for
    "trainer.precision": "32-true",  # null is this
    "trainer.log_every_n_steps": 1,  # RL steps are long
    "trainer.enable_model_summary": False,  # callbacks print what matters
    "trainer.num_sanity_val_steps": 0,  # the model is evaluated before a run
    "trainer.default_root_dir": "runs",  # not the working directory
    "trainer.profiler": {"class_path": "mifo_lightning.monitors.activity.ActivityProfiler"},
    "trainer.logger": {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"project": "mifo-lightning", "save_dir": "${...default_root_dir}", "mode": "offline"},
    },
    "trainer.max_epochs": -1,  # data.schedule ends a run
}


def fields(kind: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, type and default of every argument, those of settings inside settings included."""
    hints = get_type_hints(kind.__init__)
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name == "self":
            continue
        default = parameter.default
        if dataclasses.is_dataclass(default) or dataclasses.is_dataclass(hints[name]):
            yield from fields(hints[name], f"{prefix}{name}.")
        else:
            if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
                default = getattr(kind(), name)
            yield f"{prefix}{name}", hints[name], default


GROUPS = {"model": MifoModule, "data": QuestionData} | {
    key: cls for key, cls in MONITORS.items() if yaml.safe_load(DEFAULTS.read_text())[key] is not None
}
OWN = {key: (hint, default) for name, kind in GROUPS.items() for key, hint, default in fields(kind, f"{name}.")}
SAID = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))


def said(key: str) -> Any:
    value = SAID
    for part in key.split("."):
        value = value[part]
    return value


def comments() -> dict[str, str]:
    """Dotted key of every line of defaults.yaml -> its comment."""
    found, path = {}, []
    for line in DEFAULTS.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"( *)([\w.]+):.*? # (.*)", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            found[".".join(path)] = match[3]
        elif match := re.match(r"( *)([\w.]+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
    return found


def test_defaults_say_every_key_of_module_data_and_callbacks_and_no_other() -> None:
    keys = {key for key in OWN if key not in ROWS | LINKED}
    assert {key for key in keys if not _has(key)} == set()
    assert {*METHOD, *MONITORS, "seed_everything", "method", "buffer_size", "trainer", "model", "data"} == SAID.keys()
    trainer = inspect.signature(Trainer.__init__).parameters
    assert [key for key in SAID["trainer"] if key not in trainer] == []
    own = {".".join(key.split(".")[:n]) for key in keys for n in range(1, 9)}
    assert [key for key in comments() if key.partition(".")[0] in GROUPS and key not in own | GROUPS.keys()] == []


def _has(key: str) -> bool:
    try:
        said(key)
    except (KeyError, TypeError):
        return False
    return True


def test_defaults_are_those_of_the_constructors_unless_it_is_meant() -> None:
    other = {}
    for key, (_, default) in OWN.items():
        if key not in ROWS | LINKED:
            expected = list(default) if isinstance(default, tuple) else default
            if said(key) != expected:
                other[key] = said(key)
    for name, parameter in inspect.signature(Trainer.__init__).parameters.items():
        if name in SAID["trainer"] and SAID["trainer"][name] != parameter.default:
            other[f"trainer.{name}"] = SAID["trainer"][name]
    assert other == MEANT


def test_comments_agree_with_the_types() -> None:
    """A comment that begins with a type names that of the argument; one of a choice lists all of them."""
    kinds = {bool: "bool", int: "int", float: "float", str: "str"}
    checked = 0
    for key, (hint, _) in OWN.items():
        if key in ROWS | LINKED:
            continue
        inner = [kind for kind in get_args(hint) if kind is not type(None)]
        hint = inner[0] if get_origin(hint) in (Union, types.UnionType) and len(inner) == 1 else hint
        comment = comments()[key]
        literal = next((kind for kind in (hint, *inner) if get_origin(kind) is Literal), None)
        if literal is not None:
            assert all(re.search(rf"\b{choice}\b", comment) for choice in get_args(literal)), (key, comment)
            checked += 1
        elif hint in kinds:
            assert re.match(rf"{kinds[hint]}\b", comment), (key, comment)
            checked += 1
    assert checked > 60


@pytest.mark.parametrize("base", BASES)
def test_a_base_says_only_what_differs_and_is_plain_rl(capsys: pytest.CaptureFixture[str], base: str) -> None:
    path = CONFIGS / base
    assert 20 <= len(path.read_text(encoding="utf-8").splitlines()) <= 45
    config = printed(capsys, "fit", "--config", base.removesuffix(".yaml"))
    assert [config[part] for part in METHOD] == [None] * len(METHOD)
    assert config["model"]["mixing"] is None
    same = [key for key, value in _flat(yaml.safe_load(path.read_text())) if _has(key) and said(key) == value]
    assert same == []


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_a_name_is_a_file_if_there_is_one_else_a_packaged_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("tiny") == find("tiny.yaml") == CONFIGS / "tiny.yaml"
    (tmp_path / "methods").mkdir()
    assert find("methods/mifo") == CONFIGS / "methods" / "mifo.yaml"
    (tmp_path / "tiny").mkdir()
    assert find("tiny") == CONFIGS / "tiny.yaml"
    (tmp_path / "tiny.yaml").touch()
    assert find("tiny.yaml") == Path("tiny.yaml")
    assert find("tiny") == CONFIGS / "tiny.yaml"
    assert find("{model: {group_size: 4}}") is None
    for near in ("method/mifo", "mifo", "configs/methods/mifo.yaml", "../configs/methods/mifo"):
        with pytest.raises(InputError, match=rf"--config {near}: neither a file .*methods/mifo"):
            find(near)
    with pytest.raises(InputError, match=f"packaged are {', '.join(names())}"):
        find("zzzzzzzz")


def test_names_work_on_the_command_line_outside_the_checkout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_path = printed(capsys, "fit", *MIFO)
    monkeypatch.chdir(tmp_path)
    assert printed(capsys, "fit", "--config", "tiny", "--config=methods/mifo") == by_path
    assert printed(capsys, "fit", "-c", "tiny", "-c", "methods/mifo") == by_path
    inline = printed(capsys, "fit", "--config", "tiny", "--config", "model: {rollout: {group_size: 4}}")
    assert inline["model"]["rollout"]["group_size"] == 4
    line = refused(capsys, "fit", "--config", "tiny", "--config", "methods/mfio")
    assert "did you mean methods/mifo" in line


def test_a_file_of_ones_own_needs_no_base(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {model: embedded}\ndata: {train: x.jsonl}\nreward: LastAnswerReward\n")
    config = printed(capsys, "fit", "--config", str(tmp_path / "mine.yaml"))
    assert config["trainer"]["log_every_n_steps"] == 1
    assert config["model"]["evaluation"]["greedy"] is False


def test_runs_lie_where_the_root_says(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "fit", "--config", "tiny", "--trainer.default_root_dir", "here")
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "here"


def test_methods_with_a_buffer_take_the_size_of_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    def size(*flags: str) -> int:
        return printed(capsys, "fit", *flags)["buffer"]["init_args"]["size"]

    assert size("--config", "points", "--config", "methods/interleave") == 64
    assert size("--config", "points", "--config", "methods/mifo", "--buffer_size", "16") == 16
    assert size("--config", "points", "--config", "methods/relift", "--buffer_size", "16") == 128


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        (["--config", "controls/random_freeze"], ["freeze.selector: freeze is off", "freeze.fraction", "line 3"]),
        (["--config", "controls/bottom_freeze"], ["freeze.selector", "--config methods/mifo", "bottom_freeze.yaml"]),
        (["--config", "controls/random_tokens"], ["entropy.selector: entropy is off", "entropy.fraction"]),
        (["--config", "controls/bottom_tokens"], ["entropy.selector", "--config methods/mifo"]),
        (["--config", "methods/interleave", "--config", "controls/random_freeze"], ["freeze.selector"]),
        (["--config", "methods/mifo", "--freeze", "null", "--freeze.selector", "random"], ["(--freeze.selector)"]),
        (["--buffer.size", "8"], ["buffer.size: buffer is off", "methods/interleave", "buffer.max_accuracy"]),
        (["--freeze", "{selector: random}"], ["freeze.selector"]),
        (["--config", "{drop: {during: rl}}"], ["drop.during", "drop.probability"]),
    ],
    ids=str,
)
def test_what_adjusts_a_part_that_is_off_is_refused(
    capsys: pytest.CaptureFixture[str], layers: list[str], parts: list[str]
) -> None:
    line = refused(capsys, "fit", "--config", "tiny", *layers)
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("control", "part"),
    [
        ("drop_sft_gradients", "drop.during: sft"),
        ("half_sft_lr", "model.optimizer.sft.lr_factor: 0.5"),
        ("damaged_demonstrations", "data.demonstrations.damaged_share: 0.5"),
    ],
)
def test_a_control_of_sft_is_refused_where_there_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, control: str, part: str
) -> None:
    flags = ["--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path)]
    flags += ["--data.train.init_args.count", "64", "--data.val", "null"]
    line = refused(capsys, "fit", "--config", "tiny", "--config", f"controls/{control}", *flags)
    assert f"error: {part} changes nothing in a run without SFT" in line


@pytest.mark.parametrize(
    "flags",
    [
        ["--freeze.selector", "random", "--freeze.fraction", "0.3"],
        ["--freeze", "{selector: random, fraction: 0.3}"],
        ["--freeze", "{}", "--freeze.selector", "random"],
        ["--freeze", "GradientFreezing", "--freeze.selector", "random"],
        ["--config", "methods/mifo", "--freeze.selector", "random"],
        ["--config", "{freeze: {class_path: GradientFreezing, init_args: {selector: random}}}"],
    ],
    ids=str,
)
def test_a_part_that_is_given_whole_is_on(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert printed(capsys, "fit", "--config", "tiny", *flags)["freeze"]["init_args"]["selector"] == "random"


def test_a_configuration_that_an_earlier_version_wrote_still_works(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """All of its keys are given, MIFO's parts included; it knows nothing of buffer_size."""
    config = printed(capsys, *short(tmp_path / "run"))
    del config["buffer_size"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    again = printed(capsys, "fit", "--config", str(tmp_path / "old.yaml"))
    assert again.pop("buffer_size") == 128
    assert again == config
    assert Path(TINY).is_file()


def test_a_run_has_one_method_unless_what_two_make_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["fit", "--config", "tiny", "--config", "methods/luffy", "--config", "methods/mifo"]
    line = refused(capsys, *both)
    assert re.search(
        r"method: luffy \(.*luffy.yaml, line \d+\) and mifo \(.*\): a run has one method; .*--method", line
    )
    assert printed(capsys, *both, "--method", "luffy with mifo")["method"] == "luffy with mifo"
    assert printed(capsys, *both[:-2])["method"] == "luffy"
    for flags in (["--method", "mifo"], ["--config", "{method: mifo}"]):  # a name brings nothing
        assert "--config methods/mifo is the method" in refused(capsys, *both[:3], *flags)
    assert printed(capsys, *both[:-2], "--method", "luffy")["method"] == "luffy"
    assert printed(capsys, *both[:3])["method"] is None


@pytest.mark.parametrize("path", sorted((CONFIGS / "methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_method_is_called_as_its_file(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["method"] == path.stem


def test_a_saved_configuration_evaluates_too_and_a_refused_resume_leaves_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    main([*short(run), "--trainer.enable_checkpointing", "true"])
    capsys.readouterr()
    written = (run / "config.yaml").read_text(encoding="utf-8")
    assert "\nresume:" not in written
    line = refused(capsys, *short(run), "--seed_everything", "7", "--resume")
    assert "model.seed is 7, and 0 in the run of the checkpoint" in line
    assert (run / "config.yaml").read_text(encoding="utf-8") == written
    (tmp_path / "saved.yaml").write_text(written, encoding="utf-8")
    main(["validate", "--config", str(tmp_path / "saved.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")])
    assert "avg@1" in capsys.readouterr().out


def test_a_part_of_a_key_is_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "fit", "--config", "tiny", "--model.micro_batch", "2")
    assert "--model.micro_batch" in line
    assert "did you mean --model.optimizer.micro_batches" in line
