"""The policy's scores do not depend on padding, order or batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from mifo_lightning.policy.policy import Policy, Sequences


@pytest.fixture
def sequences(tokenizer: Any) -> Sequences:
    pairs = [("123+456=", "907050>0579"), ("s:40312=", ">01234"), ("9x9=", "1"), ("r:12345=", ">5432")]
    encoded = [[tokenizer.encode(text, add_special_tokens=False) for text in pair] for pair in pairs]
    return Sequences.pack([p for p, _ in encoded], [r for _, r in encoded], tokenizer.pad_token_id)


def test_scores_equal_those_of_each_sequence_alone(policy: Policy, sequences: Sequences) -> None:
    logp, entropy = policy(sequences)
    for i in range(len(sequences.tokens)):
        alone = sequences.select(torch.tensor([i]))
        for whole, part in zip((logp, entropy), policy(alone), strict=True):
            # a few roundings of logits of about 20, which differ between CPUs
            torch.testing.assert_close(whole[i, : part.shape[1]], part[0], atol=3e-5, rtol=1e-4)
            assert (whole[i, part.shape[1] :] == 0).all()


def test_what_stands_in_the_padding_does_not_matter(policy: Policy, sequences: Sequences) -> None:
    ends = sequences.prompt_lengths + sequences.response_lengths
    padding = torch.arange(sequences.tokens.shape[1]) >= ends[:, None]
    other = sequences._replace(tokens=sequences.tokens.masked_fill(padding, 7))
    assert (policy(sequences)[0] == policy(other)[0]).all()


def test_scores_are_those_of_the_hugging_face_model(policy: Policy, sequences: Sequences) -> None:
    logp, _ = policy(sequences)
    tokens = sequences.tokens[:1]
    expected = policy.model(tokens).logits.log_softmax(-1)[0, 7:18].gather(-1, tokens[0, 8:19, None])[:, 0]
    torch.testing.assert_close(logp[0, :11], expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_caps_its_logits_is_scored_with_the_cap() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        final_logit_softcapping=0.01,
    )
    capped = Policy(Gemma2ForCausalLM(config).eval())
    sequences = Sequences.pack([[2, 3]], [[4, 5, 6]], 0)
    logp, _ = capped(sequences)
    expected = capped.model(sequences.tokens).logits.log_softmax(-1)[0, 1:4].gather(-1, torch.tensor([[4], [5], [6]]))
    assert capped.split_head
    torch.testing.assert_close(logp[0], expected[:, 0])


def test_select_trims_to_the_longest_chosen_sequence(sequences: Sequences) -> None:
    chosen = sequences.select(torch.tensor([2, 1]))
    assert chosen.tokens.shape == (2, 14)
    assert chosen.response_lengths.tolist() == [1, 6]
    assert chosen.mask().sum(1).tolist() == [1, 6]


def test_the_embedded_model_has_no_surprises() -> None:
    config = json.loads((Path(__file__).parents[1] / "mifo_lightning/assets/base/config.json").read_text())
    assert config["pad_token_id"] != config["eos_token_id"]
