"""What data shares with the module that is trained on it: said once, to the module."""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.loading import load_tokenizer
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.isolation import state_of


class Settings(NamedTuple):
    """Those of a `MifoModule`.

    Attributes:
        reward: Checks that demonstrations are right.
        tokenizer: The model's.
        group_size: G, rollouts per question.
        success_threshold: Reward from which a demonstration is right.
    """

    reward: Reward
    tokenizer: PreTrainedTokenizerBase
    group_size: int
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
            mine = given[name] = load_tokenizer(mine, getattr(module, "trust_remote_code", False))
        if mine is None and theirs is None:
            raise InputError(
                f"data.{name}: nothing says what it is: give it, or let a Trainer set the data up for a MifoModule, as "
                "trainer.fit(module, data) does"
            )
        if mine is not None and theirs is not None and not _same(mine, theirs):
            raise InputError(
                f"data.{name}: {_shown(mine)} is not allowed; the module has {_shown(theirs)}: leave it out"
            )
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
