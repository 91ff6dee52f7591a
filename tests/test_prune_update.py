"""Pruning an update after training: which coordinates go back to the base, how many, and what the program writes."""

import json
from pathlib import Path

import pytest
import torch
from command_line import TINY
from transformers import AutoModelForCausalLM

from experiments.prune_update import Weights, main, prune, read_weights
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.loading import export_model, load_policy, load_tokenizer, locate


def weights(seed: int, scale: float = 1.0) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=draw) for name, shape in {"a": (7, 5), "b": (11,)}.items()}


BASE, TUNED = weights(0), {name: w + weights(1, 0.1)[name] for name, w in weights(0).items()}


@pytest.mark.parametrize("by", ["magnitude", "random"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_exactly_the_share_is_at_the_base_and_the_rest_is_as_trained(share: float, by: str) -> None:
    pruned, norm_kept = prune(BASE, TUNED, share, by)  # type: ignore[arg-type]
    back = sum(int((pruned[name] == BASE[name]).sum()) for name in BASE)
    assert back == int(share * 46 + 1e-9)
    assert all(((pruned[n] == BASE[n]) | (pruned[n] == TUNED[n])).all() for n in BASE)
    left = torch.cat([(pruned[n] - BASE[n]).flatten() for n in BASE]).norm()
    assert norm_kept == pytest.approx(float(left / torch.cat([(TUNED[n] - BASE[n]).flatten() for n in BASE]).norm()))


def test_the_smallest_go_first_over_all_tensors_together() -> None:
    tuned = {"a": BASE["a"] + 0.01 * (1 + torch.rand(7, 5)), "b": BASE["b"] - 1.0}
    pruned, norm_kept = prune(BASE, tuned, 35 / 46)
    assert torch.equal(pruned["a"], BASE["a"])
    assert torch.equal(pruned["b"], tuned["b"])
    assert norm_kept > 0.99
    scattered, _ = prune(BASE, tuned, 35 / 46, "random")
    assert (scattered["b"] == BASE["b"]).any()


def test_random_depends_on_the_seed_and_grows() -> None:
    def back(share: float, seed: int) -> torch.Tensor:
        return prune(BASE, TUNED, share, "random", seed)[0]["a"] == BASE["a"]

    assert torch.equal(back(0.3, 0), back(0.3, 0))
    assert not torch.equal(back(0.3, 0), back(0.3, 1))
    assert back(0.6, 0)[back(0.3, 0)].all()


def test_no_update_at_all() -> None:
    pruned, norm_kept = prune(BASE, BASE, 0.5)
    assert norm_kept == 1.0
    assert all(torch.equal(pruned[n], BASE[n]) for n in BASE)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(InputError, match="--tuned: its weights have other names or shapes"):
        prune(BASE, {"a": BASE["a"]}, 0.5)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """The embedded base model with noise, as a model directory."""
    policy = load_policy("embedded")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * torch.randn_like(p)
    export_model(policy, load_tokenizer("embedded"), tmp_path / "tuned", write=True)
    return tmp_path / "tuned"


def test_tied_weights_are_read_once(tuned: Path) -> None:
    assert sum(w.numel() for w in read_weights(tuned).values()) == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(tuned).parameters()
    )


def test_the_program_evaluates_what_it_prunes(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = locate("embedded")
    size = ["--data.val.init_args.count", "64"]
    both = ["--tuned", f"noise={tuned}", f"none={base}", "--shares", "0", "1", "--out", str(tmp_path / "out")]
    main(["--config", TINY, "--base", base, *both, *size])
    printed = capsys.readouterr().out
    assert "| noise | 0 | 1.000 |" in printed
    points = json.loads((tmp_path / "out" / "prune.json").read_text())["points"]
    assert [(p["label"], p["share"], p["norm_kept"]) for p in points] == [
        ("noise", 0.0, 1.0),
        ("noise", 1.0, 0.0),
        ("none", 0.0, 1.0),
        ("none", 1.0, 1.0),
    ]
    assert points[1]["metrics"] == points[2]["metrics"] == points[3]["metrics"] != points[0]["metrics"]
    assert points[0]["metrics"]["sorting/avg@1"] < points[1]["metrics"]["sorting/avg@1"]
    picture = (tmp_path / "out" / "prune.svg").read_text()
    assert all(text in picture for text in ("<svg", "noise", "sorting/avg@1"))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (["--shares", "1.5"], "'1.5' is not allowed; it must be a number between 0 and 1"),
        (["--shares", "half"], "'half' is not allowed; it must be a number between 0 and 1"),
        (["--tuned", "x=nowhere"], "'nowhere' is no model directory"),
        (["--base", "nowhere"], "'nowhere' is no model directory"),
        (["--data.val.init_args.cuont", "64"], "cuont"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], change: list[str], line: str) -> None:
    base = locate("embedded")
    with pytest.raises(SystemExit) as end:
        main(["--config", TINY, "--base", base, "--tuned", f"x={base}", *change])
    assert end.value.code == 2
    (last,) = [text for text in capsys.readouterr().err.splitlines() if "error: " in text]
    assert line in last
