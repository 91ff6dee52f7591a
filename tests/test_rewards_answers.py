"""What counts as the answer: markers, formats that the prompt asks for, tiny numbers, options, programs."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.answer_format import readings
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.choice import ChoiceReward
from mifo_lightning.rewards.code import CodeReward
from mifo_lightning.rewards.contains import ContainsReward
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rewards.math_reward import MathReward
from mifo_lightning.rewards.scoring import score
from mifo_lightning.rewards.weighted import WeightedRewards

BOXED = r"Put the answer into \boxed{}."


@pytest.fixture(scope="module")
def math() -> Iterator[MathReward]:
    reward = MathReward(timeout=20.0)
    yield reward
    reward.close()


# --- markers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "response", "strict"),
    [
        ("Q<think>\n", r"\boxed{1}", 0),
        ("Q<think>\n", r"hm</think>\boxed{1}", 1),
        ("Q<think>\n", r"\boxed{1}</think>I do not know", 0),
        ("Q", r"<think>\boxed{1}", 0),
        ("Q", r"<think>hm</think>\boxed{1}", 1),
        ("Q", r"\boxed{1}", 1),
        ("Think in <think>, then answer.", r"\boxed{1}", 1),
    ],
)
def test_a_thought_that_never_ends_is_worth_nothing_or_its_whole_text(
    math: MathReward, prompt: str, response: str, strict: float
) -> None:
    assert score(math, [response], ["1"], prompts=[prompt]) == [strict]
    with math.grading_as("whole"):
        whole = 1.0 if "</think>" not in response else strict
        assert score(math, [response], ["1"], prompts=[prompt]) == [whole]


@pytest.mark.parametrize("kind", [LastAnswerReward, ChoiceReward, ContainsReward])
def test_other_rewards_with_a_marker_follow_the_same_rule(kind: type[LastAnswerReward]) -> None:
    for missing, expected in (("zero", 0), ("whole", 1)):
        reward = kind(answer_after="</think>", missing_marker=missing)  # type: ignore[arg-type]
        assert score(reward, ["B", "hm</think>B"], ["B"] * 2, prompts=["Q<think>"] * 2) == [expected, 1]
    with pytest.raises(InputError, match="missing_marker is 'half', allowed are zero and whole"):
        kind(answer_after="</think>", missing_marker="half")  # type: ignore[arg-type]
    assert LastAnswerReward().unended(["<think>1"], ["Q<think>"]) == [False], "`>` closes nothing"


# --- mathematics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "response", "truth", "expected"),
    [
        (BOXED, r"It is \fbox{73}.", "73", 1),
        (BOXED, r"It is \fbox{74}.", "73", 0),
        ("Answer in <answer> tags.", "12 <answer>73</answer>", "73", 1),
        ("Answer in <answer> tags.", r"\boxed{73} <answer>\sqrt{51}</answer>", r"\sqrt{51}", 1),
        ("Answer in <answer> tags.", r"<answer>73</answer>, no: <answer>74</answer>, \boxed{73}", "73", 0),
        ("Answer in <answer> tags.", r"<answer>\boxed{73}</answer>", "73", 1),
        ("Solve.", "As 12 < 20.\nAnswer: \\sqrt{51}", r"\sqrt{51}", 1),
        ("Solve.", "**Answer:** $\\sqrt{51}$.", r"\sqrt{51}", 1),
        ("Solve.", "The answer is: x^2+1", "x^2+1", 1),
        ("Solve.", "Answer: \\sqrt{52}", r"\sqrt{51}", 0),
        ("Solve.", "Answer: \\sqrt{51}\nor rather\n\\boxed{3}", r"\sqrt{51}", 0),
        (BOXED, "Answer: \\sqrt{51}", r"\sqrt{51}", 0),
        (BOXED, r"\boxed{x < 3}", r"(-\infty, 3)", 1),
        (BOXED, r"\boxed{x \le 3}", r"(-\infty, 3)", 0),
        (BOXED, r"\boxed{-2 \le x \le 7}", r"[-2, 7]", 1),
        ("Give it in interval notation.", r"\boxed{x < 3}", r"(-\infty, 3)", 0),
    ],
)
def test_the_answer_is_taken_from_where_the_prompt_wants_it(
    math: MathReward, prompt: str, response: str, truth: str, expected: float
) -> None:
    assert score(math, [response], [truth], prompts=[prompt]) == [expected]


def test_without_a_prompt_a_response_is_read_as_it_stands() -> None:
    assert readings("Answer: 5 <answer>6</answer>", None) == (["Answer: 5 <answer>6</answer>"], False)


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("1/2^{98}", "1/2^{99}", 0),
        ("1/2^{98}", "2^{-98}", 1),
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}", 0),
        (r"\frac{1}{2006!}", r"\frac{1}{2006!}", 1),
        ("x+1/2^{98}", "x+1/2^{99}", 0),
        ("x=1/2^{98}", "x=1/2^{99}", 0),
        ("(1/2^{98}, 1)", "(1/2^{99}, 1)", 0),
        (r"\{1/2^{98}, 1\}", r"\{1/2^{99}, 1\}", 0),
        (r"\{1/2^{98}, 1\}", r"\{1, 2^{-98}\}", 1),
        ("0.0000001", "0.0000002", 0),
        ("1/1000001", "1/1000000", 0),
        ("1/3", "0.333333", 1),
        (r"9\%", "9", 1),
        (r"\cos(\pi/5)", r"\frac{1+\sqrt{5}}{4}", 1),
        (r"\frac{1}{\sqrt{2}+1}", r"\sqrt{2}-1", 1),
        ("1011_2", "1011_3", 0),
        ("1011_2", "1011_{2}", 1),
        ("1011_2", "1011", 1),
    ],
)
def test_tiny_numbers_and_bases_must_be_the_same(math: MathReward, truth: str, answer: str, expected: float) -> None:
    assert math([f"\\boxed{{{answer}}}"], [truth]) == [expected]


# --- options --------------------------------------------------------------------------------------------------------

OPTIONS = ["4 m", "12 m", "13 m", "all of these"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", 1),
        ("(B)", 1),
        ("b", 1),
        ("A", 0),
        (r"\boxed{B}", 1),
        (r"\boxed{\text{B}}", 1),
        (r"\boxed{(B) 12 m}", 1),
        (r"\boxed{12 m}", 1),
        (r"B. \boxed{13 m}", 0),
        ("I first took A.\nThe correct answer is (B).", 1),
        ("The answer is B because it is long.", 1),
        ("**Answer:** B. 12 m", 1),
        ("Answer: C\nNo: the answer is B", 1),
        ("<answer>B</answer>", 1),
        ("Answer: 12  M", 1),
        ("Answer: 12", 0),
        ("Because of that", 0),
        ("B is wrong, and so is A\nI give up", 0),
        ("", 0),
    ],
)
def test_the_letter_or_the_text_of_the_option(response: str, expected: float) -> None:
    reward = ChoiceReward()
    for truth in ("B", "12 m"):
        assert score(reward, [response], [truth], columns=[{"options": OPTIONS}]) == [expected]


def test_a_truth_that_names_no_option_is_one_line_and_not_a_zero() -> None:
    """As a place in the list, 2 for the third: every response would be wrong."""
    with pytest.raises(InputError) as refused:
        score(ChoiceReward(), ["B"], ["2"], columns=[{"options": OPTIONS}])
    assert str(refused.value).startswith("ChoiceReward: ground truth is '2', allowed is the label or the text of one")
    assert "\n" not in str(refused.value)
    twice = {"A": "same", "B": "same", "C": "other"}
    with pytest.raises(InputError, match="ground truth is 'same'"):
        score(ChoiceReward(), ["C"], ["same"], columns=[{"options": twice}])


def test_options_that_are_none_are_one_line() -> None:
    with pytest.raises(InputError, match=r"options are .*12 m.*, allowed is a list of texts or a mapping of labels"):
        score(ChoiceReward(), ["B"], ["B"], columns=[{"options": str(OPTIONS)}])  # a cell of a CSV
    with pytest.raises(InputError, match="options: there is no column `choics`; there are choices"):
        ChoiceReward(options="choics").check_truth("12 m", {"choices": OPTIONS})
    ChoiceReward(options="choices").check_truth("B", {})  # another set may have letters alone
    ChoiceReward(options="choices").check_truth("12 m", {"choices": OPTIONS})


def test_options_of_arc_and_gpqa_and_none() -> None:
    arc = {"text": ["ice", "fire", "1"], "label": ["1", "2", "3"]}
    reward = ChoiceReward(options="choices")
    assert score(reward, ["2", "fire", "3", "3.5"], ["2"] * 4, columns=[{"choices": arc}] * 4) == [1, 1, 0, 0]
    named = {"A": "same", "B": "same", "C": "other"}
    assert score(ChoiceReward(), ["same", "C"], ["A", "C"], columns=[{"options": named}] * 2) == [0, 1]
    assert ChoiceReward()(["Answer: B", "Answer: ice", "Answer: 3.5", "Z"], ["B", "Ice", "3", "B"]) == [1, 1, 0, 0]


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("Paris", "Paris", 1),
        ("It is **PARIS**, of course.", "Paris", 1),
        ("Parisian", "Paris", 0),
        ("in_Paris", "Paris", 0),
        ("Lyon, not Paris? Lyon.", "Paris", 1),
        ("New\n  York", "new york", 1),
        ("New Jersey, York", "new york", 0),
        ("10.5", "10.5", 1),
        ("1005", "10.5", 0),
        ("letter d", "d", 1),
        ("did", "d", 0),
        ("STRASSE", "Straße", 1),
        ("", "d", 0),
        ("<think>Paris</think>Rome", "Paris", 0),
    ],
)
def test_the_truth_stands_among_the_words(response: str, truth: str, expected: float) -> None:
    assert score(ContainsReward(), [response], [truth]) == [expected]


# --- programs -------------------------------------------------------------------------------------------------------


def program(code: str) -> str:
    return f"Like this:\n```python\n{code}\n```\nDone."


@pytest.fixture(scope="module")
def code() -> Reward:
    return CodeReward(timeout=5.0, memory_mb=256, file_mb=1)


def test_programs_are_right_if_their_tests_pass(code: Reward) -> None:
    right = "def add(a, b):\n    print('noise' * 1000)\n    return a + b"
    answers = [
        program(right),
        program("def add(a, b):\n    return a - b"),
        program("broken ("),
        "no code",
        program(right) + program("x = 1"),
        program("import sys\nsys.exit(0)"),
        program("import os\nos._exit(0)"),
    ]
    assert code(answers, ["assert add(1, 2) == 3"] * 7) == [1, 0, 0, 0, 0, 0, 0]
    assert code.errors == 0


@pytest.mark.parametrize(
    "attack",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "x = bytearray(2**30)",
        "open('big', 'wb').write(bytes(2**22))",
        "assert __import__('os').environ.get('MIFO_SECRET')",
    ],
)
def test_limits_hold(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIFO_SECRET", "token")
    reward = CodeReward(timeout=1.5, memory_mb=256, file_mb=1)
    begin = time.monotonic()
    assert reward([program(attack)], ["pass"]) == [0]
    assert time.monotonic() - begin < 10


@pytest.mark.skipif(os.geteuid() == 0, reason="limits on processes do not hold for root")
def test_a_program_starts_no_further_process(code: Reward) -> None:
    assert code([program("import os\nos.fork()")], ["pass"]) == [0]


def test_nothing_of_a_program_is_left(tmp_path: Path) -> None:
    reward = CodeReward(timeout=1.0)
    marker = tmp_path / "place"
    attack = f"import os, time\nopen({str(marker)!r}, 'w').write(os.getcwd())\nopen('junk', 'w')\ntime.sleep(60)"
    assert reward([program(attack)], ["pass"]) == [0]
    assert not Path(marker.read_text()).exists()


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ("72", "ground truth is '72', which tests nothing"),
        ('["assert f(1) == 2"]', "which tests nothing"),
        ('{"inputs": ["1"], "outputs": ["2"]}', "which tests nothing"),
        ("", "ground truth is '', which tests nothing"),
        ('"doc"\n3', "which tests nothing"),
        ("assert (", "no Python: "),
    ],
)
def test_tests_that_every_program_passes_or_none_are_one_line(code: Reward, truth: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        WeightedRewards({"tests": code}).check_truth(truth, {})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_limits_that_a_program_that_does_nothing_breaks_are_one_line() -> None:
    with pytest.raises(InputError, match=r"a program that does nothing fails here under timeout 5, RLIMIT_AS 10485"):
        CodeReward(memory_mb=1)([program("x = 1")], ["assert x == 1"])
    with pytest.raises(InputError, match=r"memory_mb is 512\.0, allowed is a whole number above 0"):
        CodeReward(memory_mb=512.0)  # type: ignore[arg-type]


def test_senseless_limits_of_programs_are_refused() -> None:
    with pytest.raises(InputError, match="memory_mb is 0"):
        CodeReward(memory_mb=0)
