"""The handler of signals alone, and what ranks say to one another: small programs that train nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from small_grid import ROOT

from mifo_lightning.checkpoints import interruption
from mifo_lightning.checkpoints.interruption import last_line
from mifo_lightning.checkpoints.safe_points import agree
from mifo_lightning.common.errors import Interrupted
from mifo_lightning.rewards.function import FunctionReward
from mifo_lightning.rewards.grading import FailureWatch

LIGHT = """
import os, signal, sys, time
from mifo_lightning.checkpoints import interruption
interruption.install()
with interruption.handled(["fit"]):
    {body}
"""


def light(body: str, setup: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    program = LIGHT.format(body=body.replace("\n", "\n    "))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, preexec_fn=setup)


def test_a_second_signal_ends_at_once_but_one_request_may_come_twice() -> None:
    twice = "interruption.defer()\nfor pause in (0, 0.1, 1.2):\n    time.sleep(pause)\n    print(pause, flush=True)\n"
    ended = light(twice + "    os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)")
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (143, ["0", "0.1", "1.2"], "")


def test_ranks_that_wait_for_one_that_has_failed_are_ended() -> None:
    ended = light(
        "import subprocess, types\nother = subprocess.Popen(['sleep', '60'])\n"
        "interruption.follow(types.SimpleNamespace(procs=[other]))\ntry:\n"
        "    with interruption.handled(['fit']):\n        raise ValueError\n"
        "except ValueError:\n    print(other.wait(5))"
    )
    assert ended.stdout == "-9\n"


def test_what_the_starter_has_ignored_stays_ignored() -> None:
    ended = light(
        "os.kill(os.getpid(), signal.SIGHUP)\nprint('goes on')",
        setup=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # type: ignore[arg-type,return-value]
    )
    assert (ended.returncode, ended.stdout) == (0, "goes on\n")


def test_nothing_heavy_is_imported_before_signals_are_ours() -> None:
    ended = light("print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))")
    assert ended.stdout == "[]\n"


def test_the_command_that_goes_on_names_the_new_checkpoint_alone() -> None:
    stop = Interrupted(signal.SIGTERM)
    stop.step, stop.checkpoint = 7, "runs/a b/last.ckpt"
    for earlier in (["--ckpt_path", "old.ckpt"], ["--ckpt_path=old.ckpt"], ["--resume"]):
        line = last_line(stop, ["fit", *earlier, "--config", "x.yaml"])
        assert line.endswith("python -m mifo_lightning fit --config x.yaml --ckpt_path 'runs/a b/last.ckpt'")


@pytest.mark.parametrize("after_a_fit", [False, True])
def test_handlers_are_given_back(after_a_fit: bool) -> None:
    """A fit in this process that nobody took signals over for has deferred them: that is not for the next one."""
    if after_a_fit:
        interruption.defer()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as ended, interruption.noted():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert interruption.pending() is None


BLOCKED = """
import socket, sys
from mifo_lightning.checkpoints import interruption
interruption.install()
interruption.defer()
interruption._watch.patience = 1.0
import torch.distributed as dist
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
print("waiting", flush=True)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
"""


def test_a_process_that_waits_for_a_rank_that_is_gone_can_be_ended() -> None:
    """It sits in a C call, in which no handler of Python runs."""
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == "waiting\n"
        time.sleep(2)
        it.send_signal(signal.SIGTERM)
        try:
            _, errors = it.communicate(timeout=30)
        finally:
            it.kill()
    assert it.returncode == 143
    assert errors.count("interrupted by SIGTERM: nothing has come back") == 1


ALONE = """
import os, subprocess, sys, time
from mifo_lightning.checkpoints import interruption
from mifo_lightning.common.errors import Interrupted
with interruption.handled(["fit"]):
    if "LOCAL_RANK" in os.environ:
        raise Interrupted(15)
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[1]], env={**os.environ, "LOCAL_RANK": "1"}, check=True)
    time.sleep(20)
"""


def test_a_rank_that_is_stopped_alone_tells_the_one_that_waits_for_it() -> None:
    """Before the ranks have met, as in the checks of the input."""
    ended = subprocess.run([sys.executable, "-c", ALONE, ALONE], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 143, ended.stderr
    assert ended.stderr.count("interrupted by SIGTERM: nothing was trained") == 1


def test_a_rank_that_has_met_no_other_does_not_speak_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for local_rank, together in (("0", True), ("1", False)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        interruption.request(signal.SIGTERM)
        watch = FailureWatch(FunctionReward("own_rewards.obey", isolate=False))
        try:
            for stops in (lambda: agree(torch.device("cpu")), lambda w=watch: w.end(1, "demonstrations")):
                with pytest.raises(Interrupted) as stopped:
                    stops()
                assert stopped.value.together is together
        finally:
            interruption.forget()


ORPHAN = """
import os, subprocess, sys
from mifo_lightning.checkpoints import interruption
interruption.PATIENCE = 0.5
if "LOCAL_RANK" in os.environ:
    interruption.install()
    print(os.getpid(), flush=True)
    while True:
        pass
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[1]], env={**os.environ, "LOCAL_RANK": "1"})
rank.wait()
"""


def test_a_rank_whose_first_is_killed_ends_too() -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, ORPHAN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    second = int(first.stdout.readline())
    first.kill()
    try:
        _, errors = first.communicate(timeout=30)  # until the other one has closed them too
    finally:
        with suppress(ProcessLookupError):
            os.kill(second, signal.SIGKILL)
    assert errors == "error: the first rank is gone; this one ends too\n"
