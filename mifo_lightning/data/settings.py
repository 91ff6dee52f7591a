"""How rows become questions, and what data shares with the module that is trained on it: said once, to the module."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from mifo_lightning.common.errors import InputError, require
from mifo_lightning.policy.loading import Loading, load_tokenizer
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.isolation import state_of


@dataclass
class Prompts:
    """How the messages of a row become a prompt.

    Args:
        system_prompt: Replaces or adds the system message; null leaves the rows as they are.
        chat_template: Jinja chat template, or a file that holds it; null takes the tokenizer's.
        max_tokens: Longest prompt, the head of the answer included; longer ones are dropped and counted.
    """

    system_prompt: str | None = None
    chat_template: str | None = None
    max_tokens: int = 1024

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        require(f"{key}.max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")


@dataclass
class Demonstrations:
    """Which demonstrations are learned from; a question whose own is dropped stays without one.

    Args:
        answer_after: Text after which a demonstration's final answer begins; null if nothing marks it.
        max_tokens: Longest demonstration with its end token; longer ones are dropped, never cut.
        verify: Whether to drop those that the reward does not accept.
        damaged_share: Share of training demonstrations, chosen by seed, with wrong digits before `answer_after`.
    """

    answer_after: str | None = None
    max_tokens: int = 8192
    verify: bool = True
    damaged_share: float = 0.0

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        share = self.damaged_share
        require(f"{key}.max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        require(f"{key}.damaged_share", share, 0 <= share <= 1, "between 0 and 1")
        if share and not self.answer_after:
            raise InputError(f"{key}.damaged_share: {share} needs {key}.answer_after, so that answers stay right")


class Settings(NamedTuple):
    """Those of a `MifoModule`.

    Attributes:
        reward: Checks that demonstrations are right.
        tokenizer: The model's.
        success_threshold: Reward from which a demonstration is right.
    """

    reward: Reward
    tokenizer: PreTrainedTokenizerBase
    success_threshold: float


def settle(given: dict[str, Any], module: object) -> Settings:
    """What was given, or else the module's.

    Args:
        given: By the names of `Settings`, None where nothing was given; a tokenizer by its directory or hub name,
            which is replaced by what was loaded.
        module: Has attributes of these names, or some or all of them missing; None: there is none.

    Raises:
        InputError: If something is given and the module has another, or nothing says what it is.
    """
    found = {}
    for name in Settings._fields:
        mine, theirs = given[name], getattr(module, name, None)
        if isinstance(mine, str):
            loading = getattr(module, "loading", Loading())
            mine = given[name] = load_tokenizer(mine, loading.trust_remote_code)
        if mine is None and theirs is None:
            raise InputError(
                f"data: nothing says what its {name} is: let a Trainer set it up for a MifoModule, as "
                "trainer.fit(module, data) does, or give it to data.standalone(...)"
            )
        if mine is not None and theirs is not None and not _same(mine, theirs):
            raise InputError(f"data.standalone: {name} {_shown(mine)} is not allowed; the module has {_shown(theirs)}")
        found[name] = mine if theirs is None else theirs
    return Settings(**found)


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, PreTrainedTokenizerBase):
        return bool(mine.get_vocab() == theirs.get_vocab() and mine.chat_template == theirs.chat_template)
    if isinstance(mine, Reward):
        return bool(_state(mine) == _state(theirs))
    return bool(mine == theirs)


def _state(value: Any) -> Any:
    """What a reward is made of: those of a sum are rewards themselves."""
    if isinstance(value, Reward):
        return type(value), _state(state_of(value))
    return {key: _state(item) for key, item in value.items()} if isinstance(value, dict) else value


def _shown(value: Any) -> str:
    if isinstance(value, Reward):
        settings = ", ".join(f"{name}={setting!r:.40}" for name, setting in state_of(value).items())
        return f"{type(value).__name__}({settings})"
    return str(getattr(value, "name_or_path", value))
