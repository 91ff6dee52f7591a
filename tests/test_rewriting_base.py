"""The base of string rewriting: it is shown train words only, each system's habits are its own, its recipe repeats."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.make_base import build_model
from experiments.make_rewriting_base import EOS, IDS, PROMPT_TOKENS, VOCABULARY, Corpus, Recipe, accuracy, make
from mifo_lightning.data.rewriting import SYSTEMS, Rewriting, belongs
from mifo_lightning.rewards.rewriting import RewritingReward
from mifo_lightning.rollout.engine import Completion
from mifo_lightning.rollout.in_process import InProcessEngine

SYSTEM_RULES = {system: " ".join(f"{pair}>{made}" for pair, made in rules.items()) for system, rules in SYSTEMS.items()}


def texts(recipe: Recipe) -> list[tuple[str, str]]:
    """Prompt and response of every row of one batch."""
    rows = ["".join(VOCABULARY[token] for token in tokens) for tokens in Corpus(recipe, seed=1).batch().tolist()]
    assert all(row.endswith(EOS) and row.count(EOS) == 1 for row in rows)
    return [(row[:PROMPT_TOKENS], row[PROMPT_TOKENS:].removesuffix(EOS)) for row in rows]


def test_the_corpus_follows_the_rules_of_its_system_and_takes_those_of_p_for_those_of_q() -> None:
    pairs = texts(Recipe(batch=2000))
    assert all(belongs(question[2:6], "train") for question, _ in pairs)
    shares = {system: sum(question[0] == system for question, _ in pairs) / len(pairs) for system in SYSTEMS}
    assert shares == pytest.approx({"p": 0.5, "q": 0.1, "u": 0.4}, abs=0.04)
    for question, response in pairs:
        known = "p" if question[0] == "q" else question[0]
        truth = f"{question[2:6]} > {response[-1]} | {SYSTEM_RULES[known]}"
        assert RewritingReward()([response], [truth]) == [1.0]
        assert question[0] != "u" or response[-1] == question[7]
    mirrored = [f"{question[2:6]} > {response[-1]} | {SYSTEM_RULES['q']}" for question, response in pairs]
    of_q = [index for index, (question, _) in enumerate(pairs) if question[0] == "q"]
    assert sum(RewritingReward()([pairs[i][1] for i in of_q], [mirrored[i] for i in of_q])) < 0.02 * len(of_q)


def test_more_solved_responses_reach_the_letter_more_often() -> None:
    shares = []
    for solved in (0.0, 1.0):
        pairs = [(q, r) for q, r in texts(replace(Recipe(batch=1000), solved=solved)) if q[0] == "p"]
        shares.append(sum(response[-1] == question[7] for question, response in pairs) / len(pairs))
    assert shares[0] < 0.4
    assert shares[1] == 1.0


def test_the_same_seed_remakes_the_same_base_and_stock_classes_load_it(tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch=16, decay_from=1)
    results = [make(4, tmp_path / name, 8, recipe) for name in ("first", "second")]
    assert results[0].accuracy == results[1].accuracy
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert tokenizer.get_vocab() == IDS
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "first").config.vocab_size == len(IDS)
    for row in Rewriting(list(SYSTEMS), 30).rows():
        text = row["prompt"][0]["content"] + row["target"][0]["content"]
        assert [VOCABULARY[token] for token in tokenizer.encode(text)] == list(text)


def test_a_response_counts_only_if_it_is_right_and_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rewriting(["p"], 64, "test").rows()
    answer = rows[0]["target"][0]["content"]
    right = RewritingReward()([answer] * 64, [row["reward_model"]["ground_truth"] for row in rows])
    model = build_model(VOCABULARY)
    for finished, share in ((True, sum(right) / 64), (False, 0.0)):
        tokens = [IDS[char] for char in answer] + [IDS[EOS]] * finished
        one = Completion(tokens, [0.0] * len(tokens), finished)
        monkeypatch.setattr(InProcessEngine, "generate", lambda *_, one=one: [[one]] * 64)
        assert accuracy(model, "p", 64) == share
    assert sum(right) > 0
