"""The prompts that ask a real model for what it could before: ten kinds, half with an answer that can be checked."""

import json
from collections import Counter
from pathlib import Path

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
