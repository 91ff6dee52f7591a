"""What module, batches, loader and callbacks owe one another; the README lists all of it in one table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict, cast, runtime_checkable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mifo_callbacks.tokens import Selection

PhaseOf = Callable[[Trainer, LightningModule, Any], str]
NUMBER = "phase_number"  # optional key of a batch: tells two phases of one label in a row apart


class Group(TypedDict):
    """One question of a rollout; further keys travel into the entries that a loader's `push` gets."""

    id: int | str
    n_correct: int
    size: int
    has_demonstration: bool


class SelectTokens(Protocol):
    """`pl_module.select_tokens` while a Trainer with `EntropyTokenSelection` runs the module."""

    def __call__(self, entropy: Tensor, mask: Tensor, named: Mapping[str, Tensor] | None = None) -> Selection:
        """The tokens of one optimizer step; arguments as in `EntropyTokenSelection.select`."""


class PhaseLoader(Protocol):
    """A loader that makes supervised phases of the questions that `BufferPhaseSwitch` pushes."""

    def push(self, entries: list[dict[str, Any]]) -> None:
        """Take entries of a `DemonstrationBuffer`, the same on every rank."""


@runtime_checkable
class Importance(Protocol):
    """A callback that has a map of how much every weight matters; `GradientFreezing` takes it from there.

    One with an attribute `measure`, the label of a phase, is not taken for freezing in that phase.
    """

    @property
    def importance(self) -> Mapping[str, Tensor] | None:
        """fp32 scores, at least 0, by parameter name, full or laid out like the parameter; None or empty before any."""


def require_offer(contract: type, thing: object, who: str, what: str) -> None:
    """Raise unless `thing`, which is `what` to `who`, has all public names of the Protocol `contract`.

    Raises:
        MisconfigurationException: If something is missing, by its name.
    """
    kinds = contract.__mro__[:-1]
    names = {name for kind in kinds for name in (*vars(kind), *vars(kind).get("__annotations__", ()))}
    needed = sorted(name for name in names if not name.startswith("_"))
    if missing := [name for name in needed if not hasattr(thing, name)]:
        raise MisconfigurationException(
            f"{who}: {what} is a {type(thing).__name__} without {', '.join(missing)}; needed: {contract.__name__} with "
            f"{', '.join(needed)}"
        )


def phase_loader_of(trainer: Trainer, who: str) -> PhaseLoader:
    """The train dataloader, which `who` wants to push questions into.

    Raises:
        MisconfigurationException: If it has no `push`.
    """
    require_offer(PhaseLoader, trainer.train_dataloader, who, "the train dataloader")
    return cast(PhaseLoader, trainer.train_dataloader)


def importance_before(
    taker: Callback, callbacks: Sequence[Callback], during: str, who: str, without: str = ""
) -> Importance:
    """The one callback whose importance `taker` goes by in the phase `during`.

    Args:
        taker: Asks; stands in the list too.
        callbacks: Those of the Trainer, in their order.
        during: Label of the phase; what measures this phase itself is not taken.
        who: What the message calls the asker.
        without: What else the message allows, if anything.

    Raises:
        MisconfigurationException: If there is none, more than one, or it stands after `taker`.
    """
    found = [c for c in callbacks if isinstance(c, Importance) and getattr(c, "measure", None) != during]
    if len(found) != 1:
        raise MisconfigurationException(
            f"{who} needs one callback with an importance map, such as ImportanceEMA, "
            f"that measures another phase than {during!r}; there are {len(found)}; allowed: one{without}"
        )
    source = cast(Callback, found[0])
    if callbacks.index(source) > callbacks.index(taker):
        raise MisconfigurationException(
            f"{type(source).__name__} stands after {type(taker).__name__} in the list of callbacks; allowed: before "
            "it, so that the map is complete when the mask is drawn"
        )
    return found[0]


def map_of(source: Importance, module: nn.Module) -> Mapping[str, Tensor]:
    """The map of `source`, empty before there is one.

    Raises:
        MisconfigurationException: If it is no mapping, or names what is no parameter of `module`.
    """
    who, found = type(source).__name__, source.importance
    if not isinstance(found, Mapping | None):
        raise MisconfigurationException(
            f"{who}.importance is a {type(found).__name__}; allowed: a dict from parameter names to tensors, or None"
        )
    if unknown := sorted((found or {}).keys() - dict(module.named_parameters()).keys()):
        raise MisconfigurationException(f"{who}.importance names {unknown[0]!r}, no parameter of this module")
    return found or {}


def groups_of(outputs: object) -> list[Group] | None:
    """`groups` of what a `training_step` returned, on every rank in the same batch; None where no rollouts were made.

    Raises:
        MisconfigurationException: If they are no list.
    """
    groups = outputs.get("groups") if isinstance(outputs, Mapping) else None
    if groups is not None and not isinstance(groups, list):
        raise MisconfigurationException(
            f"training_step returned groups of type {type(groups).__name__}; allowed: a list of dicts, or no such key"
        )
    return groups


def phase_of(phase: str | PhaseOf, trainer: Trainer, pl_module: LightningModule, batch: Any) -> str:
    """The label of the phase that `batch` belongs to: `batch[phase]`, or what the callable `phase` returns.

    Raises:
        MisconfigurationException: If the batch has no such key or the label is not a string.
    """
    if callable(phase):
        label = phase(trainer, pl_module, batch)
    elif isinstance(batch, Mapping) and phase in batch:
        label = batch[phase]
    else:
        has = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"type {type(batch).__name__}"
        hint = "; a plain list of batches needs DataLoader(batches, batch_size=None)" if isinstance(batch, list) else ""
        raise MisconfigurationException(
            f"the batch ({has}) has no key {phase!r}; allowed: a batch with that key, another key, or "
            f"phase=callable(trainer, pl_module, batch) -> str{hint}"
        )
    if not isinstance(label, str):
        raise MisconfigurationException(f"the phase {phase!r} of the batch is {label!r}; allowed: a string")
    return label


def phase_number(batch: Any) -> int | None:
    """The number of the phase that `batch` belongs to, `batch["phase_number"]`; None where it has no such key.

    Raises:
        MisconfigurationException: If the number is not an int.
    """
    number = batch.get(NUMBER) if isinstance(batch, Mapping) else None
    if number is not None and not isinstance(number, int):
        raise MisconfigurationException(f"batch[{NUMBER!r}] is {number!r}; allowed: an int, or no such key")
    return number
