"""The base of the 24 game: it is shown right arithmetic on train hands only, its recipe repeats, scores are real."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.base_training import build_model
from experiments.make_points_base import (
    EOS,
    IDS,
    PAD,
    PROMPT_TOKENS,
    VOCABULARY,
    Recipe,
    corpus,
    grades,
    make,
)
from mifo_lightning.data.general_points import RULES, GeneralPoints
from mifo_lightning.rewards.points import PointsReward
from mifo_lightning.rollout.engine import Completion
from mifo_lightning.rollout.in_process import InProcessEngine

COUNTS = {rule: {card: index + 1 for index, card in enumerate("A23456789TJQK")} for rule in RULES}
COUNTS["ten"] |= dict.fromkeys("JQK", 10)


def texts(recipe: Recipe) -> list[tuple[str, str]]:
    """Prompt and response of every row of the corpus."""
    rows = ["".join(VOCABULARY[token] for token in tokens) for tokens in corpus(recipe, seed=1).tolist()]
    assert all(row.partition(EOS)[2].replace(PAD, "") == "" and EOS in row for row in rows)
    return [(row[:PROMPT_TOKENS], row[PROMPT_TOKENS:].partition(EOS)[0]) for row in rows]


def test_the_corpus_is_right_arithmetic_that_uses_every_card_of_train_hands() -> None:
    pairs = texts(Recipe(pool=1500))
    truths, hands = [], set()
    for question, _ in pairs:
        rule = {"t": "ten", "l": "literal"}[question[0]]
        numbers = [COUNTS[rule][card] for card in question[2:6]]
        truths.append(f"{' '.join(map(str, numbers))} > 24")
        hands.add(tuple(sorted(numbers)))
    scores = PointsReward(graded=True)([response for _, response in pairs], truths)
    assert min(scores) > 0.3  # one number is left, whatever it is
    assert 0.4 < sum(score == 1 for score in scores) / len(scores) < 0.6
    assert {question[0] for question, _ in pairs} == {"t", "l"}
    for split in ("val", "test"):
        rows = GeneralPoints(list(RULES), 2500, split).rows()
        held = {tuple(sorted(map(int, row["reward_model"]["ground_truth"].split()[:4]))) for row in rows}
        assert not held & hands


def test_more_solved_responses_reach_the_target_more_often() -> None:
    shares = []
    for solved in (0.0, 1.0):
        pairs = texts(replace(Recipe(pool=600), solved=solved))
        shares.append(sum(response.endswith("=24") for _, response in pairs) / len(pairs))
    assert shares[0] + 0.2 < shares[1] < 1.0  # unsolvable hands are shown too


def test_the_same_seed_remakes_the_same_base_and_stock_classes_load_it(tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch=16, decay_from=1, pool=40)
    results = [make(4, tmp_path / name, 8, recipe) for name in ("first", "second")]
    assert results[0].accuracy == results[1].accuracy
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert model.num_parameters() == 301_440
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert tokenizer.get_vocab() == IDS
    for row in GeneralPoints(list(RULES), 40).rows():
        text = row["prompt"][0]["content"] + row["target"][0]["content"]
        assert [VOCABULARY[token] for token in tokenizer.encode(text)] == list(text)


def test_a_response_counts_only_if_it_is_right_and_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = GeneralPoints(["ten"], 64, "test").rows()
    answer = rows[0]["target"][0]["content"]
    right = PointsReward()([answer] * 64, [row["reward_model"]["ground_truth"] for row in rows])
    model = build_model(VOCABULARY)
    for finished, share in ((True, sum(right) / 64), (False, 0.0)):
        tokens = [IDS[char] for char in answer] + [IDS[EOS]] * finished
        one = Completion(tokens, [0.0] * len(tokens), finished)
        monkeypatch.setattr(InProcessEngine, "generate", lambda *_, one=one: [[one]] * 64)
        assert float((grades(model, "ten", 64) == 1).float().mean()) == share
    assert sum(right) > 0
