"""A plain function as a reward, also one that is slow or a coroutine."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.base import Reward, checked_timeout, pick

GRACE = 1.0  # seconds that cancelled coroutines get to end


class FunctionReward(Reward):
    """What a function of yours returns: one finite number for each response.

    It is called by keyword with what it declares: `responses`, `truths` and the table of `rewards.base`. An `async def`
    is called once for each response, with lists of one, many at a time, and returns a list of one or a number; so one
    that hangs or fails costs no other its score.

    It runs in a child process that imports its module and is killed when a call takes too long; a call that failed so
    is repeated response by response (see `Reward.call_timeout`).

    Args:
        function: Import path, such as `my_module.my_reward`.
        timeout: Seconds that the responses of one call may take together; what is not finished then failed and is
            added to `timeouts`. Null waits for ever.
        concurrency: Most coroutines at a time.
        failed: What a check that failed scores; set it below every legal score if those are negative.
        isolate: Whether it runs in a child process; where it does not, a plain function has no time limit.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        timeout: float | None = 600.0,
        concurrency: int = 64,
        failed: float = 0.0,
        isolate: bool = True,
    ) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self.timeout = checked_timeout(timeout, "FunctionReward")
        if concurrency < 1:
            raise InputError(f"FunctionReward: concurrency is {concurrency}, allowed is 1 or more")
        self.function, self.concurrency, self.failed, self.isolate = function, concurrency, failed, isolate
        late = GRACE if inspect.iscoroutinefunction(function) else 0.0  # those are stopped one by one before
        self.call_timeout = None if timeout is None else timeout + late

    def __call__(self, responses: list[str], truths: list[str], **context: Sequence[Any]) -> list[float]:
        wanted = pick(self.function, {"responses": responses, "truths": truths, **context}, self.name)
        if not inspect.iscoroutinefunction(self.function):
            scores: list[float] = self.function(**wanted)
            return scores
        rows = [{key: [values[i]] for key, values in wanted.items()} for i in range(len(responses))]
        with ThreadPoolExecutor(1) as pool:  # this thread may have a running loop, as in a notebook
            return pool.submit(asyncio.run, self._gather(rows)).result()

    async def _gather(self, rows: list[dict[str, Any]]) -> list[Any]:
        """What the coroutine function returns for each row, or the exception that it ended in."""
        gate = asyncio.Semaphore(self.concurrency)

        async def one(row: dict[str, Any]) -> Any:
            async with gate:
                value = await self.function(**row)
            return value[0] if isinstance(value, Sequence) else value

        tasks = [asyncio.create_task(one(row)) for row in rows]
        _, late = await asyncio.wait(tasks, timeout=self.timeout)
        for task in late:
            task.cancel()
        values = await asyncio.gather(*tasks, return_exceptions=True)
        too_late = TimeoutError(f"{self.name} took more than {self.timeout} s")
        return [too_late if isinstance(value, asyncio.CancelledError) else value for value in values]


def as_reward(reward: Reward | Callable[..., Any]) -> Reward:
    """A reward as it is, a function as a `FunctionReward`.

    Raises:
        InputError: It is neither.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, type) or not callable(reward):
        raise InputError(f"reward: {reward!r:.120} is not allowed; it must be an object of a Reward, or a function")
    return FunctionReward(reward)
