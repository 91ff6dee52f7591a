"""A main thread in a C call, such as waiting for a rank that is gone: no handler of Python runs there."""

import os
import signal
import threading
import time
from collections.abc import Callable, Collection

PAUSE = 0.05  # seconds between two looks
PATIENCE = 20.0  # seconds; less than the 30 that schedulers give


def end_without(parent: int, patience: float, end: Callable[[], None]) -> None:
    """Watch in a thread the process that started this one; call `end` there so many seconds after it is gone."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(patience)
        end()

    threading.Thread(target=look, daemon=True, name="parent").start()


class SignalWatch:
    """Ends the process for a signal that the main thread does not come to handle.

    Args:
        signals: Those that have handlers.
        noted: When a handler last ran, monotonic seconds.
        end: Ends the process; called in a thread.
    """

    def __init__(self, signals: Collection[int], noted: Callable[[], float], end: Callable[[int], None]) -> None:
        self.signals, self.noted, self.end = signals, noted, end
        self.patience = PATIENCE
        self._pipe: tuple[int, int] | None = None
        self._before = -1

    def begin(self) -> None:
        """Let the C handler, which runs at once, tell a thread; in the main thread only."""
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a fork's signals are its own
            threading.Thread(target=self._look, args=(self._pipe[0],), daemon=True, name="signals").start()
        before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = self._before if before == self._pipe[1] else before

    def give_back(self) -> None:
        """Leave signals to whoever had them before."""
        if self._pipe is not None:
            signal.set_wakeup_fd(self._before)

    def _look(self, pipe: int) -> None:
        while True:
            signum, came = os.read(pipe, 1)[0], time.monotonic()
            if signum not in self.signals:
                continue
            # the handler may have run before this thread did
            while self.noted() < came - 1 and time.monotonic() < came + self.patience:
                time.sleep(PAUSE)
            if self.noted() < came - 1:
                self.end(signum)
