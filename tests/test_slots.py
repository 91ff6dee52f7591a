"""Decoding in slots: rows enter, leave and move, and nothing of it shows in what they draw."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_module
from torch.nn.utils.rnn import pad_sequence

from benchmarks.families import tiny_config, tiny_model
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy import slots
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


@pytest.mark.parametrize("seed", range(3))
def test_whoever_enters_moves_and_leaves_each_row_has_the_logits_of_itself_alone(
    policy: Policy, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PREFILL", 12)  # several prefills for prompts that enter together
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    def some(n: int) -> list[int]:
        return torch.randint(3, 20, (n,), generator=g).tolist()

    rows, batch = list[list[int]](), Slots(policy, 7, 40, 0)

    def check(logits: torch.Tensor, rows: list[list[int]]) -> None:
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        alone = policy.model(ids).logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        torch.testing.assert_close(logits, alone, atol=2e-4, rtol=2e-4)

    with torch.no_grad():
        for _ in range(10):
            samples, room = number(1, 3), 7 - len(rows)
            lengths = [number(1, 12) for _ in range(room // samples)]
            if rows and lengths and number(0, 2):
                lengths[0] = min(batch.columns, 12)  # in step with the others, where they are
            prompts = [some(n) for n in lengths[: number(0, 4)]]
            if prompts:
                new = [list(p) for p in prompts for _ in range(samples)]
                check(batch.enter(prompts, samples), new)
                rows += new
            for _ in range(number(0, 4) if rows else 0):
                token = some(len(rows))
                for row, t in zip(rows, token, strict=True):
                    row.append(t)
                check(batch.step(torch.tensor(token)), rows)
            stay = [i for i, row in enumerate(rows) if len(row) < 24 and number(0, 5)]
            m = len(stay)  # the last ones take the places of those that leave, as the decoder has it
            late = [i for i in stay if i >= m]
            order = [i if i in stay else late.pop(0) for i in range(m)]
            batch.keep(torch.tensor(order, dtype=torch.long)) if rows else None
            rows = [rows[i] for i in order]


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
    batch = Slots(policy, 2, 8, 0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        batch.enter([[1, 2, 3]], 2)
    held = [t for layer in batch.cache.layers for t in (layer.keys, layer.values)]
    assert {t.dtype for t in held} == {torch.bfloat16}
    assert not any(t[:, :, 3:].any() for t in held), "what is masked is not a stray NaN"


@pytest.mark.parametrize("name", ["rows", "cache_tokens"])
def test_there_is_room_for_one_at_least(name: str) -> None:
    with pytest.raises(InputError, match=rf"engine.init_args.{name}: 0 is not allowed; it must be at least 1"):
        InProcessEngine(**{name: 0})
    assert make_module(engine=InProcessEngine(**{name: 1})).responder.engine
