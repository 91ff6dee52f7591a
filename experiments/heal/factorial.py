"""Stages 4 and 5: every edit of a study and its controls, by name, each made only when it is evaluated.

An edit changes the chosen matrices of the end; embedding, head and vectors stay the end's unless its name says so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from experiments.heal import edits
from experiments.heal.anatomy import Anatomy, anatomy
from experiments.heal.changes import CHANGES, next_layer, orthonormal
from experiments.heal.edits import End
from experiments.heal.geometry import Svd, svd
from experiments.heal.settings import Edits, dimension, share
from experiments.prune_update import Weights, prune

Decomposed = Callable[[str], Svd]
"""The SVD of a matrix by its name."""
Model = tuple[Weights, Decomposed]
Family = Literal["rollback", "restoration", "published", "reverse", "random subspace", "interpolation", "random change"]
PROJECTIONS = {"block": edits.block, "either": edits.either}
PARTS = {"block": edits.inside, "either": edits.touching}
"""What each of them takes of a change."""
WHERE = ("inside", "outside")
BEYOND = (
    "everything",
    "everything with two dimensions",
    "all but the matrices",
    "embedding",
    "head",
    "norms and biases",
)
"""What `rollback` puts back that is more than matrices, or something else."""
UNTRAINED = "rollback rows never trained"
"""Rows of embedding and head of tokens that occur in nothing that is trained on."""
PARTS_OF_RL = (0.25, 0.5, 0.75)
"""Shares of RL's change, the control of what lies inside or outside."""
COORDINATES = (0.25, 0.5, 0.75)
"""Shares of random coordinates that are put back, the control that needs no spectrum."""


def controls(settings: Edits) -> list[str]:
    """Names of the edits without which no table is written."""
    drawn = product(PROJECTIONS, settings.k, range(settings.seeds))
    names = [f"random {kind} {k}, {seed}" for kind, k, seed in drawn]
    names += [f"interpolation {a:g}" for a in (0.0, *settings.interpolation, 1.0)]
    names += [f"interpolation of all weights {a:g}" for a in settings.interpolation]
    names += [f"coordinates {a:g}" for a in COORDINATES]
    return [*names, *(f"peak + {name}" for name in ("SFT's change", *CHANGES, "next layer's change"))]


def moves_matrices_alone(edit: str, family: str) -> bool:
    """Whether an edit leaves embedding, head and vectors the end's: it is compared with a path that does so too."""
    return family != "published" and edit not in (UNTRAINED, *(f"rollback {part}" for part in BEYOND))


@dataclass(frozen=True)
class Edit:
    """One set of weights to evaluate.

    Attributes:
        name: What it is.
        family: Edits of one family are compared alike.
        make: The weights, and, as published, what else is to be printed.
    """

    name: str
    family: Family
    make: Callable[[], tuple[Weights, dict[str, float]]]


class Editor:
    """All edits of one base.

    Args:
        settings: Which there are.
        peak, end: fp32 weights that are put back, and those of the end of SFT.
        rl: What RL makes of the end.
        matrices: Kinds of matrices that are edited, such as q_proj.
        untrained: Token ids that occur in nothing that is trained on.
        seed: Of what is drawn on this base.
    """

    def __init__(
        self,
        settings: Edits,
        peak: Weights,
        end: Weights,
        rl: Weights,
        matrices: list[str],
        untrained: list[int],
        seed: int = 0,
    ) -> None:
        self.seed = seed
        self.settings, self.peak, self.end, self.rl = settings, peak, end, rl
        self.anatomy: Anatomy = anatomy(end, matrices)
        self.with_two_dimensions = [n for n, w in end.items() if w.ndim == 2]
        self.untrained = untrained
        self.peak_svd, self.end_svd, self.rl_svd = (cache(partial(_svd_of, each)) for each in (peak, end, rl))

    def all(self) -> Iterator[Edit]:
        """Every edit, the controls last."""
        kinds: dict[str, Callable[[], Iterator[Edit]]] = {
            "rollback": self.rollbacks,
            "block": partial(self.projections, "block"),
            "either": partial(self.projections, "either"),
            "values": partial(self.by_spectrum, "values"),
            "directions": partial(self.by_spectrum, "directions"),
            "as_published": self.published,
            "reverse": self.reverse,
        }
        for kind in self.settings.kinds:
            yield from kinds[kind]()
        yield from self.untrained_rows()
        yield from self.random_subspaces()
        yield from self.interpolations()
        yield from self.random_changes()

    def rollbacks(self) -> Iterator[Edit]:
        """The peak's own weights in place of the end's."""
        a = self.anatomy
        parts = {"everything": list(self.end), "all but the matrices": [n for n in self.end if n not in a.matrices]}
        parts["everything with two dimensions"] = self.with_two_dimensions  # as published with k_top the whole width
        parts |= self.thirds() | a.kinds
        parts |= {"embedding": a.embedding, "head": a.head, "norms and biases": a.vectors}
        for part, names in parts.items():
            if names:
                yield self._edit(f"rollback {part}", "rollback", names, self.peak.__getitem__)

    def untrained_rows(self) -> Iterator[Edit]:
        """The peak's rows of embedding and head where training can only push them away; always, if there are any."""
        if self.untrained:
            outside = (*self.anatomy.embedding, *self.anatomy.head)
            rows = [n for n in outside if len(self.end[n]) > max(self.untrained)]
            yield self._edit(UNTRAINED, "rollback", rows, self._rows)

    def projections(self, kind: str) -> Iterator[Edit]:
        """Top and tail subspaces of the peak, on each group of layers, at each dimension."""
        for (part, names), end, k in product(self.groups().items(), get_args(End), self.settings.k):
            change = partial(self._projected, kind, end, k)
            yield self._edit(f"{kind} {end} {k}{part}", "restoration", names, change)

    def by_spectrum(self, kind: str) -> Iterator[Edit]:
        """The peak's singular values in the end's directions, or the other way round."""
        make = {"values": edits.values, "directions": edits.directions}[kind]
        for part, names in self.groups().items():
            change = partial(lambda make, n: make(self.end_svd(n), self.peak_svd(n)), make)
            yield self._edit(f"{kind}{part}", "restoration", names, change)

    def published(self) -> Iterator[Edit]:
        """`edits.as_published` of the end with the peak's subspaces."""
        yield from self._published_pairs("published", "", (self.end, self.end_svd), (self.peak, self.peak_svd))

    def reverse(self) -> Iterator[Edit]:
        """Only the part of RL's change that lies inside the end's own subspaces, or only what lies outside.

        With `as_published` also the authors' code with RL in the place of SFT: RL's weights with the end's subspaces.
        """
        yield Edit("rl", "reverse", lambda: (self.rl, {}))
        matrices = self.anatomy.matrices
        for a in (*PARTS_OF_RL, 1.0):
            change = partial(lambda a, n: torch.lerp(self.end[n].double(), self.rl[n].double(), a), a)
            yield self._edit("rl matrices" if a == 1 else f"rl matrices x {a:g}", "reverse", matrices, change)
        for kind, where, k in product(PARTS, WHERE, self.settings.k):
            label = f"rl {where}" if kind == "block" else f"rl {where} {kind}"
            for end in get_args(End):
                yield self._edit(f"{label} {end} {k}", "reverse", matrices, partial(self._healed, where, kind, k, end))
            yield self._edit(f"{label} random {k}", "reverse", matrices, partial(self._healed, where, kind, k, None))
        if "as_published" in self.settings.kinds:
            yield from self._published_pairs("reverse", "rl ", (self.rl, self.rl_svd), (self.end, self.end_svd))

    def random_subspaces(self) -> Iterator[Edit]:
        """`block` and `either` with subspaces that are random, of the same dimensions."""
        for (kind, make), k, seed in product(PROJECTIONS.items(), self.settings.k, range(self.settings.seeds)):
            change = partial(self._at_random, make, k, seed)
            yield self._edit(f"random {kind} {k}, {seed}", "random subspace", self.anatomy.matrices, change)

    def interpolations(self) -> Iterator[Edit]:
        """The matrices, and all weights, on the straight line from the peak (0) to the end (1)."""
        for a in (0.0, *self.settings.interpolation, 1.0):
            change = partial(lambda a, n: torch.lerp(self.peak[n].double(), self.end[n].double(), a), a)
            yield self._edit(f"interpolation {a:g}", "interpolation", self.anatomy.matrices, change)
            if 0 < a < 1:
                yield self._edit(f"interpolation of all weights {a:g}", "interpolation", list(self.end), change)
        for put_back in COORDINATES:
            yield Edit(f"coordinates {put_back:g}", "interpolation", partial(self._coordinates, put_back))

    def random_changes(self) -> Iterator[Edit]:
        """The peak with its matrices changed at random by as much as SFT has changed them, and by SFT itself."""
        yield self._of_peak("peak + SFT's change", lambda n: self.end[n])
        for name, make in CHANGES.items():
            change = partial(lambda make, n: self.peak[n].double() + make(self._change(n), self._draw(0, n)), make)
            yield self._of_peak(f"peak + {name}", change)
        moved = cache(self._next_layer)
        yield self._of_peak("peak + next layer's change", lambda n: self.peak[n].double() + moved()[n])

    def thirds(self) -> dict[str, list[str]]:
        """The matrices, and each third of the layers that holds some."""
        return {"matrices": self.anatomy.matrices} | {third: n for third, n in self.anatomy.thirds.items() if n}

    def groups(self) -> dict[str, list[str]]:
        """What projections are applied to, by the end of their names: all matrices, and each third if wanted."""
        thirds = self.thirds() if self.settings.thirds else {}
        return {"": self.anatomy.matrices} | {f", {name}": n for name, n in thirds.items() if name != "matrices"}

    def norm(self, weights: Weights, other: Weights | None = None) -> float:
        """L2 distance of the matrices from those of the peak, or of another model."""
        other = self.peak if other is None else other
        found = ((weights[n].double() - other[n].double()).square().sum() for n in self.anatomy.matrices)
        return sum(map(float, found)) ** 0.5

    def _edit(self, name: str, family: Family, names: Sequence[str], change: Callable[[str], Tensor]) -> Edit:
        """The end with the named weights as `change` makes them."""
        return Edit(name, family, lambda: ({**self.end, **{n: change(n).float() for n in names}}, {}))

    def _of_peak(self, name: str, change: Callable[[str], Tensor]) -> Edit:
        """The peak with its matrices as `change` makes them."""
        return Edit(
            name,
            "random change",
            lambda: ({**self.peak, **{n: change(n).float() for n in self.anatomy.matrices}}, {}),
        )

    def _change(self, name: str) -> Tensor:
        return self.end[name].double() - self.peak[name].double()

    def _projected(self, kind: str, end: End, k: str, name: str) -> Tensor:
        of = self.peak_svd(name)
        u, v = edits.bases(of, dimension(k, len(of.s)), end)
        return PROJECTIONS[kind](self.end[name].double(), self.peak[name].double(), u, v)

    def _healed(self, where: str, kind: str, k: str, end: End | None, name: str) -> Tensor:
        """The end with RL's change inside or outside subspaces of its own; random ones without an `end`."""
        start, of = self.end[name].double(), self.end_svd(name)
        u, v = edits.bases(of, dimension(k, len(of.s)), end) if end else self._subspaces(k, 0, name)
        change = self.rl[name].double() - start
        part = PARTS[kind](change, u, v)
        return start + (part if where == "inside" else change - part)

    def _at_random(self, make: Callable[..., Tensor], k: str, seed: int, name: str) -> Tensor:
        return make(self.end[name].double(), self.peak[name].double(), *self._subspaces(k, seed, name))

    def _subspaces(self, k: str, seed: int, name: str) -> tuple[Tensor, Tensor]:
        """Random ones of a dimension, left and right."""
        m, n = self.end[name].shape
        draw, size = self._draw(seed, name), dimension(k, min(m, n))
        return orthonormal(m, size, draw), orthonormal(n, size, draw)

    def _next_layer(self) -> dict[str, Tensor]:
        """SFT's change of each matrix as that of the same kind in the next layer."""
        kinds = self.anatomy.kinds.values()
        found = [zip(names, next_layer([self._change(n) for n in names]), strict=True) for names in kinds]
        return {name: change for pairs in found for name, change in pairs}

    def _published_pairs(self, family: Family, prefix: str, tuned: Model, base: Model) -> Iterator[Edit]:
        """On everything with two dimensions, embedding and head too, as the authors' code."""
        width = max(min(self.end[n].shape) for n in self.with_two_dimensions)
        for pair, with_values in product(self.settings.published, (True, False)):
            ranks = tuple(round(share(text) * width) for text in pair)
            what = "values and directions" if with_values else "directions"
            name = f"{prefix}as published, {what}, top {pair[0]} tail {pair[1]}"
            yield Edit(name, family, partial(self._published, tuned, base, ranks, with_values))

    def _published(
        self, tuned: Model, base: Model, ranks: Sequence[int], with_values: bool
    ) -> tuple[Weights, dict[str, float]]:
        (weights, of), (before, of_before) = tuned, base
        made = {
            n: edits.as_published(of(n), of_before(n), *ranks, with_values=with_values)
            for n in self.with_two_dimensions
        }
        changed = {n: before[n] if one.early else one.weight.float() for n, one in made.items()}
        early = sum(one.early for one in made.values()) / len(made)
        worst = max(one.orthonormality for one in made.values())
        return {**weights, **changed}, {"orthonormality": worst, "early": early}

    def _coordinates(self, put_back: float) -> tuple[Weights, dict[str, float]]:
        peak, end = ({n: weights[n] for n in self.anatomy.matrices} for weights in (self.peak, self.end))
        return {**self.end, **prune(peak, end, put_back, "random")[0]}, {}

    def _rows(self, name: str) -> Tensor:
        rows = self.end[name].clone()
        rows[self.untrained] = self.peak[name][self.untrained]
        return rows

    def _draw(self, seed: int, name: str) -> Generator:
        """A generator of the base's and the matrix's own."""
        return Generator().manual_seed(1_000_000 * self.seed + 10_000 * seed + self.anatomy.matrices.index(name))


def _svd_of(weights: Weights, name: str) -> Svd:
    return svd(weights[name])
