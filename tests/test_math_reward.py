"""MathReward: verdicts, and limits and accidents of its grading process."""

import copy
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import alive, children, linux, within

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.math_reward import MathReward
from mifo_lightning.rewards.scoring import score

HANGS = r"\boxed{9^{9^{9^{9}}}}"  # one C call that holds the interpreter for hours
DATA = Path(os.environ.get("MIFO_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def shared() -> Iterator[MathReward]:
    reward = MathReward(timeout=20.0)
    yield reward
    reward.close()


@pytest.fixture
def new_children() -> Callable[[], set[int]]:
    """The children of this process that have come since the test began."""
    before = set(children(os.getpid()))
    return lambda: set(children(os.getpid())) - before


@pytest.fixture
def short() -> Iterator[MathReward]:
    """A reward of its own with a time limit that hangs reach soon."""
    reward = MathReward(timeout=1.0)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("72", "72", 1),
        ("72", "73", 0),
        ("72", "72.0", 1),
        ("025", "25", 1),
        ("142.0", "142", 1),
        ("1000", "1,000", 1),
        ("72", r"\$72", 1),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", 1),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi)", 0),
        (r"3\sqrt{13}", r"\sqrt{117}", 1),
        (r"3\sqrt{13}", "13", 0),
        ("$2n-2$", "2(n-1)", 1),
        (r"90^\circ", "90", 1),
        (r"\text{Evelyn}", "Evelyn", 1),
        (r"\text{Evelyn}", r"\text{Eva}", 0),
        ("4.5e33", r"4.5 \times 10^{33}", 1),
        ("4.5e33", r"4.5 \times 10^{32}", 0),
        ("4.5e33", "4.5e33", 1),
        ("1e-5", r"10^{-5}", 1),
    ],
)
def test_verdicts_of_math_verify(shared: MathReward, truth: str, answer: str, expected: float) -> None:
    assert shared([f"So it is \\boxed{{{answer}}}."], [truth]) == [expected]


def test_only_the_text_after_the_last_think_tag_is_graded(shared: MathReward) -> None:
    thought = r"<think>\boxed{1}</think> or rather </think>\boxed{2}"
    assert shared([thought, thought], ["1", "2"]) == [0, 1]
    assert shared([r"\boxed{1} and no thought at all"], ["1"]) == [1], "no marker, no thought: the whole text"
    whole = MathReward(answer_after=None)
    try:
        assert whole([r"\boxed{1}</think>nothing here"], ["1"]) == [1]
    finally:
        whole.close()


def test_a_batch_keeps_its_order(shared: MathReward) -> None:
    draw = random.Random(0)
    truths = [str(draw.randrange(4)) for _ in range(60)]
    answers = [str(draw.randrange(4)) for _ in truths]
    expected = [float(a == t) for a, t in zip(answers, truths, strict=True)]
    assert shared([f"\\boxed{{{a}}}" for a in answers], truths) == expected
    assert shared([], []) == []
    with pytest.raises(ValueError, match="zip"):
        shared(["1", "2"], ["1"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00",
        "\ud800 half a character",
        "答案是 🦆 \u202e",
        "\\boxed{",
        "\\boxed{" * 3000,
        "$" * 20_000,
        "1" * 30_000,
        "(" * 20_000,
        "the answer is " * 70_000,
    ],
    ids=lambda text: f"{text[:8]!r} x {len(text)}",
)
def test_hostile_text_is_wrong_and_harmless(shared: MathReward, text: str) -> None:
    assert shared([text, r"\boxed{72}"], ["72", "72"]) == [0, 1]


def test_long_and_foreign_text_around_the_answer_is_no_hindrance(shared: MathReward) -> None:
    assert shared(["思考🦆 then $x_1 + 3 = 7$, " * 4000 + r"\boxed{72}"], ["72"]) == [1]


@linux
def test_a_hanging_check_is_killed_and_the_next_ones_work(
    short: MathReward, new_children: Callable[[], set[int]]
) -> None:
    short([r"\boxed{1}"], ["1"])
    (first,) = new_children()
    begin = time.monotonic()
    assert short([HANGS, r"\boxed{1}", HANGS, r"\boxed{2}"], ["1"] * 4) == [0, 1, 0, 0]
    assert time.monotonic() - begin < 10
    assert (short.timeouts, short.errors) == (2, 0)
    assert first not in new_children(), "killed and reaped"
    assert len(new_children()) == 1


def test_exceptions_are_wrong_and_counted(short: MathReward, caplog: pytest.LogCaptureFixture) -> None:
    assert short([r"\boxed{1}", r"\boxed{x=1}", r"\boxed{1}"], ["", r"\frac{0}{0}", "1"]) == [0, 0, 1]
    assert (short.errors, short.timeouts) == (2, 0)
    assert "cannot be read" in caplog.text


@linux
def test_a_child_that_dies_is_replaced(new_children: Callable[[], set[int]]) -> None:
    reward = MathReward(timeout=60)
    try:
        reward([r"\boxed{1}"], ["1"])
        (child,) = new_children()
        os.kill(child, signal.SIGKILL)
        assert within(5, lambda: not alive(child))
        assert reward([r"\boxed{1}"], ["1"]) == [1]
        assert reward.errors == 0, "it died between checks: no check is to blame"

        (child,) = new_children()
        threading.Timer(0.3, os.kill, (child, signal.SIGKILL)).start()
        assert reward([HANGS, r"\boxed{1}"], ["1", "1"]) == [0, 1]
        assert (reward.errors, reward.timeouts) == (1, 0)
    finally:
        reward.close()


def test_an_interrupted_check_does_not_shift_the_answers() -> None:
    reward = MathReward(timeout=60)
    # a process started in the background by a shell ignores the signal unless told otherwise
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert reward([r"\boxed{1}"], ["1"]) == [1]
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            reward([HANGS], ["1"])
        assert reward([r"\boxed{1}", r"\boxed{2}", r"\boxed{1}"], ["1"] * 3) == [1, 0, 1]
    finally:
        signal.signal(signal.SIGINT, before)
        reward.close()


def test_threads_take_turns_and_limits_hold_off_the_main_thread(short: MathReward) -> None:
    results: dict[int, list[float]] = {}

    def grade(number: int) -> None:
        responses = [r"\boxed{1}"] * 20 + [HANGS] + [r"\boxed{2}"] * 20
        results[number] = short(responses, [str(number)] * 41)

    threads = [threading.Thread(target=grade, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1: [1.0] * 20 + [0.0] * 21, 2: [0.0] * 21 + [1.0] * 20}
    assert (short.timeouts, short.errors) == (2, 0)


@linux
def test_close_leaves_no_process_and_may_be_repeated(new_children: Callable[[], set[int]]) -> None:
    reward = MathReward()
    assert not new_children(), "the child starts with the first check"
    reward.close()
    assert reward([r"\boxed{1}"], ["1"]) == [1]
    assert len(new_children()) == 1
    for _ in range(2):
        reward.close()
        assert not new_children()
    assert reward([r"\boxed{1}"], ["1"]) == [1], "a check after close starts a new child"
    del reward
    assert not new_children(), "a forgotten reward takes its child along"


@linux
@pytest.mark.parametrize("check", [r"\boxed{1}", HANGS], ids=["idle", "hanging"])
def test_the_child_dies_with_its_parent(check: str) -> None:
    # No `if __name__ == "__main__"`: the child must not run the parent's program again.
    program = (
        "from mifo_lightning.rewards.math_reward import MathReward\n"
        "import sys, time\n"
        "reward = MathReward(timeout=1.0)\n"
        "reward(['1'], ['1'])\n"
        "print('started', flush=True)\n"
        "reward([sys.argv[1]], ['1'])\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", program, check], stdout=subprocess.PIPE, text=True, env=environment
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        (child,) = children(parent.pid)
        time.sleep(0.3)
        parent.kill()
    assert within(10, lambda: not alive(child))


def test_the_child_imports_nothing_heavy() -> None:
    program = "import sys, mifo_lightning.rewards.math_grader as _; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "math_verify" in done.stdout.split()
    assert not {"torch", "lightning", "transformers", "numpy"} & set(done.stdout.split())


def test_copies_work_on_their_own(shared: MathReward) -> None:
    shared([r"\boxed{1}"], ["1"])
    for twin in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        try:
            assert twin([r"</think>\boxed{1}"], ["1"]) == [1]
            assert twin.timeout == shared.timeout
        finally:
            twin.close()
    assert shared([r"\boxed{1}"], ["1"]) == [1]


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan])
def test_a_senseless_time_limit_is_refused(timeout: float) -> None:
    with pytest.raises(InputError, match="timeout"):
        MathReward(timeout=timeout)


@pytest.mark.skipif(not (DATA / "benchmarks.parquet").exists(), reason="the benchmark file is not here")
def test_boxed_ground_truths_of_the_benchmarks_are_right(shared: MathReward) -> None:
    from mifo_lightning.data.rows import read_rows

    # A sixth of them, to save time: all 1153 were right.
    rows = read_rows(DATA / "benchmarks.parquet")
    truths = sorted({row["reward_model"]["ground_truth"] for row in rows})[::6]
    scores = shared([f"\\boxed{{{truth}}}" for truth in truths], truths)
    assert [truth for truth, value in zip(truths, scores, strict=True) if value != 1] == []


def test_a_grader_that_cannot_start_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mifo_lightning.rewards.math_reward.GRADER", "mifo_lightning.no_such_module")
    with pytest.raises(InputError, match="does not start"):
        score(MathReward(), [r"\boxed{1}"], ["1"])
