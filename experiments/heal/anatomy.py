"""Which weights of a decoder are what: matrices of layers by kind and depth, embedding, head, vectors."""

import re
from dataclasses import dataclass

from experiments.prune_update import Weights
from mifo_lightning.methods.subspace_freezing import kind_of

LAYER = re.compile(r"\.(\d+)\.")
THIRDS = ("first third", "middle third", "last third")


@dataclass(frozen=True)
class Anatomy:
    """Names of weights.

    Attributes:
        matrices: The chosen matrices of all layers, in order of layers.
        kinds: The same by kind, such as q_proj.
        thirds: The same by depth; a third may be empty.
        embedding: The input embedding; with a tied head this is both.
        head: The head, where it has weights of its own.
        vectors: Norms and biases: everything with one dimension.
    """

    matrices: list[str]
    kinds: dict[str, list[str]]
    thirds: dict[str, list[str]]
    embedding: list[str]
    head: list[str]
    vectors: list[str]


def anatomy(weights: Weights, chosen: list[str]) -> Anatomy:
    """Sort names of weights; `chosen` are the kinds of matrices, such as q_proj, that count as matrices."""
    names = [name for name, w in weights.items() if w.ndim == 2]
    kinds = {kind: [name for name in names if kind_of(name) == kind and LAYER.search(name)] for kind in chosen}
    kinds = {kind: sorted(found, key=layer_of) for kind, found in kinds.items() if found}
    matrices = sorted((name for found in kinds.values() for name in found), key=layer_of)
    layers = 1 + max((layer_of(name) for name in matrices), default=0)
    thirds = {third: [name for name in matrices if 3 * layer_of(name) // layers == i] for i, third in enumerate(THIRDS)}
    outside = [name for name in names if not LAYER.search(name)]
    embedding = [name for name in outside if "embed" in name]
    head = [name for name in outside if name not in embedding]
    return Anatomy(matrices, kinds, thirds, embedding, head, [name for name, w in weights.items() if w.ndim == 1])


def layer_of(name: str) -> int:
    """The number of the layer that a name says; -1 outside of layers."""
    found = LAYER.search(name)
    return int(found[1]) if found else -1
