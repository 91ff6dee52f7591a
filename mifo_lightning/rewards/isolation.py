"""User code in a child process: what hangs is killed, and what exits or crashes ends the child and not the run."""

import pickle
from typing import Any

from mifo_lightning.rewards.attempt import Failure, Outcome, attempt
from mifo_lightning.rewards.base import Context, Reward
from mifo_lightning.rewards.child import START_SECONDS, Child, ChildDied

WORKER = "mifo_lightning.rewards.worker"
GRACE = 1.0  # seconds in which a reward may close what it holds
# what the child has of its own
OURS = ("errors", "timeouts", "checks", "first_problem", "causes", "components", "isolation")

inside = False  # whether this process is such a child: what a reward calls there runs beside it


def run(
    reward: Reward, responses: list[str], truths: list[str], wanted: Context, limit: float | None
) -> Outcome | Failure:
    """Call a reward, in its child process unless its `isolate` is false or it cannot be sent there.

    Args:
        reward: Scores.
        responses: N texts.
        truths: N ground truths.
        wanted: What it declares besides, N entries each.
        limit: Seconds that the call may take in the child; None waits for ever.

    Raises:
        InputError: The reward itself raised it.
    """
    if inside or not reward.isolate:
        return attempt(reward, responses, truths, wanted)
    isolation: Isolation = vars(reward).setdefault("isolation", Isolation())
    return isolation.run(reward, responses, truths, wanted, limit)


def release(reward: Reward) -> None:
    """Close a reward in the process in which it was called, and end its child."""
    isolation = vars(reward).get("isolation")
    if isolation is None or isolation.refused:
        reward.close()
    else:
        isolation.child.close()  # before it ends it calls `close`


def state_of(reward: Reward) -> dict[str, Any]:
    """What a reward was made with and has been assigned since, without what is counted of it."""
    return {name: value for name, value in vars(reward).items() if name not in OURS}


class Isolation:
    """The child process of one reward object.

    The child gets a copy of the object when it starts and, with each call, the attributes assigned anew since then.
    What the reward keeps between calls lives in the child, and is lost when that is killed.
    """

    def __init__(self) -> None:
        self.child = Child(WORKER, grace=GRACE)
        self.refused = False
        self._sent: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a reward gets a child of its own."""
        return Isolation, ()

    def run(
        self, reward: Reward, responses: list[str], truths: list[str], wanted: Context, limit: float | None
    ) -> Outcome | Failure:
        """As `isolation.run`; in this process where the reward cannot be sent."""
        try:
            if not self.refused and not self.child.running:
                self._send(reward)
            if self.refused:
                return attempt(reward, responses, truths, wanted)
            changed = {k: v for k, v in state_of(reward).items() if self._sent.get(k, self) is not v}
            question = pickle.dumps((changed, responses, truths, wanted))
        except TimeoutError:
            return Failure(f"not imported by its process within {START_SECONDS:g} s", timeout=True)
        except ChildDied as error:
            return Failure(f"while it was imported its process {error}")
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self._refuse(reward, f"{type(error).__name__}: {error}")
            return attempt(reward, responses, truths, wanted)
        outcome: Outcome | Failure
        try:
            outcome, failures = self.child.ask(("call", question, limit), limit)
        except TimeoutError:
            return Failure(f"took more than {limit:g} s", timeout=True)
        except ChildDied as error:
            return Failure(f"its process {error}")
        self._sent |= changed
        for place, problem, response, timeout in failures:
            reward.parts[place].fail(problem, response, timeout)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _send(self, reward: Reward) -> None:
        """Start a child with a copy of the reward."""
        self._sent = state_of(reward)
        problem = self.child.ask(("load", pickle.dumps(reward), None), START_SECONDS)
        if problem is not None:
            self._refuse(reward, problem)

    def _refuse(self, reward: Reward, why: str) -> None:
        self.refused = True
        self.child.close()
        from lightning.pytorch.utilities import rank_zero_warn  # the child must not import it

        name = getattr(reward, "name", type(reward).__name__)
        rank_zero_warn(
            f"reward: {name} cannot run in a process of its own ({' '.join(why.split()):.160}): no time limit holds "
            "for it, and what it does to its process it does to the run; put it into a module that can be imported, or "
            "set `isolate: false`"
        )
