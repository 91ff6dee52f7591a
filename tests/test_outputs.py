"""What a run writes: never over what another has left, and in the dtype of the model that it began with."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, short
from conftest import make_data, make_module
from lightning import Trainer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mifo_lightning.cli import main
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.policy.loading import load_policy, load_tokenizer, locate
from mifo_lightning.policy.policy import Policy

MakeTrainer = Callable[..., Trainer]
ONE = Schedule(rl_steps=1, prompts_per_step=4)


def contents(root: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file with the time of its last change."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()}


def test_a_second_run_in_the_same_directory_is_refused_before_it_evaluates(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = short(tmp_path, data__schedule__rl_steps="1", trainer__enable_checkpointing="true", buffer="null")
    del arguments[arguments.index("--buffer.size") : arguments.index("--buffer.size") + 4]
    main(arguments)
    before = contents(tmp_path)
    line = refused(capsys, *arguments)
    assert "export.directory" in line
    assert str(tmp_path / "model") in line
    line = refused(capsys, *arguments, "--export", "null")
    assert "checkpoint.dirpath" in line
    assert "last.ckpt" in line
    assert contents(tmp_path) == before
    main([*arguments, "--trainer.fast_dev_run", "true"])
    assert contents(tmp_path).items() >= before.items()
    assert not (tmp_path / "fast_dev_run" / "model").exists()


def test_a_run_goes_on_in_its_own_directory_but_not_in_that_of_another(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def fit(root: Path, ckpt: Path | None = None, steps: int = 1) -> None:
        callbacks = [ExportModel(), LastCheckpoint()]
        trainer = make_trainer(callbacks, default_root_dir=root, enable_checkpointing=True, max_epochs=-1)
        data = make_data(schedule=Schedule(rl_steps=steps, prompts_per_step=4))
        trainer.fit(make_module(), datamodule=data, ckpt_path=ckpt)

    for name in ("a", "b"):
        fit(tmp_path / name)
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "a", last, steps=2)
    assert torch.load(last, weights_only=True)["global_step"] == 2
    before = contents(tmp_path)
    with pytest.raises(InputError, match="is there already"):
        fit(tmp_path / "b", last, steps=3)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resumed", [False, True])
def test_the_input_model_is_never_written_over(
    make_trainer: MakeTrainer, policy: Policy, tokenizer: Any, tmp_path: Path, resumed: bool
) -> None:
    place = tmp_path / "run" / "model"
    policy.model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    trainer = make_trainer(max_epochs=-1)
    trainer.fit(make_module(model=str(place)), datamodule=make_data(schedule=ONE))
    trainer.save_checkpoint(tmp_path / "run" / "any.ckpt")
    before = contents(place)
    trainer = make_trainer([ExportModel(str(place))], max_epochs=-1)
    ckpt = tmp_path / "run" / "any.ckpt" if resumed else None
    with pytest.raises(InputError, match=r"export\.directory"):
        trainer.fit(make_module(model=str(place)), datamodule=make_data(schedule=ONE), ckpt_path=ckpt)
    assert contents(place) == before


@pytest.mark.parametrize(
    ("came", "option", "written"),
    [
        ("bfloat16", "loaded", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float16", "loaded", torch.float16),
        ("float32", "loaded", torch.float32),
    ],
)
def test_the_model_is_written_in_the_dtype_that_it_came_in(
    make_trainer: MakeTrainer,
    capsys: pytest.CaptureFixture[str],
    tokenizer: Any,
    tmp_path: Path,
    came: str,
    option: Any,
    written: torch.dtype,
) -> None:
    base = tmp_path / "base"
    load_policy("embedded").model.to(getattr(torch, came)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    module = make_module(model=str(base))
    make_trainer([ExportModel(str(tmp_path / "out"), dtype=option)]).fit(module, datamodule=make_data(schedule=ONE))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {written}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == written
    load_tokenizer(str(tmp_path / "out"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert module.policy is not None
    for name, w in module.policy.model.state_dict().items():
        assert torch.equal(again[name], w.to(written).float())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("export: ")]
    assert len(lines) == (written != torch.float32)


def test_the_models_of_given_steps_are_those_of_runs_that_end_there_and_resuming_changes_none(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def fit(name: str, steps: int, asked: list[int], ckpt: Path | None = None, stop: int = -1) -> Path:
        place = tmp_path / name / "model"
        callbacks = [ExportModel(str(place), steps=asked), LastCheckpoint(every=1, dirpath=str(place.parent))]
        schedule = Schedule(rl_steps=0, sft_before=steps, sft_batch=4)
        trainer = make_trainer(callbacks, enable_checkpointing=True, max_steps=stop, max_epochs=-1)
        trainer.fit(make_module(), datamodule=make_data(schedule=schedule), ckpt_path=ckpt)
        return place

    def weights(place: Path) -> dict[str, torch.Tensor]:
        return load_file(place / "model.safetensors")

    with pytest.warns(UserWarning, match=r"export\.steps: \[9\] were not reached; training ended after step 4"):
        whole = fit("whole", 4, [0, 2, 4, 9])
    assert sorted(p.name for p in whole.parent.glob("model*")) == ["model", "model-0", "model-2", "model-4"]
    ends = {0: Path(locate("embedded")), 2: fit("two", 2, []), 4: whole}
    for step, end in ends.items():
        found = weights(whole.with_name(f"model-{step}"))
        assert all(torch.equal(found[name], weight) for name, weight in weights(end).items())
    assert any(not torch.equal(weights(whole)[name], weight) for name, weight in weights(ends[2]).items())

    cut = fit("cut", 4, [0, 2, 4], stop=3)
    fit("cut", 4, [0, 2, 4], ckpt=cut.parent / "last.ckpt")
    for step in ends:
        one, two = (weights(place.with_name(f"model-{step}")) for place in (whole, cut))
        assert all(torch.equal(one[name], weight) for name, weight in two.items())


def test_models_of_steps_are_written_over_neither_another_runs_nor_the_input(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(locate("embedded"), tmp_path / "model-2"))
    for model, message in (("embedded", "is there already"), (str(source), "is the input model")):
        with pytest.raises(InputError, match=rf"export\.directory: .*model-2 {message}"):
            make_trainer([ExportModel(str(tmp_path / "model"), steps=[2])]).fit(
                make_module(model=model), datamodule=make_data(schedule=ONE)
            )


@pytest.mark.parametrize("steps", [[1, -1], "12", None, [1.5]])
def test_steps_that_are_none_are_named(steps: Any) -> None:
    with pytest.raises(InputError, match=r"export\.steps: .* is not allowed; it must be a list of whole numbers"):
        ExportModel(steps=steps)
