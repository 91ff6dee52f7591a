"""Rewards of a user: a file `mine.py` beside the run, with a function or a class."""

import textwrap
from dataclasses import replace
from pathlib import Path

from benchmarks.stress.cases.case import Case, Expected, prepared

FUNCTION = "mifo_lightning.rewards.function.FunctionReward"


def function(
    name: str, body: str, expect: Expected = "refused", flags: str = "", head: str = "", limit: float = 0.0
) -> Case:
    """A plain function `f(responses, truths)` of this body."""
    source = head + "\nimport os, sys, time, threading, signal\nimport torch\n"
    source += "def f(responses, truths, **context):\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n"
    case = module(f"function: {name}", source, f"--reward {FUNCTION} --reward.function mine.f {flags}", expect)
    return replace(case, limit=limit)


def module(name: str, source: str, flags: str, expect: Expected = "refused") -> Case:
    """A module of this source."""

    def prepare(place: Path) -> str:
        (place / "mine.py").write_text(textwrap.dedent(source))
        # demonstrations need not please it
        return f"{flags} --data.demonstrations.verify false"

    return prepared(name, prepare, expect)


def subclass(name: str, body: str, expect: Expected = "refused", flags: str = "") -> Case:
    """A subclass of `Reward` with this body."""
    source = "from mifo_lightning.rewards.base import Reward\nimport os, sys, time\nclass R(Reward):\n"
    return module(
        f"class: {name}", source + textwrap.indent(textwrap.dedent(body), "    "), f"--reward mine.R {flags}", expect
    )


GOOD = "return [float(len(r) % 2) for r in responses]"

REWARDS: list[Case] = [
    function("good", GOOD, "accepted"),
    function(
        "good, numbers of numpy",
        "import numpy as np\nreturn np.array([float(len(r) % 2) for r in responses])",
        "accepted",
    ),
    function("good, a tensor", "return torch.tensor([float(len(r) % 2) for r in responses])", "accepted"),
    function(
        "a tensor with gradient",
        "return torch.tensor([float(len(r) % 2) for r in responses], requires_grad=True)",
        "accepted",
    ),
    function("a generator", "return (float(len(r) % 2) for r in responses)", "accepted"),
    function("whole numbers", "return [len(r) % 2 for r in responses]", "accepted"),
    function("truth values", "return [len(r) % 2 == 0 for r in responses]", "accepted"),
    function("texts of numbers", "return ['1' for r in responses]", "either"),
    function("prints much", "print('x' * 100000)\n" + GOOD, "accepted"),
    function("writes to stderr", "sys.stderr.write('error: not really\\n')\n" + GOOD, "either"),
    function("raises always", "raise ValueError('broken')"),
    function("raises with escapes", "raise ValueError('\\x1b]0;owned\\x07\\x1b[2J')"),
    function("raises with many lines", "raise ValueError('a\\n' * 1000)"),
    function(
        "raises on every second",
        "if len(responses) > 1 or len(responses[0]) % 2: raise ValueError('odd')\nreturn [1.0]",
        "either",
    ),
    function("raises BaseException", "raise BaseException('base')"),
    function("raises KeyboardInterrupt", "raise KeyboardInterrupt"),
    function("raises GeneratorExit", "raise GeneratorExit"),
    function("raises MemoryError", "raise MemoryError"),
    function("raises StopIteration", "raise StopIteration"),
    function("raises RecursionError", "return f(responses, truths)"),
    function(
        "an exception whose text raises", "class E(Exception):\n    def __str__(self): raise ValueError('no')\nraise E"
    ),
    function("asserts", "assert False"),
    function("sys.exit(0)", "sys.exit(0)"),
    function("sys.exit('text')", "sys.exit('ended')"),
    function("os._exit(0)", "os._exit(0)"),
    function("os._exit(3)", "os._exit(3)"),
    function("os.abort", "os.abort()"),
    function("kills itself", "os.kill(os.getpid(), signal.SIGKILL)"),
    function("reads address 0", "import ctypes\nctypes.string_at(0)"),
    function("hangs", "time.sleep(1e6)", limit=1300),  # twice the 600 s of a call unless set
    function("hangs with a limit", "time.sleep(1e6)", flags="--reward.timeout 1"),
    function("hangs in a loop with a limit", "while True: pass", flags="--reward.timeout 1"),
    function(
        "hangs and ignores signals",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True:\n    try: time.sleep(1e6)\n    except: pass",
        flags="--reward.timeout 1",
    ),
    function("leaves a thread behind", "threading.Thread(target=time.sleep, args=(1e6,)).start()\n" + GOOD, "accepted"),
    function("leaves a child behind", "if os.fork() == 0: time.sleep(1e6)\n" + GOOD, "either"),
    function("takes all memory", "return [bytearray(10**11)]"),
    function("fills memory bit by bit", "held = []\nwhile True: held.append(bytearray(10**8))"),
    function("returns None", "return None"),
    function("returns nothing", "return []"),
    function("returns one too few", "return [1.0] * (len(responses) - 1)"),
    function("returns one too many", "return [1.0] * (len(responses) + 1)"),
    function("returns a number", "return 1.0"),
    function("returns a text", "return 'x' * len(responses)"),
    function("returns a dictionary", "return {i: 1.0 for i in range(len(responses))}", "either"),
    function("returns rows of a matrix", "return torch.zeros(len(responses), 2)"),
    function("returns an endless generator", "import itertools\nreturn itertools.repeat(1.0)"),
    function("returns NaN", "return [float('nan')] * len(responses)"),
    function("returns infinity", "return [float('inf')] * len(responses)"),
    function("returns complex numbers", "return [1j] * len(responses)"),
    function("returns huge numbers", "return [10 ** 400] * len(responses)"),
    function("returns 1e308 and -1e308", "return [1e308 * (-1) ** i for i in range(len(responses))]", "either"),
    function("returns None in places", "return [1.0 if i % 2 else None for i in range(len(responses))]", "either"),
    function("clears its lists", "n = len(responses)\nresponses.clear(); truths.clear()\nreturn [1.0] * n", "accepted"),
    function(
        "writes into its lists",
        "responses[:] = ['x'] * len(responses)\nreturn [float(i % 2) for i in range(len(truths))]",
        "accepted",
    ),
    function(
        "writes into its context", "[v.clear() for v in context.values() if isinstance(v, list)]\n" + GOOD, "accepted"
    ),
    function("writes into its rows", "[c.clear() for c in context['columns']]\n" + GOOD, "accepted"),
    function("seeds torch", "torch.manual_seed(0)\n" + GOOD, "accepted"),
    function("sets threads", "torch.set_num_threads(2)\n" + GOOD, "accepted"),
    function("changes the directory", "os.chdir('/')\n" + GOOD, "either"),
    function("closes standard output", "sys.stdout.close()\n" + GOOD, "either"),
    function("sets an alarm", "signal.alarm(1); time.sleep(3)\n" + GOOD, "either"),
    module("no such module", "", f"--reward {FUNCTION} --reward.function nowhere.f"),
    module("no such function", "", f"--reward {FUNCTION} --reward.function mine.f"),
    module("a number for a function", "f = 3\n", f"--reward {FUNCTION} --reward.function mine.f"),
    module("a module that raises", "raise ValueError('broken')\n", f"--reward {FUNCTION} --reward.function mine.f"),
    module("a module that exits", "import sys\nsys.exit(0)\n", f"--reward {FUNCTION} --reward.function mine.f"),
    module("a module that is not Python", "def f(:\n", f"--reward {FUNCTION} --reward.function mine.f"),
    module("a function of no arguments", "def f(): return []\n", f"--reward {FUNCTION} --reward.function mine.f"),
    module(
        "a function that wants what there is not",
        "def f(responses, moon): return [1.0]\n",
        f"--reward {FUNCTION} --reward.function mine.f",
    ),
    module(
        "a coroutine",
        "async def f(responses): return float(len(responses[0]) % 2)\n",
        f"--reward {FUNCTION} --reward.function mine.f",
        "accepted",
    ),
    module(
        "a coroutine that hangs",
        "import asyncio\nasync def f(responses): await asyncio.sleep(1e6)\n",
        f"--reward {FUNCTION} --reward.function mine.f --reward.timeout 1",
    ),
    module(
        "a timeout of 0",
        "def f(responses): return []\n",
        f"--reward {FUNCTION} --reward.function mine.f --reward.timeout 0",
    ),
    module(
        "a timeout of NaN",
        "def f(responses): return []\n",
        f"--reward {FUNCTION} --reward.function mine.f --reward.timeout nan",
    ),
    subclass("good", "def __call__(self, responses, truths): " + GOOD, "accepted"),
    subclass("without __call__", "pass"),
    subclass("whose constructor raises", "def __init__(self): raise ValueError('no')"),
    subclass(
        "whose constructor exits",
        "def __init__(self): sys.exit(0)\ndef __call__(self, responses, truths): " + GOOD,
    ),
    module(
        "a class in a module that exits",
        "import sys\nfrom mifo_lightning.rewards.base import Reward\nsys.exit('x')\nclass R(Reward): ...\n",
        "--reward mine.R",
    ),
    subclass("whose constructor wants a value", "def __init__(self, x: int): ..."),
    subclass(
        "whose close raises",
        "def __call__(self, responses, truths): " + GOOD + "\ndef close(self): raise ValueError('no')",
        "either",
    ),
    subclass(  # nothing is lost: it is ended after the last answer
        "whose close hangs",
        "def __call__(self, responses, truths): " + GOOD + "\ndef close(self): time.sleep(1e6)",
        "accepted",
    ),
    subclass("with failed above success_threshold", "failed = 2.0\ndef __call__(self, responses, truths): " + GOOD),
    subclass("that is best at NaN", "best = float('nan')\ndef __call__(self, responses, truths): " + GOOD),
    subclass("judged by what it lacks", "solved_by = 'x'\ndef __call__(self, responses, truths): " + GOOD),
]
