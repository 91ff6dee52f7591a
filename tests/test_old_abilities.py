"""The prompts that ask a real model for what it could before: ten kinds, half with an answer that can be checked."""

import json
from collections import Counter
from pathlib import Path

from mifo_lightning.data.rows import read_rows
from mifo_lightning.rewards.contains import ContainsReward

PROMPTS = Path(__file__).parents[1] / "experiments" / "old_abilities.jsonl"


def test_there_are_twenty_different_prompts_of_each_kind_and_half_have_an_answer() -> None:
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    assert set(Counter(row["data_source"] for row in rows).values()) == {20}
    assert len({row["prompt"] for row in rows}) == len(rows) == 200
    answered = {row["data_source"] for row in rows if "reward_model" in row}
    assert len(answered) == 5
    for row in rows:
        assert (row["data_source"] in answered) == ("reward_model" in row)
        truth = row.get("reward_model", {}).get("ground_truth", "none")
        assert truth.strip() == truth != ""


def test_retention_reads_them_and_tells_their_answers_apart() -> None:
    rows = read_rows(str(PROMPTS), unanswered=True)
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    assert truths.count("") == 100
    told = [(row, truth) for row, truth in zip(rows, truths, strict=True) if truth]
    judge = ContainsReward()
    assert set(judge([f"It is {truth.upper()}." for _, truth in told], [truth for _, truth in told])) == {1.0}
    for kind in {row["data_source"] for row, _ in told}:
        own = [truth for row, truth in told if row["data_source"] == kind]
        taken = judge(own[1:] + own[:1], own)
        assert sum(taken) <= 2, f"{kind}: the answer to another question is right"
