"""The shipped files of `configs/losses/` against what TRL computes (experiments/trl_reference.py)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_steps import CONFIGS, evaluate, reinforcement, rl_settings
from torch import Tensor

from mifo_callbacks.tokens import select_tokens
from mifo_lightning.losses.advantages import GroupStd, as_advantage

TRL = json.loads(Path(__file__).with_name("data").joinpath("trl_losses.json").read_text())

# What a TRL case adds to the shipped loss file that it names. Where TRL computes something else it is left out:
# `grpo_kl_times_ratio` weighs the KL by the ratio, and `rloo` clips the ratio of a whole sequence; ours do neither.
ADDED: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo_on_policy")},
    **{name: {"kl_coefficient": 0.1} for name in ("grpo_kl", "dapo_kl")},
    **{name: {"entropy_fraction": 0.2} for name in ("grpo_entropy_mask", "dapo_entropy_mask")},
}


def test_every_shipped_loss_is_compared_with_trl() -> None:
    assert {TRL["cases"][name]["file"] for name in ADDED} == {path.stem for path in (CONFIGS / "losses").glob("*.yaml")}


@pytest.mark.parametrize("name", ADDED)
def test_shipped_losses_and_their_gradients_are_those_of_trl(name: str) -> None:
    case = TRL["cases"][name]
    settings = replace(rl_settings(f"losses/{case['file']}")[0], **ADDED[name])
    logp, entropy, reference = (torch.tensor(TRL[key]) for key in ("logp", "entropy", "logp_ref"))
    mask = torch.arange(logp.shape[1]) < torch.tensor(TRL["lengths"])[:, None]
    # TRL adds 1e-4 to the standard deviation, and we 1e-6
    rule = GroupStd(eps=1e-4) if settings.advantage == "group_std" else as_advantage(settings.advantage)
    advantages = rule(torch.tensor(TRL["rewards"]).view(-1, TRL["group_size"])).flatten()
    torch.testing.assert_close(advantages, torch.tensor(case["advantages"]), atol=1e-6, rtol=0)
    scores: dict[str, Tensor] = {"logp_old": torch.tensor(TRL[case["logp_old"]])}
    if settings.kl_coefficient:
        scores["logp_ref"] = reference
    if settings.entropy_fraction < 1:
        scores["keep"] = select_tokens(entropy, mask, fraction=settings.entropy_fraction).mask
    rl = reinforcement(None, settings=settings)
    loss, grad, metrics = evaluate(rl, logp, entropy, mask, advantages, TRL["max_length"], **scores)
    assert (metrics["clip_share"] > 0) == (name != "rloo_on_policy")  # the numbers reach the shipped ranges
    # TRL's RLOO adds up a sequence's tokens where ours, like Dr.GRPO, divides the sum by the longest response
    scale = TRL["max_length"] if name == "rloo_on_policy" else 1
    torch.testing.assert_close(scale * grad, torch.tensor(case["gradient"]), atol=2e-6, rtol=1e-6)
    # at ratio 1 TRL's RLOO reports -A r where we report -A logp; their gradients are the same
    if name != "rloo_on_policy":
        assert loss.item() == pytest.approx(case["loss"], abs=2e-6)
