"""The 24 game: which hands are solvable, rows that verify themselves, disjoint splits, a strict reward."""

import random
import warnings
from fractions import Fraction
from itertools import combinations_with_replacement, permutations

import pytest
from task_rows import demonstration, question, truth

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.general_points import RANKS, RULES, GeneralPoints, solutions, values, ways
from mifo_lightning.data.source import Row, Split
from mifo_lightning.rewards.points import PointsReward
from mifo_lightning.rewards.scoring import score

BOTH = list(RULES)
SPLITS: list[Split] = ["train", "val", "test"]
COUNTS = {"ten": dict(zip(RANKS, [*range(1, 11), 10, 10, 10], strict=True))}
COUNTS["literal"] = dict(zip(RANKS, range(1, 14), strict=True))


def graded(response: str, of: str = "13 5 3 1 > 24") -> float:
    (value,) = PointsReward(graded=True)([response], [of])
    assert PointsReward()([response], [of]) == [float(value == 1)]
    assert 0 <= value <= 1
    return value


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return GeneralPoints(BOTH, 3000, "train", seed=3).rows()


def test_as_many_hands_are_solvable_as_published() -> None:
    hands = list(combinations_with_replacement(range(13), 4))
    ten = {hand for hand in hands if ways(tuple(sorted(values(hand, "ten"))))}
    literal = {hand for hand in hands if ways(tuple(sorted(values(hand, "literal"))))}
    assert (len(ten), len(literal), len(ten & literal)) == (1236, 1362, 1095)


def test_every_solution_is_right_and_comes_once_in_a_fixed_order() -> None:
    for numbers in combinations_with_replacement(range(1, 11), 4):
        found = solutions(numbers)
        assert all("(" in text for text in found) or "(" not in found[0]  # whole values first
        assert len(set(found)) == len(found)
        of = f"{' '.join(map(str, numbers))} > 24"
        assert PointsReward()(list(found), [of] * len(found)) == [1.0] * len(found)
    assert solutions((3, 3, 8, 8)) == ("8/(3-(8/3))=24",)


def test_rows_have_the_format_of_the_files_and_follow_their_rule(rows: list[Row]) -> None:
    assert len(rows) == 3000
    for index, row in enumerate(rows):
        rule = BOTH[index % 2]
        assert row["data_source"] == f"points-{rule}"
        assert row["extra_info"] == {"index": index, "split": "train"}
        assert [message["role"] for message in row["prompt"] + row["target"]] == ["user", "assistant"]
        cards = question(row)[2:6]
        assert question(row) == f"{rule[0]}:{cards}="
        assert truth(row) == f"{' '.join(str(COUNTS[rule][card]) for card in cards)} > 24"
        assert rule == "ten" or set(cards) & set("JQK")


def test_demonstrations_are_right_and_those_of_another_rule_are_not(rows: list[Row]) -> None:
    assert PointsReward()([demonstration(row) for row in rows], [truth(row) for row in rows]) == [1.0] * len(rows)
    assert max(len(demonstration(row)) for row in rows) < 32
    wrong = [row for row in rows if row["data_source"] == "points-literal"]
    tens = [" ".join(str(COUNTS["ten"][card]) for card in question(row)[2:6]) + " > 24" for row in wrong]
    assert PointsReward()([demonstration(row) for row in wrong], tens) == [0.0] * len(wrong)


def test_a_hand_is_in_one_split_in_any_order_and_under_any_seed() -> None:
    seen: dict[tuple[int, ...], Split] = {}
    for split in SPLITS:
        for seed in (0, 1):
            for row in GeneralPoints(BOTH, 2500, split, seed).rows():
                numbers = tuple(sorted(map(int, truth(row).split()[:4])))
                assert seen.setdefault(numbers, split) == split
    orders = {question(row) for row in GeneralPoints(["ten"], 2900, "val").rows()}
    assert len(orders) == 2900
    hand = next(text[2:6] for text in orders if len(set(text[2:6])) == 4)
    everything = {question(row) for row in GeneralPoints(["ten"], _available("ten", "val"), "val").rows()}
    assert all(f"t:{''.join(order)}=" in everything for order in permutations(hand))


def test_seen_hands_are_those_of_training_and_the_others_are_not() -> None:
    trained = GeneralPoints(["ten"], 400, "train", seed=3).rows()
    rows = GeneralPoints(["ten", "ten-seen", "literal-seen"], 900, "test", seed=3).rows()
    asked = {
        source: [row for row in rows if row["data_source"] == source] for source in {r["data_source"] for r in rows}
    }
    assert {source: len(found) for source, found in asked.items()} == {
        "points-ten": 300,
        "points-ten-seen": 300,
        "points-literal-seen": 300,
    }
    assert [question(row) for row in asked["points-ten-seen"]] == [question(row) for row in trained[:300]]
    assert {row["extra_info"]["split"] for row in asked["points-ten-seen"]} == {"train"}
    assert not {question(row) for row in asked["points-ten"]} & {question(row) for row in trained}
    assert all(question(row).startswith("l:") for row in asked["points-literal-seen"])
    assert PointsReward()([demonstration(row) for row in rows], [truth(row) for row in rows]) == [1.0] * len(rows)


def test_an_exhausted_split_is_named() -> None:
    assert sum(_available("ten", split) for split in SPLITS) > 13**4 / 2
    with pytest.raises(InputError, match=r"points: 30000 val hands of 'literal' asked for, there are \d+$"):
        GeneralPoints(BOTH, 60_000, "val").rows()


def _available(rule: str, split: Split) -> int:
    with pytest.raises(InputError) as error:
        GeneralPoints([rule], 13**4 + 1, split).rows()
    return int(str(error.value).rsplit(" ", 1)[1])


def test_the_seed_decides_the_rows() -> None:
    assert GeneralPoints(BOTH, 100, "val", 5).rows() == GeneralPoints(BOTH, 100, "val", 5).rows()
    first, second = ({question(row) for row in GeneralPoints(["ten"], 100, "train", seed).rows()} for seed in (5, 6))
    assert len(first & second) < 10
    assert GeneralPoints(["literal"], 3).rows()[0]["data_source"] == "points-literal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": ["tens"], "count": 1}, r"\['tens'\] given, allowed are ten, literal"),
        ({"rules": [], "count": 1}, r"\[\] given, allowed are"),
        ({"rules": ["ten", "ten"], "count": 1}, "each once"),
        ({"rules": ["ten"], "count": 0}, "count: 0 given, allowed is 1 or more"),
        ({"rules": ["ten"], "count": 1, "split": "dev"}, "'dev' given, allowed are train, val, test"),
        ({"rules": ["ten"], "count": 1, "seed": -1}, "seed: -1 given"),
        ({"rules": ["ten-seen"], "count": 1}, r"\['ten-seen'\] given, allowed in the train split are ten, literal"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        GeneralPoints(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_an_expression_is_right_exactly_if_it_makes_the_target() -> None:
    rng = random.Random(2)
    right = 0
    for _ in range(1500):
        numbers = rng.choices(range(1, 7), k=4)
        text, value = _expression(numbers, rng)
        of = f"{' '.join(map(str, rng.sample(numbers, 4)))} > 12"
        if value is None:
            assert graded(text, of) == 0.1  # a division by zero
            continue
        reward = graded(text, of)
        assert (reward == 1) == (value == 12)
        assert reward == 1 or reward == pytest.approx(0.3 + 0.4 / (1 + abs(float(value) - 12)))
        assert graded(f"{text}={value}", of) == reward if value.denominator == 1 and value >= 0 else True
        assert graded(text, f"{of[0]} {of}") < 1  # a card too many: one is unused
        right += reward == 1
    assert right > 20


def _expression(numbers: list[int], rng: random.Random) -> tuple[str, Fraction | None]:
    """A random bracketed expression of the numbers in order and its value; None for a division by zero."""
    if len(numbers) == 1:
        return str(numbers[0]), Fraction(numbers[0])
    cut = rng.randrange(1, len(numbers))
    (left, a), (right, b) = _expression(numbers[:cut], rng), _expression(numbers[cut:], rng)
    operator = rng.choice("+-*/")
    text = f"({left}{operator}{right})"
    if a is None or b is None or (operator == "/" and b == 0):
        return text, None
    return text, {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("13-5=8,8*3=24,24*1=24", 1.0),
        ("(13-5)*3*1", 1.0),
        (" ( 13 - 5 ) * 3 * 1 = 24 ", 1.0),
        ("13-5=8, 8*3=24,\n24*1=24", 1.0),
        ("13-5,8*3,24/1", 1.0),
        ("13-5=8,8*3=24", 0.2),  # a card is left
        ("13-5=8,13-5=8,8*3=24", 0.1),  # cards used twice
        ("13-5=8,8*3=24,24*2=48", 0.1),  # no such card
        ("13-5=9,9*3=27,27-3=24", 0.1),  # wrong arithmetic
        ("13-5=8,8*3=24,24+1=24", 0.1),
        ("13+5=18,18+3=21,21+1=22", 0.3 + 0.4 / 3),
        ("13/(5-3-1-1)", 0.1),
        ("24", 0.1),
        ("", 0.0),
        ("13-5=8,", 0.0),
        ("13-5=8 8*3=24 24*1=24", 0.0),
        ("-5+13*3", 0.0),
        ("13**5", 0.0),
        ("13//5*3*1", 0.0),
        ("(13,5)", 0.0),
        ("13(5)", 0.0),
        ("(13-5)*3*1=24=24", 0.0),
        ("(13-5)*3*1=25", 0.1),
        ("0x13-5", 0.0),
        ("1_3-5", 0.0),
        ("013-5=8", 0.0),
        ("١٣-5=8,8*3=24,24*1=24", 0.0),
        ("__import__('os')", 0.0),
    ],
)
def test_partial_credit_is_what_the_documentation_says(response: str, reward: float) -> None:
    assert graded(response) == pytest.approx(reward)


def test_a_right_response_is_read_up_to_200_characters() -> None:
    assert graded("13-5=8,8*3=24,24*1=24".ljust(200)) == 1
    assert graded("13-5=8,8*3=24,24*1=24".ljust(201)) == 0


@pytest.mark.parametrize(
    "text", ["(" * 10**6, "9" * 10**6, "9**" * 10**6 + "9", "1+" * 99 + "1", "(" * 99 + "1" + ")" * 99]
)
def test_long_and_deep_responses_are_wrong_without_an_exception(text: str) -> None:
    reward = PointsReward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(reward, [text, text[:200], text[:150]], ["13 5 3 1 > 24"] * 3) == [0.0] * 3
    assert reward.errors == 0


@pytest.mark.parametrize("of", ["24", "13 5 3 1", "13 5 x 1 > 24", "13.0 5 > 24", ""])
def test_a_ground_truth_of_another_form_stops_the_run(of: str) -> None:
    with pytest.raises(InputError, match=r"ground truth is .* allowed is for example '13 5 3 1 > 24'"):
        score(PointsReward(), ["13-5"], [of])
