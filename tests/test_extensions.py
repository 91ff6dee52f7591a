"""What a user adds without editing the library: the examples of CONTRIBUTING.md, named on the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_steps import groups_of, item, prepare, questions, reinforcement

from mifo_lightning.cli import main
from mifo_lightning.common.errors import InputError
from mifo_lightning.losses.corrections import TruncatedImportance
from mifo_lightning.policy.policy import Policy
from mifo_lightning.steps.settings import PolicyLoss

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
OWN = "\n".join(
    re.findall(r"^```python\n(.*?)^```", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
)
TINY = [
    *("fit", "--config", "configs/tiny.yaml", "--trainer.logger", "false", "--trainer.profiler", "null"),
    *("--progress", "null", "--export", "null", "--data.val", "null", "--history", "{}", "--seed_everything", "1"),
    *("--data.train.init_args.count", "64", "--data.schedule.rl_steps", "2", "--data.schedule.prompts_per_step", "8"),
    *("--data.schedule.sft_before", "2", "--data.schedule.sft_batch", "8", "--entropy", "null", "--importance", "null"),
    *("--freeze", "null", "--buffer", "null"),
]
EXTENSIONS = {
    "an SFT weight with a setting": ["--model.sft_loss.weight", "own.Focal", "--model.sft_loss.weight.gamma", "3"],
    "a method of mixing": ["--model.mixing", "own.Hardest", "--model.mixing.sft", "0.25"],
    "a surrogate": ["--model.loss.surrogate", "own.Cubed"],
    "an advantage": ["--model.loss.advantage", "own.Ranks"],
    "an engine of other numerics, corrected": [
        *("--model.rollout.engine", "own.Half"),
        *("--model.loss.correction", "mifo_lightning.losses.corrections.TruncatedImportance"),
        *("--model.loss.correction.level", "sequence"),
    ],
    "a task": ["--data.train", "own.Doubles", "--data.train.count", "16"],
}


def history(place: Path, *extra: str) -> list[dict[str, Any]]:
    """What a small run logs."""
    main([*TINY, "--trainer.default_root_dir", str(place), *extra])
    return [json.loads(line) for line in (place / "history.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the run logs that nobody has extended."""
    return history(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_file_of_ones_own_is_enough(own: None, plain: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    extended = history(tmp_path / "run", *EXTENSIONS[name])
    keys = ("sft/loss", "rl/policy_loss", "rl/grad_norm", "rollout/reward")
    seen = [[tuple(line.get(key) for key in keys) for line in lines] for lines in (plain, extended)]
    assert seen[0] != seen[1], "it changes what is trained"
    assert all("rl/sft_loss" in line for line in extended if "rollout/reward" in line) == (name == "a method of mixing")
    if "engine" in name:
        gaps = [line["rl/sampler_gap"] for line in extended if "rl/sampler_gap" in line]
        assert len(gaps) == 2
        assert all(0 < gap < 0.2 for gap in gaps), gaps


def test_a_name_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*TINY, "--trainer.default_root_dir", str(tmp_path), "--model.sft_loss.weight", "focal"])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(error) == 1
    assert "model.sft_loss.weight: 'focal' is not allowed; it must be uniform, dft, chord," in error[0]
    assert error[0].endswith("or the class_path of a SFTWeight")


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("model.sft_loss.weight", "sft_weights.SFTWeight"),
        ("model.loss.surrogate", "surrogates.Surrogate"),
        ("model.loss.advantage", "advantages.Advantage"),
        ("model.loss.correction", "corrections.Correction"),
    ],
)
def test_a_base_class_is_none_of_its_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, path: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*TINY, "--trainer.default_root_dir", str(tmp_path), f"--{key}", f"mifo_lightning.losses.{path}"])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    assert len(error) == 1
    assert path.partition(".")[2] in error[0]


def test_an_engine_without_log_probabilities_cannot_be_corrected(policy: Policy, tokenizer: Any) -> None:
    rl = reinforcement(tokenizer, settings=PolicyLoss(correction=TruncatedImportance()))
    qs = questions(tokenizer)[:1]
    drawn = groups_of(tokenizer, "3>7<eos>", "3>8<eos>", "4>8<eos>", "5>7<eos>")
    drawn[0][1].logp = []
    with pytest.raises(InputError, match=r"correction: InProcessEngine gave 0 log-probabilities for a .* 4 tok"):
        prepare(rl, policy, item(qs), rl.grade(qs, drawn))


@pytest.mark.parametrize(("level", "factors"), [("token", [[2.0, 0.5, 1.0]]), ("sequence", [[1.5]])])
def test_truncated_importance_by_hand(level: Any, factors: list[list[float]]) -> None:
    old = torch.tensor([[0.6, 0.2, 0.9]]).log()
    sampler = torch.tensor([[0.2, 0.4, 0.1]]).log()
    mask = torch.tensor([[True, True, False]])
    factor, ratio, cut = TruncatedImportance(level, cap=2.0)(old, sampler, mask)
    torch.testing.assert_close(factor, torch.tensor(factors))
    torch.testing.assert_close(ratio, torch.tensor([[3.0, 0.5, 1.0]] if level == "token" else [[1.5]]))
    assert cut.tolist() == [[True, False, False]] if level == "token" else [[False]]
