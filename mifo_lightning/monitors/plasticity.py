"""How well RL still learns, as the first steps of an RL phase say."""

from collections.abc import Mapping
from math import isfinite
from statistics import fmean
from typing import Any

STEPS = 8  # at the start of a phase


class Plasticity:
    """Means of the gradient's norm and of the share of groups with a signal, over the first 8 RL steps of a phase."""

    def __init__(self) -> None:
        self._signal: list[float] = []  # of each RL step of the running phase, the share of groups with one
        self._norms: list[float] = []  # of the gradients of the first of these
        self._sft_steps = 0  # since the last RL phase

    def begin(self) -> None:
        """A phase begins."""
        self._signal, self._norms = [], []

    def note(self, batch: Mapping[str, Any], logged: Mapping[str, Any]) -> None:
        """Take what an optimizer step has logged.

        Args:
            batch: Its work item.
            logged: Its metrics by name: `rollout/groups_without_signal` and `rl/grad_norm` of an RL step.
        """
        if batch["phase"] == "sft":
            self._sft_steps += 1
            return
        if batch["update"] == 0:
            self._signal.append(1.0 - float(logged["rollout/groups_without_signal"]))
        norm = float(logged["rl/grad_norm"])
        if len(self._signal) <= STEPS and isfinite(norm):  # else the step was skipped
            self._norms.append(norm)

    def end(self) -> dict[str, float] | None:
        """What an RL phase says, and after how many SFT steps it came; None if no step of it was done."""
        if not self._norms:
            return None
        signal, steps, self._sft_steps = self._signal[:STEPS], self._sft_steps, 0
        found = {"after_sft_steps": steps, "rl_steps": len(signal)}
        return found | {"grad_norm": fmean(self._norms), "groups_with_signal": fmean(signal)}

    def state_dict(self) -> dict[str, Any]:
        """The running phase, in plain types."""
        return {"signal": list(self._signal), "norms": list(self._norms), "sft_steps": self._sft_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._signal, self._norms = list(state["signal"]), list(state["norms"])
        self._sft_steps = state["sft_steps"]
