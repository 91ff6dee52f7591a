"""User code as a reward: it hangs, exits, crashes, prints and meddles, and the run goes on or stops with one line."""

import copy
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import own_rewards
import pytest
import torch
from own_rewards import Remembering, obey
from processes import alive, linux, within

from mifo_lightning.checkpoints import interruption
from mifo_lightning.common.errors import InputError, Interrupted
from mifo_lightning.common.question import Question
from mifo_lightning.rewards import isolation
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.function import FunctionReward
from mifo_lightning.rewards.grading import FailureWatch, grade_answers, sum_up
from mifo_lightning.rewards.scoring import score
from mifo_lightning.rewards.weighted import FormatReward, WeightedRewards


@pytest.fixture
def reward() -> Iterator[FunctionReward]:
    """Runs `obey` in a child, with a limit that hangs reach soon."""
    made = FunctionReward(obey, timeout=2.0)
    yield made
    isolation.release(made)


def graded(reward: Reward, *responses: str) -> list[float]:
    return score(reward, list(responses), [""] * len(responses))


@pytest.mark.parametrize(
    ("deed", "timeouts", "said"),
    [
        ("hang", 1, "took more than 1 s"),
        ("spin", 1, "took more than 1 s"),
        ("exit 0", 0, "SystemExit: 0"),
        ("vanish 0", 0, "its process ended with status 0"),
        ("interrupt", 0, "KeyboardInterrupt"),
        ("leave", 0, "GeneratorExit"),
        ("mute", 0, "Mute"),
        ("crash", 0, "its process was killed by signal 11"),
        ("kill", 0, "its process was killed by signal 9"),
        ("close", 0, "its process"),
        ("orphan", 0, "its process ended with status 7"),
    ],
)
def test_a_deed_costs_its_response_alone(
    reward: FunctionReward, deed: str, timeouts: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    begin = time.monotonic()
    assert graded(reward, "0.25", deed, "1") == [0.25, 0, 1]
    assert time.monotonic() - begin < 20
    assert (reward.timeouts, reward.errors) == (timeouts, 1 - timeouts)
    assert [said in record.getMessage() for record in caplog.records] == [True], "one line, with the cause"
    assert graded(reward, "0.5") == [0.5], "and the next call has a child again"


def test_where_everything_hangs_a_call_takes_twice_its_limit(reward: FunctionReward) -> None:
    reward.call_timeout = 0.5
    begin = time.monotonic()
    assert graded(reward, *["hang"] * 40) == [0] * 40
    assert time.monotonic() - begin < 10
    assert (reward.timeouts, reward.errors) == (40, 0)


@pytest.mark.parametrize("deed", ["vanish 0", "hang"])
def test_a_reward_whose_every_check_ends_its_process_stops_the_run(deed: str, reward: FunctionReward) -> None:
    reward.call_timeout = 0.5
    watch = FailureWatch(reward)
    graded(reward, deed, deed)
    with pytest.raises(InputError, match="every check of FunctionReward failed, 2 of responses; the first cause"):
        watch.end(2, "responses")


def test_what_the_reward_refuses_stops_the_run(reward: FunctionReward) -> None:
    with pytest.raises(InputError, match="the server's address is not set"):
        graded(reward, "refuse", "1")


def test_printing_megabytes_disturbs_nothing(reward: FunctionReward, capfd: pytest.CaptureFixture[str]) -> None:
    assert graded(reward, "print", "0.5") == [1, 0.5]
    assert len(capfd.readouterr().out) >= 2**21, "it goes where the run prints"


def test_coroutines_that_block_or_vanish_cost_their_responses_alone() -> None:
    reward = FunctionReward(own_rewards.obey_later, timeout=1.0)
    assert graded(reward, "sleep", "0.5", "1") == [0, 0.5, 1]
    assert graded(reward, "0.5", "vanish 0", "1") == [0.5, 0, 1]
    assert (reward.timeouts, reward.errors) == (1, 1)
    assert graded(reward, "hang", "0.5") == [0, 0.5], "the loop stands still; it is repeated one by one"
    isolation.release(reward)


def test_what_it_changes_or_keeps_is_a_copy() -> None:
    questions = [Question(0, "a", "1+1=", [1], "2", columns={"level": 3})]
    for isolate in (True, False):
        reward = FunctionReward(own_rewards.meddle, isolate=isolate)
        texts, lengths = ["2"], [5]
        assert grade_answers(reward, questions, texts, lengths).rewards == [1]
        assert (texts, lengths, questions[0].columns) == (["2"], [5], {"level": 3})
        isolation.release(reward)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (torch.tensor([0.5, 1.0], requires_grad=True), [0.5, 1]),
        ([torch.tensor(0.5, requires_grad=True), True], [0.5, 1]),
        ((x for x in (0.5, 1)), [0.5, 1]),
        ("10", "returned '10', allowed is a list of numbers"),
        ({0.5: 1, 1: 1}, "returned {0.5: 1, 1: 1}, allowed is a list of numbers"),
        ({0.5, 1}, "allowed is a list of numbers"),
        (0.5, "returned 0.5, allowed is a list of numbers"),
        (None, "returned None, allowed is a list of numbers"),
        (iter(int, 1), "returned more values for 1 responses"),
        (["0.5", b"1"], "not a finite number: returned '0.5'"),
    ],
    ids=lambda value: f"{value!r:.12}",
)
@pytest.mark.filterwarnings("error:.*requires_grad.*")
def test_what_is_no_list_of_numbers_is_one_clear_line(
    result: Any, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reward = FunctionReward(lambda responses: result, isolate=False)
    values = graded(reward, "a", "b")
    if isinstance(expected, list):
        assert values == expected
        assert not caplog.records
        return
    assert values == [0, 0]
    assert expected in caplog.records[0].getMessage()
    assert len(caplog.records) <= 2


def test_a_subclass_keeps_state_in_its_child_and_tells_parts_and_failures(tmp_path: Path) -> None:
    reward = Remembering(str(tmp_path))
    assert graded(reward, "1", "own") == [1, -1]
    assert (reward.components, reward.errors, reward.first_problem) == (
        {"calls": [1, 1], "bonus": [0, 0]},
        1,
        "Own: by itself",
    )
    reward.bonus = 0.5
    assert graded(reward, "0") == [0]
    assert reward.components == {"calls": [2], "bonus": [0.5]}, "what is assigned here reaches the child"
    assert graded(reward, "0", "all") == [0, -1]
    assert reward.components == {"calls": [4, -1], "bonus": [0.5, -1]}, "a component for each response"
    assert reward.calls == 0, "the state is the child's"
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert graded(twin, "0") == [0]
        assert twin.components["calls"] == [1], "a copy has a child of its own"
        isolation.release(twin)
    isolation.release(reward)
    closed = {int(path.name) for path in tmp_path.iterdir()}
    assert len(closed) == 3
    assert os.getpid() not in closed, "closed where it was called"


def test_a_reward_of_a_sum_is_isolated_and_counted_by_itself() -> None:
    reward = WeightedRewards({"own": FunctionReward(obey, timeout=2.0), "form": FormatReward(r"\d|vanish 0")})
    assert graded(reward, "1", "vanish 0") == [2, 1]
    assert reward.components == {"own": [1, 0], "form": [1, 1]}
    assert [part.errors for part in reward.parts] == [1, 0]
    isolation.release(reward)


def test_a_pattern_that_never_ends_costs_its_response_alone() -> None:
    reward = FormatReward("(a|a)*b", timeout=3.0)
    assert graded(reward, "aab", "a" * 40, "ab", "c") == [1, 0, 1, 0]
    assert (reward.timeouts, reward.errors) == (1, 0)
    isolation.release(reward)
    with pytest.raises(InputError, match="FormatReward: timeout is 0, allowed is"):
        FormatReward("a", timeout=0)


def test_what_cannot_be_sent_runs_here_and_says_so_once() -> None:
    def deed(responses: list[str]) -> list[float]:
        sys.exit(0)

    reward = FunctionReward(deed)
    with pytest.warns(UserWarning, match="deed cannot run in a process of its own.*no time limit.*isolate: false"):
        assert graded(reward, "a", "b") == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graded(reward, "a") == [0]
    assert reward.errors == 3, "an exit is a failed check here, too"
    isolation.release(reward)


def test_a_program_s_own_function_is_not_looked_for_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(responses: list[str]) -> list[float]:  # the child's own program has one of that name
        return [float(len(text)) for text in responses]

    serve.__module__, serve.__qualname__ = "__main__", "serve"
    monkeypatch.setattr(sys.modules["__main__"], "serve", serve, raising=False)
    with pytest.warns(UserWarning, match="serve is defined in the program that was started, or in a notebook"):
        assert graded(FunctionReward(serve), "ab") == [2]


def test_isolate_false_is_silent(recwarn: pytest.WarningsRecorder) -> None:
    assert graded(FunctionReward(lambda responses: [float(os.getpid())], isolate=False), "a") == [os.getpid()]
    assert not recwarn.list


def test_a_keyboard_interrupt_is_the_user_s_unless_a_handler_takes_ctrl_c() -> None:
    reward = FunctionReward(obey, isolate=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            graded(reward, "interrupt")
        signal.signal(signal.SIGINT, lambda *_: None)
        assert graded(reward, "interrupt") == [0]
    finally:
        signal.signal(signal.SIGINT, before)


@linux
def test_the_child_ends_with_its_parent() -> None:
    """Also in a C call that never lets go of the interpreter, where no thread of its own would hear of it."""
    program = (
        "import sys, own_rewards\n"
        "from mifo_lightning.rewards.scoring import score\n"
        "from mifo_lightning.rewards.function import FunctionReward\n"
        "reward = FunctionReward(own_rewards.obey, timeout=2.0)\n"
        "print(int(score(reward, ['who'], [''])[0]), flush=True)\n"
        "score(reward, ['spin'], [''])\n"
        "sys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.3)
        assert alive(child)
        assert os.getsid(child) == child, "Ctrl-C in a terminal does not reach it"
        parent.kill()
    assert within(10, lambda: not alive(child))


@linux
def test_signals_leave_the_child_to_its_parent(reward: FunctionReward) -> None:
    (child,) = graded(reward, "who")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(int(child), number)
    assert graded(reward, "who") == [child]
    os.kill(int(child), signal.SIGKILL)
    assert within(5, lambda: not alive(int(child)))
    assert graded(reward, "0.5") == [0.5], "it died between calls: no check is to blame"
    assert reward.errors == 0


def test_a_run_that_is_asked_to_stop_does_not_wait(reward: FunctionReward) -> None:
    reward.call_timeout = 60.0
    graded(reward, "1")
    watch = FailureWatch(reward)
    interruption.request(signal.SIGTERM)
    try:
        begin = time.monotonic()
        graded(reward, *["hang"] * 20)
        assert time.monotonic() - begin < 10
        with pytest.raises(Interrupted) as stop:
            watch.end(20, "responses")
        assert (stop.value.signum, stop.value.together) == (signal.SIGTERM, True)
    finally:
        interruption.forget()


def test_the_child_imports_nothing_heavy() -> None:
    program = (
        "import sys, mifo_lightning.rewards.worker as _, mifo_lightning.rewards.weighted as _; print(*sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "mifo_lightning.rewards.worker" in done.stdout.split()
    assert not {"torch", "lightning", "transformers", "numpy"} & set(done.stdout.split())


def test_each_kind_of_failure_is_printed_once_and_all_are_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    reward = FunctionReward(obey, isolate=False)
    for _ in range(40):
        graded(reward, "raise value", "raise key", "1", "raise value")
    kinds = [record.getMessage().partition(": ")[2].partition(":")[0] for record in caplog.records]
    assert kinds == ["ValueError", "KeyError"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    (line,) = sum_up(reward, "fit")
    expected = "120 of 160 checks of FunctionReward failed and scored 0: 80 x ValueError, 40 x KeyError"
    assert line == f"fit: {expected}"
    assert sum_up(reward, "fit") == [], "each is summed up once"
    assert reward.errors == 120


def test_kinds_without_end_are_not_told_without_end(caplog: pytest.LogCaptureFixture) -> None:
    reward = FunctionReward(obey, isolate=False)
    for i in range(50):
        reward.fail(f"kind {i}: x", "")
    assert len(caplog.records) <= 9
    assert sum(reward.causes.values()) == 50
