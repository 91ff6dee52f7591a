"""SubspaceFreezing: SFT leaves main directions of each matrix alone, those in which RL has just moved it or its own."""

from collections.abc import Iterator
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from mifo_callbacks.seeds import Seed
from mifo_lightning.common.errors import require
from mifo_lightning.methods.directions import at_random, singular_directions
from mifo_lightning.methods.protection import Protection, refuse_freezing

Of = Literal["rl", "weights"]
Selector = Literal["top", "random"]
Sides = Literal["either", "both"]


class SubspaceFreezing(Protection):
    """Take k directions on each side of each matrix out of what SFT moves.

    They are the first singular directions U_k, V_k of D, what the last RL phase has moved the matrix by, or of the
    matrix itself where the SFT phase begins: SFT orthogonal to its top-k subspaces (after arXiv 2509.12235, version 3,
    of which we know no details: sides and matrices are ours). With P = U_k U_k^T, Q = V_k V_k^T and E = W - W_0 since
    the SFT phase began, "either" side takes out P E + E Q - P E Q, so that U_k^T W and W V_k stand still: k (n + m - k)
    of n m dimensions. "both" sides take out P E Q, k^2 dimensions, so that U_k^T W V_k stands still, as
    `DirectionFreezing` does for adapters. The gradient is projected ahead of clipping, and what AdamW moves all the
    same is taken back after each step, to rounding. Weights that are no matrices are free. Costs a copy of the
    matrices, k (n + m) numbers each, and a decomposition of each in fp64 in every phase.

    Args:
        k: Directions of each matrix, or, below 1, a share of its smaller side (rounded, at least 1); fewer where what
            is decomposed has fewer.
        sides: Whether what is taken out has "either" side in these directions, or "both".
        selector: The directions of the largest singular values ("top"), or as many at random (a control).
        of: What is decomposed: the displacement by the last "rl" phase, or the "weights" where an SFT phase begins.
        matrices: Names such as q_proj of the matrices that it looks at; null: all, embedding and head too, whose rows
            are tokens, so that a token that is never met is moved with the others.
        seed: Seed of random directions; null follows `seed_everything`.

    Raises:
        InputError: If a setting is not allowed; when training starts, with adapters or sharded weights, or where there
            is no such matrix.
    """

    group = "subspace"
    needs_whole = True

    def __init__(
        self,
        k: float = 16,
        sides: Sides = "either",
        selector: Selector = "top",
        of: Of = "rl",
        matrices: list[str] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        good = 0 < k < 1 or (k >= 1 and float(k).is_integer())
        require("subspace.k", k, good, "a whole number from 1 on, or a share between 0 and 1")
        require("subspace.sides", sides, sides in ("either", "both"), "either or both")
        require("subspace.of", of, of in ("rl", "weights"), "rl or weights")
        require("subspace.selector", selector, selector in ("top", "random"), "top or random")
        known = matrices is None or (not isinstance(matrices, str) and len(matrices) > 0)
        require("subspace.matrices", matrices, known, "at least one name such as q_proj, or null")
        self.k, self.of, self.selector = k, of, selector
        self.matrices = None if matrices is None else list(matrices)
        self.sides: Sides = sides
        self.seed = Seed(seed, "subspace.seed")
        self._phases = 0  # decompositions so far: random directions depend on it
        self._start: dict[str, Tensor] = {}  # the matrices when the running phase began
        self._held: dict[str, dict[str, Tensor]] = {}  # by matrix: u [n, k] and v [m, k]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be decomposed, and place what a checkpoint held."""
        super().on_train_start(trainer, pl_module)
        self.preflight(trainer)
        for held in (self._start, *self._held.values()):
            held.update({name: tensor.to(pl_module.device) for name, tensor in held.items()})

    def preflight(self, trainer: Trainer, *rest: Any) -> None:
        """Refuse what would move the weights that it holds, and matrices that are not there."""
        refuse_freezing(trainer, "subspace")
        kinds = {kind_of(name) for name, p in trainer.lightning_module.named_parameters() if p.ndim == 2}
        for kind in self.matrices or ():
            require("subspace.matrices", kind, kind in kinds, f"some of {', '.join(sorted(kinds))}, or null")

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Where RL ends, or SFT begins, find the directions; note where each phase begins."""
        matrices = self._chosen(pl_module)
        if self.of == "weights" and current == "sft":
            self._held = self._directions(matrices, {})
        elif self.of == "rl" and previous == "rl":
            self._held = self._directions(matrices, self._start)
        self._start = {name: p.clone() for name, p in matrices.items()}
        if current == "sft" and not self._held and self.of == "rl":
            rank_zero_warn("subspace: SFT begins before RL has moved anything: nothing is frozen")

    def _chosen(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """The matrices that are looked at, by name."""
        every = {name: p.detach() for name, p in self.trained(pl_module).items() if p.ndim == 2}
        return {name: p for name, p in every.items() if self.matrices is None or kind_of(name) in self.matrices}

    def _directions(self, matrices: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Those of what each has moved by since `start`, or of itself where that has none."""
        found = {}
        self._phases += 1
        for position, (name, matrix) in enumerate(matrices.items()):
            k = int(self.k) if self.k >= 1 else max(1, round(self.k * min(matrix.shape)))
            u, v = singular_directions(matrix - start[name] if start else matrix, k)
            if self.selector == "random":
                u, v = at_random(u, v, self.seed.value, self._phases, position)
            if u.shape[1]:
                found[name] = {"u": u, "v": v}
        return found

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the held directions out of the gradient."""
        for _, p, u, v in self._matrices(pl_module, optimizer):
            if p.grad is not None:
                p.grad -= component(p.grad, u, v, self.sides)

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take them out of what has moved since the phase began, so that rounding does not add up."""
        for start, p, u, v in self._matrices(pl_module, optimizer):
            p.data -= component(p.data - start, u, v, self.sides)

    def _matrices(
        self, pl_module: LightningModule, optimizer: Optimizer
    ) -> Iterator[tuple[Tensor, nn.Parameter, Tensor, Tensor]]:
        """Where it began, the matrix, u and v, of each that has directions."""
        for name, p in self.stepped(pl_module, optimizer):
            if name in self._held and name in self._start:
                yield self._start[name], p, self._held[name]["u"], self._held[name]["v"]

    def state_dict(self) -> dict[str, Any]:
        """Directions, and the matrices where the running phase began."""
        return super().state_dict() | {
            "number": self._phases,
            "seed": self.seed.settled,
            "start": dict(self._start),
            "held": {name: dict(pair) for name, pair in self._held.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self._phases = state_dict["number"]
        self.seed.restore(state_dict["seed"])
        self._start = dict(state_dict["start"])
        self._held = {name: dict(pair) for name, pair in state_dict["held"].items()}


def kind_of(name: str) -> str:
    """What a weight is called in its layer, such as q_proj."""
    return name.removesuffix(".weight").rpartition(".")[2]


def component(of: Tensor, u: Tensor, v: Tensor, sides: Sides) -> Tensor:
    """The part of a matrix [n, m] with either side, or both, in the space of u [n, k] or v [m, k], both orthonormal."""
    left = u @ (u.T @ of)
    if sides == "both":
        return (left @ v) @ v.T
    return left + ((of - left) @ v) @ v.T
