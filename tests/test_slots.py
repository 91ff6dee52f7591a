"""Decoding in slots: rows enter, leave and move, and nothing of it shows in what they draw."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_module

from benchmarks.families import tiny_config, tiny_model
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.slots import Slots, decodes_in_slots
from mifo_lightning.rollout.engine import Completion, Decoded, Sampling
from mifo_lightning.rollout.in_process import InProcessEngine

TEXTS = ["123+456=", "9+9=", "s:40312=", "777x12=", "r:12345=", "1+1=", "98x76=", "s:93="]


def draw(policy: Policy, tokenizer: Any, engine: InProcessEngine, samples: int = 3) -> list[list[Completion]]:
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    keys = [31 * sum(p) for p in prompts]
    return engine.generate(policy, tokenizer, prompts, keys, samples, Sampling(1.5, max_new_tokens=14))


def tokens(found: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.tokens for c in group] for group in found]


def test_the_embedded_model_decodes_in_slots(policy: Policy) -> None:
    assert policy.decoding.slots


@pytest.mark.parametrize(
    "settings", [{"rows": 6}, {"rows": 2}, {"rows": 7}, {"cache_tokens": 150}, {"cache_tokens": 1}]
)
def test_rows_that_enter_one_after_another_draw_what_they_draw_together(
    policy: Policy, tokenizer: Any, settings: dict[str, int]
) -> None:
    whole = draw(policy, tokenizer, InProcessEngine())
    engine, told = InProcessEngine(**settings), []
    engine.listener = told.append
    parts = draw(policy, tokenizer, engine)
    assert tokens(parts) == tokens(whole)
    for a, b in zip((c for g in whole for c in g), (c for g in parts for c in g), strict=True):
        torch.testing.assert_close(torch.tensor(b.logp), torch.tensor(a.logp), atol=2e-5, rtol=1e-5)
    assert told[-1] == Decoded(24, 24, told[-1].step, 14, told[-1].tokens)
    assert sorted(x.responses for x in told) == [x.responses for x in told]


def test_rows_enter_while_others_are_decoded(policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[tuple[int, int]] = []
    enter = Slots.enter

    def watched(self: Slots, prompts: Any, samples: int) -> Any:
        joined.append((self.n, len(prompts) * samples))
        return enter(self, prompts, samples)

    monkeypatch.setattr(Slots, "enter", watched)
    found = draw(policy, tokenizer, InProcessEngine(rows=9))
    assert sum(new for _, new in joined) == 24
    assert any(present > 0 for present, _ in joined[1:]), "not batch after batch"
    assert max(present + new for present, new in joined) <= 9
    rows = [(p, c) for p, g in zip(TEXTS, found, strict=True) for c in g]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text, _ in rows]
    sequences = Sequences.pack(prompts, [c.tokens for _, c in rows], tokenizer.pad_token_id)
    with torch.no_grad():
        logp, _ = policy(sequences, 1.5)
    for line, (_, c) in zip(logp, rows, strict=True):
        torch.testing.assert_close(line[: len(c.logp)], torch.tensor(c.logp), atol=2e-4, rtol=2e-4)


def test_the_path_of_every_family_draws_the_same(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = draw(policy, tokenizer, InProcessEngine(rows=9))
    monkeypatch.setattr(policy, "decoding", replace(policy.decoding, slots=False))
    assert tokens(draw(policy, tokenizer, InProcessEngine(rows=9))) == tokens(fast)


def test_a_model_whose_logits_slots_do_not_give_is_left_to_its_own_cache(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decodes_in_slots(policy)
    step = Slots.step

    def late(self: Slots, token: torch.Tensor) -> torch.Tensor:
        self.start[: self.n] += 1  # positions are off by one
        return step(self, token)

    monkeypatch.setattr(Slots, "step", late)
    assert not decodes_in_slots(policy)


@pytest.mark.parametrize("window", [8, 256])
def test_a_window_counted_from_the_last_column_of_the_batch_is_seen_however_wide(window: int) -> None:
    config = {"max_position_embeddings": 1100, "window_size": window}
    local, everything = ([[["global", kind], 2]] for kind in ("local", "global"))
    assert Policy(tiny_model(tiny_config("gpt_neo", attention_types=everything, **config))).decoding.slots
    assert not Policy(tiny_model(tiny_config("gpt_neo", attention_types=local, **config))).decoding.slots


def test_under_autocast_keys_and_values_lie_in_its_dtype(policy: Policy, tokenizer: Any) -> None:
    slots = Slots(policy, 2, 8, 0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        slots.enter([[1, 2, 3]], 2)
    held = [t for layer in slots.cache.layers for t in (layer.keys, layer.values)]
    assert {t.dtype for t in held} == {torch.bfloat16}
    assert not any(t[:, :, 3:].any() for t in held), "what is masked is not a stray NaN"


@pytest.mark.parametrize("name", ["rows", "cache_tokens"])
def test_there_is_room_for_one_at_least(name: str) -> None:
    with pytest.raises(InputError, match=rf"engine.init_args.{name}: 0 is not allowed; it must be at least 1"):
        InProcessEngine(**{name: 0})
    assert make_module(engine=InProcessEngine(**{name: 1})).responder.engine
