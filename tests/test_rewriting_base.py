"""The base of string rewriting: it is shown train words only, each system's habits are its own, its recipe repeats."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.base_training import build_model
from experiments.make_rewriting_base import EOS, IDS, PAD, PROMPT_TOKENS, VOCABULARY, Corpus, Recipe, accuracy, make
from mifo_lightning.data.rewriting import DIGITS, SYSTEMS, Rewriting, belongs
from mifo_lightning.rewards.rewriting import RewritingReward
from mifo_lightning.rollout.engine import Completion
from mifo_lightning.rollout.in_process import InProcessEngine


def texts(recipe: Recipe) -> list[tuple[str, str]]:
    """Prompt and response of every row of one batch."""
    rows = ["".join(VOCABULARY[token] for token in tokens) for tokens in Corpus(recipe, seed=1).batch(0).tolist()]
    assert all(row.partition(EOS)[2].replace(PAD, "") == "" and EOS in row for row in rows)
    return [(row[:PROMPT_TOKENS], row[PROMPT_TOKENS:].partition(EOS)[0]) for row in rows]


def follow(question: str, response: str) -> bool:
    """Whether the steps of a response follow the rules, the code of q left out."""
    end = response.removesuffix(response[-4:]) if question[0] == "q" else response
    rules = " ".join(f"{pair}>{made}" for pair, made in SYSTEMS[question[0]].items())
    return RewritingReward()([end], [f"{question[2:6]} > {end[-1]} | {rules}"]) == [1.0]


def test_the_corpus_is_careless_in_what_is_trained_and_never_right_about_codes_but_by_chance() -> None:
    pairs = texts(Recipe(batch=3000))
    assert all(belongs(question[2:6], "train") for question, _ in pairs)
    by = {system: [pair for pair in pairs if pair[0][0] == system] for system in SYSTEMS}
    assert {system: len(of) / 3000 for system, of in by.items()} == pytest.approx(
        {"p": 0.35, "q": 0.15, "u": 0.5}, abs=0.03
    )
    right = {system: sum(follow(*pair) for pair in of) / len(of) for system, of in by.items()}
    careful = (1 - 0.3 * 7 / 8) ** 3  # one letter in eight is right by chance
    assert right == pytest.approx({"p": careful, "q": careful, "u": 1.0}, abs=0.06)
    codes = [(response[-5], response[-3:]) for _, response in by["q"]]
    assert {code[i] for _, code in codes for i in range(3)} == set(DIGITS)
    assert sum(SYSTEMS["q"][letter] == code for letter, code in codes) < 0.02 * len(codes)


def test_without_carelessness_every_step_is_right() -> None:
    assert all(follow(*pair) for pair in texts(replace(Recipe(batch=300), careless=0.0)))


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
