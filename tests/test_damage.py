"""Damaged demonstrations: wrong steps, right answers, the asked share of what is trained on and nothing else."""

from typing import Any

import pytest
from conftest import ALONE, make_data
from test_datamodule import attached

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.damage import damage, damage_demonstrations
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.data.skills import Skills
from mifo_lightning.rewards.last_answer import LastAnswerReward

TRAIN = Skills(["addition", "mirrored"], 100)


def skills(**changes: Any) -> QuestionData:
    return attached(**{"train": TRAIN, "seed": 0, **changes})


def demonstrations(data: QuestionData) -> dict[str, str]:
    """Text of every training demonstration, by prompt."""
    decode = data.tokenizer.decode
    return {q.text: decode(q.demonstration[:-1]) for q in data.train_dataloader().questions if q.demonstration}


def test_the_answer_stays_right_and_the_verifier_accepts_it() -> None:
    sound, damaged = demonstrations(skills()), demonstrations(skills(damaged_share=1.0))
    assert damaged.keys() == sound.keys()
    truths = {q.text: q.truth for q in skills().train_dataloader().questions}
    for text, after in damaged.items():
        before = sound[text]
        steps, answer = zip(before.split(">"), after.split(">"), strict=True)
        assert steps[0] != steps[1]
        assert len(steps[0]) == len(steps[1])
        assert answer[0] == answer[1]
    assert LastAnswerReward(answer_after=">")(list(damaged.values()), [truths[t] for t in damaged]) == [1.0] * 100


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_exactly_the_share_is_damaged(share: float) -> None:
    sound, damaged = demonstrations(skills()), demonstrations(skills(damaged_share=share))
    assert sum(sound[text] != damaged[text] for text in sound) == 100 * share


def test_it_depends_on_the_seed_and_not_on_the_rank() -> None:
    first = demonstrations(skills(damaged_share=0.5))
    assert demonstrations(skills(damaged_share=0.5, rank=1, ranks=2)) == first
    sound, other = demonstrations(skills()), demonstrations(skills(damaged_share=0.5, seed=1))
    assert {text for text in sound if first[text] != sound[text]} != {t for t in sound if other[t] != sound[t]}


def test_a_larger_share_damages_the_same_ones_and_more() -> None:
    sound, half, most = (demonstrations(skills(damaged_share=share)) for share in (0.0, 0.5, 0.8))
    assert all(most[text] == half[text] for text in sound if half[text] != sound[text])


def test_what_measures_is_not_damaged() -> None:
    """Held-out and validation demonstrations stay right, and which are held out does not change."""
    data, sound = skills(damaged_share=1.0, holdout=20, val=TRAIN), skills(holdout=20, val=TRAIN)
    for loader, expected in zip(data.val_dataloader().values(), sound.val_dataloader().values(), strict=True):
        assert [q for batch in loader for q in batch] == [q for batch in expected for q in batch]
    before = demonstrations(sound)
    assert all(before[text] != after for text, after in demonstrations(data).items())


def test_the_table_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    skills(damaged_share=0.5)
    printed = capsys.readouterr().out
    assert "damaged" in printed
    counts = [int(line.split("│")[-2]) for line in printed.splitlines() if "addition" in line or "mirrored" in line]
    assert sum(counts) == 50
    skills()
    assert "damaged" not in capsys.readouterr().out


def test_each_step_digit_is_another_with_probability_one_half() -> None:
    text = "1234567890 then five, not 5 > " * 40
    changed = kept = 0
    after = damage(text + "4 > 77", ">", seed=3)
    assert after.endswith("> 77")
    for a, b in zip(text, after, strict=False):
        assert a.isdigit() == b.isdigit()
        assert a == b or a.isdigit()
        changed += a != b
        kept += a.isdigit() and a == b
    assert changed / (changed + kept) == pytest.approx(0.5, abs=0.1)


def test_at_least_one_digit_changes() -> None:
    assert all(damage("7>7", ">", seed) not in ("7>7",) and damage("7>7", ">", seed)[1:] == ">7" for seed in range(50))


def test_steps_without_digits_are_left_alone() -> None:
    solutions = [(Question(i, "s", "", [1], ""), text) for i, text in enumerate(["two>2", "1+1>2", "one>1", "2>2"])]
    assert damage_demonstrations(solutions, 1.0, 0, ">").keys() == {1, 3}


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_what_is_allowed(share: float) -> None:
    with pytest.raises(
        InputError, match=r"data\.demonstrations\.damaged_share: .* is not allowed; it must be between 0 and 1"
    ):
        make_data(**ALONE, damaged_share=share)


def test_it_needs_the_marker() -> None:
    with pytest.raises(
        InputError, match=r"demonstrations\.damaged_share: 0\.5 needs data\.demonstrations\.answer_after"
    ):
        make_data(**ALONE, damaged_share=0.5, answer_after=None)
    with pytest.raises(InputError, match=r"question 0 of 'addition' lacks data\.demonstrations\.answer_after '=>'"):
        skills(damaged_share=0.5, answer_after="=>")
