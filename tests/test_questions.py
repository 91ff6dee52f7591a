"""Rows become questions: what the model reads, what is dropped, what becomes of demonstrations."""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from question_rows import CHAT, THINKING, TOKENIZER, build, make_tokenizer, one, row
from rich.console import Console
from transformers import ByT5Tokenizer

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.rows import read_rows
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rewards.math_reward import MathReward

DATA = Path(os.environ.get("MIFO_DATA", Path(__file__).parents[2] / "shared" / "data"))


class Graded(Reward):
    """The number that the response ends with, after `>`; keeps what it was asked."""

    isolate = False

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        self.seen += zip(responses, truths, strict=True)
        return [float(response.rpartition(">")[2]) for response in responses]


def test_the_prompt_is_the_template_and_nothing_else() -> None:
    question = one([row("2+2?", system="Be brief.")])
    assert question.text == ("<|start|>system\nBe brief.<|eos|>\n<|start|>user\n2+2?<|eos|>\n<|start|>assistant\n")
    assert TOKENIZER.decode(question.prompt) == question.text
    assert (question.id, question.source, question.truth) == (0, "sums", "4")
    assert (question.demonstration, question.answer_start) == (None, None)


def test_no_special_token_is_added_to_the_template() -> None:
    tokenizer = ByT5Tokenizer()  # would append an end-of-sequence token
    question = one([row()], tokenizer, chat_template=CHAT)
    assert question.prompt == list(tokenizer(question.text, add_special_tokens=False)["input_ids"])
    assert question.prompt[-1] != tokenizer.eos_token_id


def test_the_system_prompt_replaces_or_is_put_first() -> None:
    for system in ("", "Be brief."):
        rows = [row("2+2?", system=system)]
        before = json.dumps(rows)
        assert one(rows, system_prompt="Think.").text.startswith("<|start|>system\nThink.<|eos|>\n<|start|>user\n2+2?")
        assert json.dumps(rows) == before, "the rows stay as they are"
    assert one([row(system="Be brief.")]).text.startswith("<|start|>system\nBe brief.")
    assert one([row()]).text.startswith("<|start|>user")


def test_a_configured_template_takes_the_place_of_the_tokenizers() -> None:
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert one([row("123+456=")], chat_template=bare).text == "123+456="
    assert one([row("123+456=")], make_tokenizer(chat_template=None), chat_template=bare).text == "123+456="


def test_ids_are_positions_after_the_filters_and_order_is_kept() -> None:
    lengths = [3, 900, 1, 0, 20, 900, 7]
    questions, drops = build([row("9" * n, truth=str(n)) for n in lengths], max_prompt_tokens=400)
    assert [question.truth for question in questions] == ["3", "1", "20", "7"]
    assert [question.id for question in questions] == [0, 1, 2, 3]
    assert drops.by_reason() == {"empty prompt": 1, "prompt too long": 2}


def test_a_prompt_of_exactly_the_limit_is_kept() -> None:
    length = len(one([row("how many?")]).prompt)
    assert len(build([row("how many?")], max_prompt_tokens=length)[0]) == 1
    with pytest.raises(InputError, match="no question left of 1"):
        build([row("how many?")], max_prompt_tokens=length - 1)


@pytest.mark.parametrize(
    "messages", [[], [("user", " \n")], [("system", "Be brief.")], [("system", "Hi"), ("user", "")]]
)
def test_prompts_without_a_question_are_empty(messages: list[tuple[str, str]]) -> None:
    empty = row() | {"prompt": [{"role": role, "content": content} for role, content in messages]}
    questions, drops = build([empty, row()], system_prompt="Think.")
    assert len(questions) == 1
    assert drops.by_reason() == {"empty prompt": 1}


@pytest.mark.parametrize("solution", ["907050>4", "> 4\n", "4", "思考 🦆 >4", ">4" * 300])
def test_a_demonstration_is_its_text_and_one_end_of_sequence(solution: str) -> None:
    for text in (solution, solution + "<|eos|>", solution + "<|eos|>\n"):
        ids = one([row(solution=text)]).demonstration
        assert ids is not None
        assert TOKENIZER.decode(ids) == solution + "<|eos|>"
        assert ids.count(TOKENIZER.eos_token_id) == 1
        assert ids[-1] == TOKENIZER.eos_token_id


@pytest.mark.parametrize("tokenizer", [TOKENIZER, ByT5Tokenizer()], ids=["with positions", "without"])
@pytest.mark.parametrize("marker", [">", "</think>", "####", "答"])
def test_the_answer_starts_right_after_the_last_marker(tokenizer: Any, marker: str) -> None:
    draw = random.Random(0)
    rows, answers = [], []
    for i in range(40):
        head = "".join(draw.choices(["<think>\n", "we add ", "12 ", "🦆", "é", marker], k=draw.randrange(6)))
        answers.append(draw.choice(["", "\n\n"]) + "".join(draw.choices(["\\boxed{12}", " 7", "é", "🦆"], k=2)))
        rows.append(row(f"{i}+2?", truth="", solution=head + marker + answers[-1]))
    questions, _ = build(rows, tokenizer, chat_template=CHAT, answer_after=marker, verify_demonstrations=False)
    for question, answer in zip(questions, answers, strict=True):
        assert question.demonstration is not None
        assert question.answer_start is not None
        ids = question.demonstration[:-1]
        tail = tokenizer.decode(ids[question.answer_start :], clean_up_tokenization_spaces=False)
        # A token may straddle the marker's edge: the whole answer is covered, by no token more than needed.
        assert tail.endswith(answer)
        after = tokenizer.decode(ids[question.answer_start + 1 :], clean_up_tokenization_spaces=False)
        assert not after.endswith(answer)


def test_no_marker_no_answer_start() -> None:
    options = {"verify_demonstrations": False, "answer_after": "</think>"}
    assert one([row(solution="just 4")], **options).answer_start is None
    assert one([row(solution="<think></think>4")], **(options | {"answer_after": None})).answer_start is None
    nothing_after = one([row(solution="<think>4</think>")], **options)
    assert nothing_after.demonstration is not None
    assert nothing_after.answer_start == len(nothing_after.demonstration) - 1, "only the end is left"


@pytest.mark.parametrize(
    "solution", ["<think>\nsum</think>4", "<think>sum</think>4", "\n<think>\nsum</think>4", "sum</think>4"]
)
def test_a_thought_that_the_prompt_opens_is_not_opened_twice(solution: str) -> None:
    options: dict[str, Any] = {"answer_after": "</think>", "reward": LastAnswerReward("</think>")}
    opened = one([row(solution=solution)], chat_template=THINKING, **options)
    assert opened.demonstration is not None
    assert opened.text + str(TOKENIZER.decode(opened.demonstration)) == (
        "<|start|>user\n2+2?<|eos|>\n<|start|>assistant\n<think>\nsum</think>4<|eos|>"
    )
    closed = THINKING.replace("<think>\n", "<think>\n\n</think>\n")
    for template in (None, closed):
        ids = one([row(solution=solution)], chat_template=template, **options).demonstration
        assert ids is not None
        assert TOKENIZER.decode(ids) == solution + "<|eos|>"


def test_long_demonstrations_go_and_the_question_stays() -> None:
    solution = "12 " * 40 + ">4"
    length = len(one([row(solution=solution)]).demonstration or [])
    assert one([row(solution=solution)], max_response_tokens=length).demonstration is not None
    questions, drops = build([row(solution=solution)], max_response_tokens=length - 1)
    assert [question.demonstration for question in questions] == [None]
    assert drops.by_reason() == {"demonstration too long": 1}


def test_demonstrations_are_verified_as_rollouts_are() -> None:
    reward = Graded()
    rows = [row(truth=f"t{n}", solution=text) for n, text in enumerate([">1.0<|eos|>", ">0.5", ">?", ">0.7", None])]
    questions, drops = build(rows, reward=reward, success_threshold=0.7)
    assert [question.demonstration is not None for question in questions] == [True, False, False, True, False]
    assert drops.by_reason() == {"demonstration wrong": 2}
    assert set(reward.seen) == {(">1.0", "t0"), (">0.5", "t1"), (">?", "t2"), (">0.7", "t3")}
    assert reward.errors == 1
    assert [question.answer_start is not None for question in questions] == [True, False, False, True, False]

    unasked = Graded()
    questions, drops = build(rows, reward=unasked, verify_demonstrations=False)
    assert sum(question.demonstration is not None for question in questions) == 4
    assert (unasked.seen, drops.by_reason()) == ([], {})


def test_that_no_demonstration_can_be_right_is_said(recwarn: pytest.WarningsRecorder) -> None:
    """As with a reward that never gives 1: all would be gone, and the threshold not be suspected."""
    rows = [row(solution=text) for text in (">0.5", ">0.9", None)]
    build(rows, reward=Graded(), success_threshold=0.9)
    assert not recwarn
    with pytest.warns(
        UserWarning, match=r"none of 2 demonstrations is right: the highest score is 0\.9, model\.rollout"
    ):
        build(rows, reward=Graded(), success_threshold=1.0)
    build([row(solution=None)], reward=Graded())
    assert not recwarn


def test_what_is_dropped_for_its_length_is_not_verified() -> None:
    reward = Graded()
    build([row(solution="1" * 900), row(solution="1")], reward=reward, max_response_tokens=100)
    build([row("2" * 900, solution="1"), row()], reward=reward, max_prompt_tokens=100)
    assert [response for response, _ in reward.seen] == ["1"]


def test_every_row_is_accounted_for_by_source_and_reason() -> None:
    kinds = {
        "kept": {"solution": ">4"},
        "no demonstration": {},
        "empty prompt": {"question": " ", "solution": ">4"},
        "prompt too long": {"question": "2" * 900, "solution": ">4"},
        "demonstration empty": {"solution": " <|eos|>"},
        "demonstration too long": {"solution": "2" * 900 + ">4"},
        "demonstration wrong": {"solution": ">5"},
    }
    draw = random.Random(3)
    plan = [(draw.choice(["sums", "hard", "odd"]), draw.choice(list(kinds))) for _ in range(120)]
    rows = [row(source=source, **kinds[kind]) for source, kind in plan]
    questions, drops = build(rows, max_prompt_tokens=500, max_response_tokens=500)
    expected = Counter(plan)
    for source in ("sums", "hard", "odd"):
        for reason in list(kinds)[2:]:
            assert drops.dropped[source, reason] == expected[source, reason]
        mine = [question for question in questions if question.source == source]
        lost = expected[source, "empty prompt"] + expected[source, "prompt too long"]
        assert drops.rows[source] == sum(count for (name, _), count in expected.items() if name == source)
        assert drops.questions[source] == len(mine) == drops.rows[source] - lost
        assert drops.demonstrations[source] == sum(bool(question.demonstration) for question in mine)
        assert drops.demonstrations[source] == expected[source, "kept"]


def test_the_table_shows_each_source_and_only_reasons_that_occurred(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row(solution=">4")] * 3 + [row(solution=">5", source="hard")] * 2 + [row("2" * 900, source="hard")]
    _, drops = build(rows, max_prompt_tokens=500)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(drops.table())
    text = captured.get()
    assert "data.train" in text
    assert "demonstration wrong" in text
    assert "empty" not in text
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if "│" in line}
    assert [int(cell) for cell in cells["sums"]] == [3, 0, 0, 3, 3]
    assert [int(cell) for cell in cells["hard"]] == [3, 1, 2, 2, 0]
    drops.print()
    assert "hard" in capsys.readouterr().out


def test_a_tokenizer_without_an_end_token() -> None:
    with pytest.raises(InputError, match=r"^data\.train: tokenizer .* has no eos_token; set it"):
        build([row()], make_tokenizer(eos_token=None))


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(
        InputError, match=r"^data\.train: tokenizer .* has no chat template; set data.prompts.chat_template"
    ):
        build([row()], make_tokenizer(chat_template=None))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{% for m in messages %}",
        "{{ messages[7]['content'].x.y }}",
    ],
)
def test_a_template_that_fails_names_the_row(template: str) -> None:
    only_system = "{% if messages[0]['role'] == 'system' %}" + template + "{% endif %}{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match=r"^data\.train, row [12]: the chat template refuses the prompt: .+"):
        build([row(), row(system="Be brief.")], chat_template=only_system)


def test_no_question_left_says_why() -> None:
    rows = [row(" "), row("2" * 900), row("3" * 900)]
    with pytest.raises(
        InputError,
        match=r"^data\.train: no question left of 3 \(empty prompt 1, prompt too long 2\); .*is 100",
    ):
        build(rows, max_prompt_tokens=100)
    with pytest.raises(InputError, match="no question left of 0"):
        build([])


def test_more_demonstrations_than_one_chunk_keep_their_questions() -> None:
    rows = [row(truth=str(n), solution=f"{n * 7}>{n}") for n in range(1100)]
    for question in build(rows)[0]:
        assert question.demonstration is not None
        assert question.answer_start is not None
        answer = TOKENIZER.decode(question.demonstration[question.answer_start :])
        assert answer == f"{question.truth}<|eos|>"


@pytest.mark.skipif(not (DATA / "gsm8k_train.parquet").exists(), reason="the GSM8K file is not here")
def test_the_solutions_of_gsm8k_are_verified_in_reasonable_time() -> None:
    rows = read_rows(DATA / "gsm8k_train.parquet")[::10]
    wrong = {3, 400, 740}
    for number in wrong:
        rows[number]["reward_model"]["ground_truth"] += "1"
    reward = MathReward(timeout=20.0)
    begin = time.monotonic()
    try:
        questions, drops = build(rows, reward=reward, answer_after="</think>", max_response_tokens=10_000)
    finally:
        reward.close()
    assert time.monotonic() - begin < 15
    assert drops.by_reason() == {"demonstration wrong": len(wrong)}
    assert {question.id for question in questions if question.demonstration is None} == wrong
