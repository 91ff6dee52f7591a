"""One callback object, one state key, one run: what has state is not shared unsaid."""

from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

_set_up: WeakSet[Callback] = WeakSet()
_trained: WeakKeyDictionary[Callback, "ref[LightningModule]"] = WeakKeyDictionary()  # beside the callbacks: a
# weak reference in one of them could not be pickled


class TrainerCallback(Callback):
    """Base of the callbacks, which live on the hooks of a Trainer."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _set_up.add(self)  # its Trainer has compared keys: from now on they are plain strings, as checkpoints need them

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Refuse a Fabric loop, which calls none of the other hooks."""
        raise MisconfigurationException(
            f"{type(self).__name__} lives on the hooks of lightning.pytorch.Trainer, which {type(fabric).__name__} "
            "does not call; allowed: a Trainer"
        )


class _Key(str):
    """A state key that refuses to be equal to that of another callback."""

    owner: Callback

    def __eq__(self, other: object) -> bool:
        same = str.__eq__(self, other)
        if same is True and isinstance(other, _Key) and other.owner is not self.owner:
            name = type(self.owner).__name__
            raise ValueError(
                f"two callbacks have the state key {self!s}, under which a checkpoint keeps one; allowed: one "
                f"{name} of that kind, or a subclass whose state_key is self._generate_state_key(name=...)"
            )
        return bool(same)

    __hash__ = str.__hash__


def distinct(callback: Callback, key: str) -> str:
    """`key`; until the callback is set up, the Trainer's comparison with an equal one of another raises ValueError.

    Lightning compares when a Trainer is made, and its own message does not say what to do.
    """
    if callback in _set_up:
        return key
    own = _Key(key)
    own.owner = callback
    return own


def claim(callback: Callback, module: LightningModule) -> None:
    """Tie `callback` to the run of `module`, which it must be at the start of each fit.

    Raises:
        MisconfigurationException: If it has the state of another module's run.
    """
    known = _trained.get(callback)
    if known is not None and known() is not module:
        name = type(callback).__name__
        raise MisconfigurationException(
            f"this {name} has the state of another module's run; allowed: a new {name} for each module, a second "
            "fit of the same one, or a checkpoint to resume from"
        )
    _trained[callback] = ref(module)


def renew(callback: Callback) -> None:
    """Its state has been replaced by that of a checkpoint, of whatever module."""
    _trained.pop(callback, None)
