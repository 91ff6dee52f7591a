"""Circuits: what is patched is what was named, sets of heads suffice as they say, and records are made once."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers import LlamaForCausalLM as Llama

from experiments.circuits import measures
from experiments.circuits.measures import Questions, accuracy, chance_jaccard, jaccard, other_sets, random_change
from experiments.circuits.patching import Outputs, Part, head_parts, mlp_parts, record, replaced, sites
from experiments.circuits.records import Sample, transplant
from mifo_lightning.common.errors import InputError

SHAPE: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "initializer_range": 0.4,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "llama": lambda: Llama(LlamaConfig(**SHAPE, head_dim=8)),  # heads together wider than the model
}


def build(family: str = "qwen2", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def draw(rows: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(0, 13, (rows, 7), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_patched_head_is_the_only_one_that_changes(family: str) -> None:
    model: Any = build(family)
    tokens, other = draw(), record(model, draw(seed=1))
    own = record(model, tokens)
    for part in (Part(1, 2), Part(0, 3)):
        with replaced(model, [part], other):
            got = record(model, tokens)
        width = got.heads[0].shape[-1] // 4
        columns = torch.zeros(4 * width, dtype=torch.bool)
        columns[part.head * width : (part.head + 1) * width] = True  # type: ignore[operator]
        assert torch.equal(got.heads[part.layer][..., columns], other.heads[part.layer][..., columns])
        assert torch.equal(got.heads[part.layer][..., ~columns], own.heads[part.layer][..., ~columns])
        assert part.layer == 0 or torch.equal(got.heads[0], own.heads[0])
        assert not torch.equal(got.mlps[part.layer], own.mlps[part.layer])

    # the last layer by hand, with head 2 of the other rows
    width = own.heads[1].shape[-1] // 4
    mixed = own.heads[1].clone()
    mixed[..., 2 * width : 3 * width] = other.heads[1][..., 2 * width : 3 * width]
    layer, before = model.model.layers[1], model(tokens, output_hidden_states=True).hidden_states[1]
    after = before + layer.self_attn.o_proj(mixed)
    after = after + layer.mlp(layer.post_attention_layernorm(after))
    with replaced(model, [Part(1, 2)], other):
        torch.testing.assert_close(logits(model, tokens), model.lm_head(model.model.norm(after)))


@torch.no_grad()
def test_a_patched_mlp_is_the_only_part_that_changes() -> None:
    model = build()
    tokens, other = draw(), record(model, draw(seed=1))
    own = record(model, tokens)
    with replaced(model, [Part(0)], other):
        got = record(model, tokens)
    assert torch.equal(got.heads[0], own.heads[0])
    assert torch.equal(got.mlps[0], other.mlps[0])
    assert not torch.equal(got.heads[1], own.heads[1])


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = build()
    tokens, other = draw(), record(model, draw(seed=1))
    own = logits(model, tokens)
    with replaced(model, [Part(0, 0), Part(1)], other):
        assert not torch.equal(logits(model, tokens), own)
    with pytest.raises(RuntimeError), replaced(model, [Part(0, 0), Part(1)], other):  # of other rows
        logits(model, tokens[:3])
    assert torch.equal(logits(model, tokens), own)


@torch.no_grad()
def test_the_mean_of_a_head_that_never_varies_changes_nothing() -> None:
    model: Any = build()
    value = model.model.layers[1].self_attn.v_proj  # 2 groups of keys and values, each for two heads
    value.weight[:6] = 0.0
    value.bias.normal_()
    tokens, mean = draw(), record(model, draw(rows=9, seed=1)).mean()
    own = logits(model, tokens)
    with replaced(model, [Part(1, 0), Part(1, 1)], mean):
        torch.testing.assert_close(logits(model, tokens), own)
    with replaced(model, [Part(1, 2)], mean):
        assert not torch.allclose(logits(model, tokens), own, atol=1e-3)


def test_the_mean_is_over_questions_and_keeps_positions() -> None:
    outputs = record(build(), draw(rows=9))
    mean = outputs.mean()
    assert mean.heads[1].shape == (1, *outputs.heads[1].shape[1:])
    torch.testing.assert_close(mean.mlps[0][0, 3], outputs.mlps[0][:, 3].sum(0) / 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_patched_with_itself_is_itself_bit_for_bit(family: str) -> None:
    model, tokens = build(family), draw()
    own, outputs = logits(model, tokens), record(model, tokens)
    parts = [*head_parts(model), *mlp_parts(model)]
    assert len(parts) == 2 * (4 + 1)
    for chosen in ([], parts[:1], parts[2:7], parts):
        with replaced(model, chosen, outputs):
            assert torch.equal(logits(model, tokens), own)


@torch.no_grad()
def test_all_parts_of_the_base_make_the_base_where_the_rest_is_the_base() -> None:
    """Exact by construction: what is left is embedding, `o_proj`, the last norm and the head of the model."""
    base, tuned = build(), build()
    left = ("embed_tokens", "o_proj", "lm_head", "model.norm")
    for name, p in tuned.named_parameters():
        if not any(text in name for text in left):
            p += 0.3 * torch.randn_like(p)
    tokens = draw()
    want, outputs = logits(base, tokens), record(base, tokens)
    heads, mlps = head_parts(base), mlp_parts(base)
    assert not torch.allclose(logits(tuned, tokens), want, atol=0.1)
    with replaced(tuned, [*heads, *mlps], outputs):
        assert torch.equal(logits(tuned, tokens), want)
    with replaced(tuned, heads, outputs):
        assert not torch.allclose(logits(tuned, tokens), want, atol=0.1)


def test_a_family_without_the_named_modules_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=13, n_positions=8))
    with pytest.raises(InputError, match="GPT2LMHeadModel: not every layer has an `o_proj`"):
        sites(model)


@torch.no_grad()
def test_accuracy_is_that_of_greedy_decoding_that_gives_the_demonstration() -> None:
    model = build()
    prompts = draw(rows=40)[:, :4]
    decoded = prompts
    for _ in range(3):
        decoded = torch.cat([decoded, logits(model, decoded)[:, -1:].argmax(-1)], 1)
    wrong = decoded.clone()
    wrong[::4, 5] = (wrong[::4, 5] + 1) % 13
    assert accuracy(model, Questions(decoded, 4)) == 1.0
    assert accuracy(model, Questions(wrong, 4)) == 0.75
    wrong[::2, 3] = (wrong[::2, 3] + 1) % 13  # the prompt is not scored, though it may change what is said
    assert accuracy(model, Questions(wrong, 7 - 1)) >= accuracy(model, Questions(wrong, 4))


@pytest.mark.parametrize("rows", [20, 100])
def test_sufficing_is_exactly_reaching_the_level(rows: int) -> None:
    model = build()
    tokens = draw(rows)
    tokens[:, 6] = logits(model, tokens)[:, 5].argmax(-1)  # the model's own last token: a whole accuracy of 1
    questions, mean = Questions(tokens, 6), record(model, draw(rows=30, seed=2)[:, :-1]).mean()
    found = set()
    for ablated in list(combinations(head_parts(model), 3))[::3]:
        reached = accuracy(model, questions, ablated, mean)
        for level in (reached, reached + 1 / rows, reached - 1 / rows, 0.5):
            enough = measures.suffices(model, questions, ablated, mean, level)
            assert enough == (reached >= level - 1e-9)
            found.add(enough)
    assert found == {True, False}


@pytest.mark.parametrize("seed", range(20))
def test_grown_sets_are_enough_and_none_smaller_than_the_smallest_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [Part(layer, head) for layer in range(2) for head in range(3)]
    sets = [frozenset(s) for size in range(7) for s in combinations(parts, size)]
    good = {s for s in sets if rng.random() < 0.1} | {frozenset(parts)}
    necessities = dict(zip(parts, rng.random(6), strict=True))
    grown = measures.grow(necessities, good.__contains__)
    assert grown in good
    left = [necessities[part] for part in parts if part not in grown]
    assert min([necessities[part] for part in grown], default=1) >= max(left, default=0)
    smallest = measures.smallest(parts, good.__contains__, grown)
    assert smallest in good
    assert len(smallest) == min(len(s) for s in good) <= len(grown)


def test_growing_stops_as_soon_as_it_is_enough() -> None:
    parts = [Part(0, head) for head in range(4)]
    necessities = dict(zip(parts, [0.1, 0.4, 0.4, -0.2], strict=True))
    assert measures.grow(necessities, lambda kept: len(kept) >= 2) == {parts[1], parts[2]}
    assert measures.grow(necessities, lambda kept: True) == frozenset()
    assert measures.grow(necessities, lambda kept: False) == frozenset(parts)


@pytest.mark.parametrize(("a", "b", "n"), [(2, 3, 5), (0, 2, 4), (4, 4, 5), (5, 5, 5), (0, 0, 3), (1, 1, 1)])
def test_likeness_by_chance_is_the_mean_over_all_sets(a: int, b: int, n: int) -> None:
    parts = [Part(0, head) for head in range(n)]
    every = [jaccard(parts[:a], s) for s in combinations(parts, b)]
    assert chance_jaccard([(a, b, n)]) == pytest.approx(np.mean(every))


def test_likeness_by_chance_keeps_how_many_heads_a_layer_has() -> None:
    first, last = ([Part(layer, head) for head in range(3)] for layer in (0, 1))
    own = {*first, last[0]}  # and by chance all of the first layer again, with two of the last one
    every = [jaccard(own, {*first, *s}) for s in combinations(last, 2)]
    assert chance_jaccard([(3, 3, 3), (1, 2, 3)]) == pytest.approx(np.mean(every))


def test_other_sets_are_as_large_all_different_and_never_the_circuit() -> None:
    parts = [Part(0, head) for head in range(5)]
    circuit = frozenset(parts[:2])
    for seed in "abcdefghij":
        others = other_sets(parts, circuit, 9, seed)
        assert len(set(others)) == 9  # all there are
        assert circuit not in others
        assert {len(other) for other in others} == {2}
    assert (
        other_sets(parts, circuit, 4, "a") == other_sets(parts, circuit, 4, "a") != other_sets(parts, circuit, 4, "b")
    )
    assert other_sets(parts, frozenset(parts), 9, "a") == []


def test_a_random_change_is_as_large_in_every_matrix() -> None:
    base = {"a": torch.randn(5, 7), "b": torch.randn(9), "still": torch.ones(3)}
    tuned = {"a": base["a"] + torch.randn(5, 7), "b": base["b"] * 1.5, "still": base["still"]}
    changed = random_change(base, tuned, "0")
    assert not torch.equal(changed["a"], random_change(base, tuned, "1")["a"])
    for name in ("a", "b"):
        assert (changed[name] - base[name]).norm() == pytest.approx(float((tuned[name] - base[name]).norm()), rel=1e-5)
        assert not torch.allclose(changed[name], tuned[name], atol=0.01)
    assert torch.equal(changed["still"], base["still"])


def test_what_is_put_in_is_the_work_of_the_named_heads_alone() -> None:
    """A head of the last layer that is put in carries nothing of what heads of the first one did."""
    base, tuned, tokens = build(), build(seed=1), draw(60)
    tokens[:, 6] = logits(tuned, tokens)[:, 5].argmax(-1)
    sample = Sample(Questions(tokens, 6), Questions(draw(30, 3), 6))
    order = head_parts(base)
    found = transplant(tuned, base, sample, order, frozenset([Part(1, 2)]), [])
    with torch.no_grad():
        mean = record(base, sample.reference.inputs).mean()
        with replaced(base, [part for part in order if part != Part(1, 2)], mean):
            alone = record(base, sample.scored.inputs)
    intact = record(base, sample.scored.inputs)
    assert found["circuit"] == accuracy(tuned, sample.scored, [Part(1, 2)], alone)
    assert found["circuit"] != accuracy(tuned, sample.scored, [Part(1, 2)], intact)
    assert found["heads"] == accuracy(tuned, sample.scored, order, intact)


def test_outputs_are_named_tuples_of_layers() -> None:
    outputs = record(build(), draw())
    assert isinstance(outputs, Outputs)
    assert [Part.named(str(part)) for part in (Part(1, 2), Part(0))] == [Part(1, 2), Part(0)]
