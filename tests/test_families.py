"""Decoder families, made tiny in the test: decoded as their own forward pass says, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.families import judge, tiny_config, tiny_model
from mifo_lightning.policy.head import LogitTransform
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy, Sequences

RIGHT = [
    *("gpt2", "opt", "bart", "gemma2", "gemma3", "gemma3_text", "llama4_text", "qwen3_moe", "deepseek_v4"),
    *("mamba", "mamba2", "jamba", "qwen3_next", "lfm2", "recurrent_gemma", "minimax"),
]
REFUSED = ["bert", "openai-gpt", "xlnet", "rwkv", "xlm", "roberta"]


@pytest.mark.parametrize("family", RIGHT)
def test_engine_and_scores_equal_the_bare_model_on_every_prefix(family: str, tmp_path: Path) -> None:
    verdict, detail = judge(tiny_model(tiny_config(family)), tmp_path)
    assert verdict == "equal", detail


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_decoded_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    verdict, detail = judge(tiny_model(tiny_config(family)), tmp_path)
    assert verdict == "refused", detail
    assert detail.startswith("model.model: ")
    assert "\n" not in detail


def fresh(family: str, **changes: Any) -> PreTrainedModel:
    """As its authors initialise it: logits are too small for a cap to show."""
    return tiny_model(tiny_config(family, **changes), scaled=False)


@pytest.mark.parametrize(
    ("family", "changes"), [("gemma2", {}), ("cohere", {}), ("granite", {"logits_scaling": 8.0}), ("minicpm3", {})]
)
def test_capped_or_scaled_logits_are_seen_on_a_fresh_model(family: str, changes: dict[str, Any]) -> None:
    assert Policy(fresh(family, **changes)).transform not in (None, LogitTransform())


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "gemma3_text", "mamba"])
def test_plain_heads_have_no_transform(family: str) -> None:
    assert Policy(fresh(family)).transform == LogitTransform()


def test_a_cap_holds_when_logits_have_grown() -> None:
    policy = Policy(fresh("gemma2"))
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(500)
    sequences = Sequences.pack([[2, 3]], [[4, 5, 6]], 0)
    logits = policy.model(sequences.tokens).logits
    assert 25 < logits.abs().max() <= 30
    expected = logits.log_softmax(-1)[0, 1:4].gather(-1, torch.tensor([[4], [5], [6]]))
    torch.testing.assert_close(policy(sequences)[0][0], expected[:, 0])


def test_dropout_is_off_in_updates_and_said_so_once(tmp_path: Path) -> None:
    fresh("gpt2").save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"dropout is switched off \(resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1\)"
    ):
        policy = load_policy(str(tmp_path), gradient_checkpointing=True)
    policy.train()
    sequences = Sequences.pack([[2, 3], [7]], [[4, 5, 6], [8, 9, 10]], 0)
    first, second = policy(sequences)[0], policy(sequences)[0]
    assert (first == second).all()
    with torch.no_grad(), policy.sampling():
        torch.testing.assert_close(policy(sequences)[0], first)


def test_a_vision_tower_is_not_trained_and_said_so(tmp_path: Path) -> None:
    fresh("gemma3").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"text does not pass through .*model.vision_tower"):
        policy = load_policy(str(tmp_path))
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained
    assert not any("vision" in name for name in trained)
    policy(Sequences.pack([[2, 3]], [[4, 5]], 0))[0].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())
