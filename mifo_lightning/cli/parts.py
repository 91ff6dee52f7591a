"""The groups of callbacks that a configuration names: parts of methods, and monitors."""

from collections.abc import Iterable

from lightning import Callback

from mifo_callbacks import BufferPhaseSwitch, EntropyTokenSelection, GradientDropping, GradientFreezing, ImportanceEMA
from mifo_lightning.cli.config_files import NULL, Given
from mifo_lightning.cli.packaged import names
from mifo_lightning.common.errors import InputError
from mifo_lightning.methods.anchor import Anchor
from mifo_lightning.methods.direction_freezing import DirectionFreezing
from mifo_lightning.methods.sign_conflict import SignConflict
from mifo_lightning.methods.soft_freezing import SoftFreezing
from mifo_lightning.methods.subspace_freezing import SubspaceFreezing
from mifo_lightning.monitors.activity import SecondsByActivity
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.monitors.costs import Costs
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.monitors.forgetting import Forgetting
from mifo_lightning.monitors.heldout import HeldOutLoss
from mifo_lightning.monitors.history import History
from mifo_lightning.monitors.layer_updates import LayerUpdates
from mifo_lightning.monitors.overlap import FrozenOverlap
from mifo_lightning.monitors.phase_kl import PhaseKL
from mifo_lightning.monitors.progress import PhaseProgress
from mifo_lightning.monitors.rank_agreement import RankAgreement
from mifo_lightning.monitors.retention import Retention
from mifo_lightning.monitors.samples import SampleTable
from mifo_lightning.monitors.summary import RunSummary
from mifo_lightning.monitors.update_norm import UpdateNorm

# name of the group -> callback; the order is the order in which their hooks run
METHOD = {
    "entropy": EntropyTokenSelection,
    "importance": ImportanceEMA,
    "anchor": Anchor,  # before those that mask the gradient: what is frozen has none from it either
    "freeze": GradientFreezing,
    "directions": DirectionFreezing,
    "soft": SoftFreezing,
    "conflict": SignConflict,
    "subspace": SubspaceFreezing,
    "drop": GradientDropping,
    "buffer": BufferPhaseSwitch,
}
MONITORS: dict[str, type[Callback]] = {
    "updates": UpdateNorm,
    "heldout": HeldOutLoss,
    "forgetting": Forgetting,
    "phase_kl": PhaseKL,
    "layer_updates": LayerUpdates,
    "overlap": FrozenOverlap,
    "agreement": RankAgreement,
    "retention": Retention,
    "seconds": SecondsByActivity,
    "summary": RunSummary,
    "costs": Costs,  # after those that measure before a batch: its clock starts then
    "history": History,  # after all that log
    "samples": SampleTable,
    "export": ExportModel,
    "checkpoint": LastCheckpoint,
    "progress": PhaseProgress,
}


# on unless set to null; every other group is on where a configuration names it
ALWAYS = ("seconds", "samples", "export", "checkpoint", "progress", "summary")

# whose random choices follow seed_everything
SEEDED = ("entropy", "anchor", "freeze", "directions", "conflict", "subspace", "drop")

# the key of each part of a method that says how much of it: whoever gives it, or the class, wants the part
AMOUNTS = {
    "entropy": "fraction",
    "importance": "alpha",
    "anchor": "strength",
    "freeze": "fraction",
    "directions": "k",
    "soft": "quantile",
    "conflict": "fraction",
    "subspace": "k",
    "drop": "probability",
    "buffer": "max_accuracy",
}
# configurations that switch a part on
EXAMPLES = {
    "anchor": "methods/rpsft",
    "directions": "",
    "soft": "protections/soft",
    "conflict": "protections/sign_conflict",
    "subspace": "protections/subspace",
    "drop": "controls/drop_sft_gradients",
    "buffer": "methods/interleave",
}


def check_method(given: Iterable[Given]) -> None:
    """Refuse two methods in one run: their parts would add up to neither, and nothing would say so.

    Args:
        given: What files and flags say, in their order.

    Raises:
        InputError: Two files name a method each, and no flag names what they make together; or a flag names one that no
            file has brought.
    """
    named = [one for one in given if one.key == "method" and one.tag != NULL]
    files = {one.value: one.place for one in named if ", line " in one.place}
    for one in named:
        if one.value not in files and f"methods/{one.value}" in names():
            raise InputError(
                f"method: {one.value} ({one.place}) is the name alone; --config methods/{one.value} is the method"
            )
    if len(files) > 1 and all(", line " in one.place for one in named):
        listed = " and ".join(f"{name} ({place})" for name, place in files.items())
        raise InputError(
            f"method: {listed}: a run has one method; leave one out, or say with --method NAME what both together are"
        )


def check_parts(given: Iterable[Given]) -> None:
    """Refuse settings of a part that nothing has switched on: a control laid over a base without what it controls.

    The parser would build the part from its defaults, and a run would freeze, say, half of the weights unasked.

    Args:
        given: What files and flags say, in their order.

    Raises:
        InputError: Only settings other than its amount are given for a part; the line says which, where, and what
            switches the part on.
    """
    wanted: set[str] = set()
    adjusted: dict[str, Given] = {}
    for one in given:
        part, _, rest = one.key.partition(".")
        if part not in AMOUNTS:
            continue
        key = rest.removeprefix("init_args.")
        if not rest and one.tag == NULL:
            wanted.discard(part)
            adjusted.pop(part, None)
        elif key in ("", "class_path", AMOUNTS[part]):
            wanted.add(part)
        else:
            adjusted.setdefault(part, Given(f"{part}.{key}", one.tag, one.place))
    for part, one in adjusted.items():
        if part not in wanted:
            example = EXAMPLES.get(part, "methods/mifo")
            lay = f"lay it over a configuration that does, such as --config {example}, or " if example else ""
            raise InputError(
                f"{one.key}: {part} is off (null), and this alone does not switch it on; {lay}"
                f"give {part}.{AMOUNTS[part]} as well ({one.place})"
            )
