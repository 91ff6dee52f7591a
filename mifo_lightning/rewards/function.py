"""A plain function as a reward, also one that is slow or a coroutine."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any

from mifo_lightning.errors import InputError
from mifo_lightning.rewards.base import Reward, pick

GRACE = 1.0  # seconds that cancelled coroutines get to end
LATE = object()


class FunctionReward(Reward):
    """What a function of yours returns: one finite number for each response.

    It is called by keyword with what it declares: `responses`, `truths` and the table of `rewards.base`. An `async def`
    is called once for each response, with lists of one, many at a time, and returns a list of one or a number; so one
    that hangs or fails costs no other its score.

    Args:
        function: Import path, such as `my_module.my_reward`.
        timeout: Seconds that the responses of one call may take together; what is not finished then failed and is
            added to `timeouts`. Null waits for ever. A plain function cannot be stopped, only left behind.
        concurrency: Most coroutines at a time.
        failed: What a check that failed scores; set it below every legal score if those are negative.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        timeout: float | None = None,
        concurrency: int = 64,
        failed: float = 0.0,
    ) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        if timeout is not None and not timeout > 0:
            raise InputError(f"FunctionReward: timeout is {timeout}, allowed is a number of seconds above 0, or null")
        if concurrency < 1:
            raise InputError(f"FunctionReward: concurrency is {concurrency}, allowed is 1 or more")
        self.function, self.timeout, self.concurrency, self.failed = function, timeout, concurrency, failed

    def __call__(self, responses: list[str], truths: list[str], **context: Sequence[Any]) -> list[float]:
        wanted = pick(self.function, {"responses": responses, "truths": truths, **context}, self.name)
        late = TimeoutError(f"{self.name} took more than {self.timeout} s")
        if inspect.iscoroutinefunction(self.function):
            rows = [{key: [values[i]] for key, values in wanted.items()} for i in range(len(responses))]
            work = _gather(self.function, rows, self.timeout, self.concurrency, late)
            limit = None if self.timeout is None else self.timeout + GRACE
            values = _in_thread(lambda: asyncio.run(work), limit)
        elif self.timeout is None:
            values = self.function(**wanted)
        else:
            values = _in_thread(partial(self.function, **wanted), self.timeout)
        return [late] * len(responses) if values is LATE else values  # type: ignore[list-item]


async def _gather(
    function: Callable[..., Any],
    rows: list[dict[str, Any]],
    timeout: float | None,
    concurrency: int,
    too_late: TimeoutError,
) -> list[Any]:
    """What the coroutine function returns for each row, or the exception that it ended in."""
    gate = asyncio.Semaphore(concurrency)

    async def one(row: dict[str, Any]) -> Any:
        async with gate:
            value = await function(**row)
        return value[0] if isinstance(value, Sequence) else value

    tasks = [asyncio.create_task(one(row)) for row in rows]
    _, late = await asyncio.wait(tasks, timeout=timeout)
    for task in late:
        task.cancel()
    values = await asyncio.gather(*tasks, return_exceptions=True)
    return [too_late if isinstance(value, asyncio.CancelledError) else value for value in values]


def _in_thread(work: Callable[[], Any], timeout: float | None) -> Any:
    """What `work` returns; LATE if it is not done in time. In a thread of its own, so that the caller's may be any."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return done.result(timeout)
    except TimeoutError:
        if done.done():
            raise  # the function's own
        return LATE
