"""Does foreign work end? Tried in a forked child first, whose time and memory have a limit, so that nothing is lost."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

PAUSE = 0.005  # seconds between two looks at the child


def ends(work: Callable[[], object], cpu: int, wall: float, memory: int) -> bool:
    """Whether `work` ends, be it with an exception, within the limits; what it changes is not seen here.

    Args:
        work: What to try; it may use no threads, as those of this process are not in the child.
        cpu: Seconds of the processor.
        wall: Seconds by the clock.
        memory: Bytes beyond what this process has reserved; unlimited where the system does not tell that.
    """
    child = os.fork()
    if child == 0:
        _work_and_exit(work, cpu, memory)
    deadline = time.monotonic() + wall
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(PAUSE)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def _work_and_exit(work: Callable[[], object], cpu: int, memory: int) -> None:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        reserved = Path("/proc/self/statm")
        if reserved.exists():
            most = int(reserved.read_text().split()[0]) * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        work()
        code = 0
    except MemoryError:
        pass
    except BaseException:
        code = 0  # the caller's own call will raise it again
    finally:
        os._exit(code)
