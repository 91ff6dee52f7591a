"""String rewriting: systems that are what they say, rows that verify themselves, disjoint splits, a strict reward."""

import random
from itertools import product

import numpy as np
import pytest
from task_rows import demonstration, question, truth

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.rewriting import DIGITS, LETTERS, SYSTEMS, TURNS, Rewriting, derivations, words
from mifo_lightning.data.source import Row, Split
from mifo_lightning.rewards.rewriting import RewritingReward
from mifo_lightning.rewards.scoring import score

ALL = list(SYSTEMS)
SPLITS: list[Split] = ["train", "val", "test"]
TURN, FLIP = np.array([[0, -1], [1, 0]]), np.array([[1, 0], [0, -1]])
TRUTH = "abba > c | ab>b ba>c bb> c>cc"


def graded(response: str, of: str = TRUTH) -> float:
    (value,) = RewritingReward(graded=True)([response], [of])
    assert RewritingReward()([response], [of]) == [float(value == 1)]
    assert 0 <= value <= 0.5 or value == 1
    return value


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return Rewriting(ALL, 3000, "train", seed=3).rows()


def test_systems_are_what_their_table_says() -> None:
    pairs = [x + y for x in LETTERS for y in LETTERS]
    assert sorted(SYSTEMS["p"]) == sorted(SYSTEMS["u"]) == pairs
    turn = {letter: np.exp(2j * np.pi * number / 8) for number, letter in enumerate(TURNS)}
    assert all(turn[SYSTEMS["p"][x + y]] == pytest.approx(turn[x] * turn[y]) for x, y in pairs)
    square = {
        letter: np.linalg.matrix_power(TURN, place % 4) @ (FLIP if place > 3 else np.eye(2))
        for place, letter in enumerate(LETTERS)
    }
    assert all(np.array_equal(square[SYSTEMS["u"][x + y]], square[x] @ square[y]) for x, y in pairs)
    assert {left: right for left, right in SYSTEMS["q"].items() if len(left) == 2} == SYSTEMS["p"]
    codes = [SYSTEMS["q"][letter] for letter in LETTERS]
    assert len(set(codes)) == 8
    assert all(len(code) == 3 and set(code) <= set(DIGITS) for code in codes)


def test_derivations_are_all_of_them_and_all_lead_to_one_end() -> None:
    for word in map("".join, product(LETTERS[::3], repeat=4)):
        for system, rules in SYSTEMS.items():
            found = derivations(word, system)
            assert list(found) == sorted(set(found))
            assert set(found) == {
                (one, two, rules[two], *([rules[rules[two]]] if system == "q" else []))
                for i, j in product(range(3), range(2))
                for one in [word[:i] + rules[word[i : i + 2]] + word[i + 2 :]]
                for two in [one[:j] + rules[one[j : j + 2]] + one[j + 2 :]]
            }
    for word in map("".join, product(LETTERS, repeat=4)):
        assert all(len({steps[-1] for steps in derivations(word, system)}) == 1 for system in SYSTEMS)


def test_rows_have_the_format_of_the_files_and_follow_their_system(rows: list[Row]) -> None:
    assert len(rows) == 3000 == len({question(row) for row in rows})
    for index, row in enumerate(rows):
        system = ALL[index % 3]
        assert row["data_source"] == f"rewriting-{system}"
        assert row["extra_info"] == {"index": index, "split": "train"}
        assert [message["role"] for message in row["prompt"] + row["target"]] == ["user", "assistant"]
        word, steps = question(row)[2:6], demonstration(row).split(",")
        assert question(row) == f"{system}:{word}="
        assert tuple(steps) == derivations(word, system)[0]
        assert truth(row).startswith(f"{word} > {steps[-1]} | aa>{SYSTEMS[system]['aa']} ab>")


def test_every_derivation_is_right_and_none_is_by_the_rules_of_another_system(rows: list[Row]) -> None:
    texts = [demonstration(row) for row in rows]
    truths = [truth(row) for row in rows]
    assert RewritingReward()(texts, truths) == [1.0] * len(rows)
    last = [",".join(derivations(question(row)[2:6], question(row)[0])[-1]) for row in rows]
    assert RewritingReward()(last, truths) == [1.0] * len(rows)
    assert sum(a != b for a, b in zip(last, texts, strict=True)) > 0.9 * len(rows)
    rules = [text.partition("|")[2] for text in truths]
    others = [f"{text.partition('|')[0]}|{rules[index % 3 - 1]}" for index, text in enumerate(truths)]
    of_p = [index for index in range(len(rows)) if index % 3 != 1]  # q has the rules of p, and more
    assert sum(RewritingReward()([texts[i] for i in of_p], [others[i] for i in of_p])) < 0.05 * len(rows)


def test_a_word_is_in_one_split_in_any_system_and_under_any_seed() -> None:
    seen: dict[str, Split] = {}
    for split in SPLITS:
        assert len(set(words(split))) == len(words(split))
        for seed in (0, 1):
            for row in Rewriting(ALL, 1200, split, seed).rows():
                assert seen.setdefault(question(row)[2:6], split) == split
    assert (
        sum(len(words(split)) for split in SPLITS) == len({word for split in SPLITS for word in words(split)}) == 8**4
    )


def test_an_exhausted_split_is_named() -> None:
    with pytest.raises(InputError, match=r"rewriting: 1500 test words of 'u' asked for, there are 1263$"):
        Rewriting(["u", "p"], 3000, "test").rows()
    assert len(Rewriting(["u"], 1263, "test").rows()) == 1263


def test_the_seed_decides_the_rows() -> None:
    assert Rewriting(ALL, 100, "val", 5).rows() == Rewriting(ALL, 100, "val", 5).rows()
    first, second = ({question(row) for row in Rewriting(["p"], 100, "train", seed).rows()} for seed in (5, 6))
    assert len(first & second) < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"systems": ["w"], "count": 1}, r"systems: \['w'\] given, allowed are p, q, u"),
        ({"systems": [], "count": 1}, r"\[\] given, allowed are"),
        ({"systems": ["p", "p"], "count": 1}, "each once"),
        ({"systems": ["p"], "count": 0}, "count: 0 given, allowed is 1 or more"),
        ({"systems": ["p"], "count": 1, "split": "dev"}, "'dev' given, allowed are train, val, test"),
        ({"systems": ["p"], "count": 1, "seed": -1}, "seed: -1 given"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Rewriting(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_walk_by_the_rules_is_right_and_a_changed_word_is_not() -> None:
    rng = random.Random(2)
    refused = 0
    for _ in range(400):
        rules = {
            "".join(rng.choices("ab", k=rng.randint(1, 2))): "".join(rng.choices("ab", k=rng.randint(0, 3)))
            for _ in range(3)
        }
        start = word = "".join(rng.choices("ab", k=6))
        words = []
        for _ in range(4):
            nexts = _successors(word, rules)
            if not nexts:
                break
            word = rng.choice(sorted(nexts))
            words.append(word)
        if not words or not all([start, *words]):
            continue
        of = f"{start} > {words[-1]} | {' '.join(f'{left}>{right}' for left, right in rules.items())}"
        assert graded(",".join(words), of) == 1
        place = rng.randrange(len(words))
        changed = [*words[:place], words[place] + rng.choice("ab"), *words[place + 1 :]]
        before = [start, *words][place]
        if changed[place] not in _successors(before, rules):
            assert graded(",".join(changed), of) == pytest.approx(0.5 * place / (place + 1))
            refused += 1
    assert refused > 100


def _successors(word: str, rules: dict[str, str]) -> set[str]:
    """What one step makes of a word, by cutting it in three in every way."""
    return {
        word[:i] + rules[word[i:j]] + word[j:]
        for i in range(len(word))
        for j in range(i, len(word) + 1)
        if word[i:j] in rules
    }


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("bba,a", 1 / 3),  # ab>b, then bb>: two steps, and not the goal
        ("abc,bc", 1 / 3),
        ("aa,", 0.25),
        ("aa,aaa", 0.25),
        ("bba,bc,cc", 1 / 3),
        ("abba", 0.0),  # no step
        ("c", 0.0),
        ("", 0.0),
        (" bba , ca ", 0.25),
        (" bba , bc ", 1 / 3),
        ("bba;a", 0.0),
        ("BBA,a", 0.0),
    ],
)
def test_partial_credit_is_what_the_documentation_says(response: str, reward: float) -> None:
    assert graded(response) == pytest.approx(reward)


def test_any_derivation_is_right_the_long_way_too() -> None:
    assert graded("bba,bc", "abba > bc | ab>b ba>c bb>") == 1  # the example of the documentation
    assert graded("abc,bc", "abba > bc | ab>b ba>c bb>") == 1
    assert graded("bba,bc,c", "abba > c | ab>b ba>c bc>c") == 1
    assert graded("c", "ba > c | ba>c c>cc cc>c") == 1
    assert graded("c,cc,c", "ba > c | ba>c c>cc cc>c") == 1
    assert graded(",".join(["cc", "c"] * 100), "c > c | c>cc cc>c") == 1
    assert graded(",".join(["cc", "c"] * 101), "c > c | c>cc cc>c") == 0  # more than 200 words
    assert graded("c" * 200, f"{'c' * 199} > {'c' * 200} | c>cc") == 1
    assert graded("c" * 201, f"{'c' * 200} > {'c' * 201} | c>cc") == 0


@pytest.mark.parametrize(
    "of",
    [
        "",
        "abba",
        "abba > c",
        "abba > c |",
        "abba c | ab>b",
        "abba > c | >b",
        "abba > c | ab",
        "abba > c | a>b>c",
        "a,b > c | a>c",
        "abba > c,d | ab>c",
        "a>b|c > d | x>y",
    ],
)
def test_a_ground_truth_of_another_form_stops_the_run(of: str) -> None:
    with pytest.raises(InputError, match=r"ground truth is .* allowed is for example 'abba > bc \| ab>b ba>c bb>'"):
        score(RewritingReward(), ["b"], [of])
