"""The in-process engine: log-probabilities, independence of the batch, ends, limits."""

import copy
from typing import Any

import pytest
import torch

from mifo_lightning.policy.ending import set_ends
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.sampler import next_token, uniforms

TEXTS = ["123+456=", "9+9=", "s:40312=", "777x12=", "r:12345="]


@pytest.fixture
def prompts(tokenizer: Any) -> list[list[int]]:
    """Prompts of different lengths, so that they are padded."""
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def generate(
    policy: Policy, tokenizer: Any, prompts: list[list[int]], *, rows: int = 512, samples: int = 3, **sampling: Any
) -> list[list[Completion]]:
    settings = Sampling(**{"max_new_tokens": 14, **sampling})
    keys = [1000 * len(p) + sum(p) for p in prompts]
    return InProcessEngine(rows).generate(policy, tokenizer, prompts, keys, samples, settings)


def pack(prompts: list[list[int]], completions: list[list[Completion]], pad: int) -> Sequences:
    pairs = [(p, c.tokens) for p, group in zip(prompts, completions, strict=True) for c in group]
    return Sequences.pack([p for p, _ in pairs], [tokens for _, tokens in pairs], pad)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_log_probabilities_equal_a_teacher_forced_forward(
    policy: Policy, tokenizer: Any, prompts: list[list[int]], temperature: float
) -> None:
    completions = generate(policy, tokenizer, prompts, temperature=temperature)
    sequences = pack(prompts, completions, tokenizer.pad_token_id)
    logp, _ = policy(sequences, temperature)
    for row, completion in zip(logp, (c for group in completions for c in group), strict=True):
        sampled = torch.tensor(completion.logp)
        torch.testing.assert_close(row[: len(sampled)], sampled, atol=2e-4, rtol=2e-4)
        assert (row[len(sampled) :] == 0).all()


def test_responses_do_not_depend_on_the_rest_of_the_batch(
    policy: Policy, tokenizer: Any, prompts: list[list[int]]
) -> None:
    together = generate(policy, tokenizer, prompts, temperature=1.3)
    backwards = generate(policy, tokenizer, prompts[::-1], temperature=1.3)[::-1]
    alone = [generate(policy, tokenizer, [p], temperature=1.3)[0] for p in prompts]
    in_parts = generate(policy, tokenizer, prompts, temperature=1.3, rows=6)
    more_samples = generate(policy, tokenizer, prompts, temperature=1.3, samples=5)
    tokens = [[c.tokens for c in group] for group in together]
    for other in (backwards, alone, in_parts, [group[:3] for group in more_samples]):
        assert [[c.tokens for c in group] for group in other] == tokens


def test_samples_of_one_question_differ(policy: Policy, tokenizer: Any, prompts: list[list[int]]) -> None:
    (group,) = generate(policy, tokenizer, prompts[:1], samples=16, temperature=2.0)
    assert len({tuple(c.tokens) for c in group}) > 8


def test_a_response_ends_with_its_first_end_of_sequence(
    policy: Policy, tokenizer: Any, prompts: list[list[int]]
) -> None:
    for group in generate(policy, tokenizer, prompts, temperature=1.5, samples=8):
        for c in group:
            assert c.finished == (c.tokens[-1] == tokenizer.eos_token_id)
            assert tokenizer.eos_token_id not in c.tokens[:-1]
            assert len(c.logp) == len(c.tokens) <= 14


def test_what_does_not_end_in_time_is_flagged_as_truncated(
    policy: Policy, tokenizer: Any, prompts: list[list[int]]
) -> None:
    for group in generate(policy, tokenizer, prompts, max_new_tokens=3):
        assert all(not c.finished and len(c.tokens) == 3 for c in group)


def test_a_truncated_response_that_waits_for_others_to_be_done_stays_truncated(
    policy: Policy, tokenizer: Any, prompts: list[list[int]]
) -> None:
    ends = {tokenizer.encode(digit, add_special_tokens=False)[0] for digit in "02"}
    many = copy.copy(tokenizer)
    set_ends(many, ends)  # some of which would be drawn while waiting
    # a slot is taken again as soon as an eighth is free, so that responses are cut off at different turns
    groups = generate(policy, many, 40 * prompts, rows=64, samples=1, max_new_tokens=12, temperature=3.0)
    drawn = [c for group in groups for c in group]
    assert 0 < sum(c.finished for c in drawn) < len(drawn)
    assert all(c.finished == (c.tokens[-1] in ends) for c in drawn)


def test_a_stop_string_ends_a_response(policy: Policy, tokenizer: Any, prompts: list[list[int]]) -> None:
    for group in generate(policy, tokenizer, prompts[:3], stop=[">"], temperature=0.5):
        for c in group:
            assert c.finished
            assert tokenizer.decode(c.tokens).endswith(">")


def test_greedy_takes_the_most_likely_token(policy: Policy, tokenizer: Any, prompts: list[list[int]]) -> None:
    for prompt, (completion,) in zip(
        prompts, generate(policy, tokenizer, prompts, samples=1, temperature=0.0), strict=True
    ):
        ids = list(prompt)
        for token in completion.tokens:
            logits = policy.model(torch.tensor([ids])).logits[0, -1]
            assert logits.max() - logits[token] < 1e-3
            ids.append(token)


def test_dropout_is_off_while_sampling_and_in_updates(policy: Policy, tokenizer: Any, prompts: list[list[int]]) -> None:
    seen = []
    policy.train()
    policy.model.model.layers[0].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    policy(pack(prompts, generate(policy, tokenizer, prompts), tokenizer.pad_token_id))
    assert seen
    assert not any(seen)
    assert policy.training


def test_sampling_inside_autocast_does_not_cost_the_next_forward_its_gradient(
    policy: Policy, tokenizer: Any, prompts: list[list[int]]
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        completions = generate(policy, tokenizer, prompts)
        logp, _ = policy(pack(prompts, completions, tokenizer.pad_token_id))
    logp.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_sampled_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(40_000, 4)
    u = uniforms(torch.arange(40_000), step=3)
    tokens, logp = next_token(logits, u, Sampling(temperature=2.0))
    expected = (logits[0] / 2).softmax(-1)
    shares = torch.bincount(tokens, minlength=4) / 40_000
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    assert shares[2] == 0
    torch.testing.assert_close(logp, expected.log()[tokens])


@pytest.mark.parametrize("size", [255, 256, 257, 1000])
def test_a_large_vocabulary_is_drawn_from_as_a_small_one(size: int) -> None:
    logits = 3 * torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    u = (torch.arange(20_000, dtype=torch.double) + 0.5) / 20_000
    tokens, logp = next_token(logits.expand(20_000, size), u, Sampling())
    expected = logits[0].double().softmax(-1)
    shares = torch.bincount(tokens, minlength=size) / 20_000
    torch.testing.assert_close(shares.double(), expected, atol=1.1e-4, rtol=0)
    torch.testing.assert_close(logp.double(), expected.log()[tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [10, 257, 1000])
def test_logits_that_are_no_numbers_draw_a_token_that_says_so(size: int) -> None:
    tokens, logp = next_token(torch.full((2, size), torch.nan), torch.tensor([0.1, 0.9]).double(), Sampling())
    assert (tokens < size).all()
    assert logp.isnan().all()


def test_uniforms_are_uniform_and_differ_between_steps_and_keys() -> None:
    keys = torch.arange(20_000)
    first, second = uniforms(keys, 0), uniforms(keys, 1)
    for u in (first, second):
        assert 0 <= u.min() <= u.max() < 1
        assert abs(u.mean() - 0.5) < 0.01
        assert abs(u.var() - 1 / 12) < 0.005
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(top_k=2), {3, 1}),
        (Sampling(top_p=0.6), {3}),
        (Sampling(top_p=0.7), {3, 1}),
        (Sampling(top_p=1e-6), {3}),
    ],
)
def test_top_k_and_top_p_keep_the_most_likely_tokens(sampling: Sampling, allowed: set[int]) -> None:
    logits = torch.log(torch.tensor([[0.05, 0.25, 0.1, 0.6]])).expand(5000, 4)
    tokens, logp = next_token(logits, uniforms(torch.arange(5000), 0), sampling)
    assert set(tokens.tolist()) == allowed
    total = sum(logits[0, token].exp() for token in allowed)
    torch.testing.assert_close(logp, logits[0, tokens] - total.log())
