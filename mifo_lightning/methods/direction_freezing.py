"""DirectionFreezing: SFT leaves the directions alone in which RL has just moved the weights beside adapters."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mifo_callbacks.phase import PhaseCallback
from mifo_callbacks.seeds import Seed
from mifo_callbacks.sharding import trainable
from mifo_lightning.common.errors import InputError, require
from mifo_lightning.methods.directions import SMALL, at_random
from mifo_lightning.methods.protection import refuse_freezing
from mifo_lightning.policy.adapter import Change, adapters_of

Selector = Literal["rl_topk", "random"]


class DirectionFreezing(PhaseCallback):
    """Freeze, in each layer with an adapter, the k directions in which the last RL phase moved the weight most.

    Of RL's change D = U S V^T the first k columns of U and V are kept; through an SFT phase U_k^T B and A V_k stand
    still: the gradient is projected ahead of clipping, and what AdamW moves all the same is taken back after each step.
    So U_k^T (B A) V_k is what RL made it, to rounding, whatever the phase does. It follows from D alone, which many
    pairs of B and A have, where freezing coordinates of B and A depends on the pair (O-LoRA, arXiv 2310.14152, with RL
    as the earlier task). Costs one copy of the adapters and r x r decompositions, no matrix of a weight's size.

    Args:
        k: Directions of each layer; D has at most 2 r times the number of adapters, and fewer are frozen where it has.
        selector: The directions of RL's largest singular values, or as many at random (a control).
        seed: Seed of random directions; null follows `seed_everything`.

    Raises:
        InputError: If k is not allowed; when training starts, if the module has no adapters or they are sharded.
    """

    def __init__(self, k: int = 8, selector: Selector = "rl_topk", seed: int | None = None) -> None:
        super().__init__(acts_on="sft")
        require("directions.k", k, k >= 1, "at least 1")
        require("directions.selector", selector, selector in ("rl_topk", "random"), "rl_topk or random")
        self.k, self.selector = k, selector
        self.seed = Seed(seed, "directions.seed")
        self._phases = 0  # how many have been frozen: random directions depend on it
        self._start: dict[str, Tensor] = {}  # the adapters when the RL phase under way began
        self._held: dict[str, dict[str, Tensor]] = {}  # by layer: u [n, k] and v [m, k]
        self._still: dict[str, Tensor] = {}  # by weight: U^T B [k, r] or A V [r, k]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no adapters that can be seen whole."""
        super().on_train_start(trainer, pl_module)
        self.preflight(trainer)
        if adapters_of(pl_module) is None:
            raise InputError("directions: needs adapters; set model.adapter, or take freeze")
        if any(isinstance(p, DTensor) for p in pl_module.parameters()):
            raise InputError("directions: is not allowed with sharded weights; take DDP, or freeze")
        for state in (self._start, self._still, *self._held.values()):
            state.update({name: tensor.to(pl_module.device) for name, tensor in state.items()})

    def preflight(self, trainer: Trainer, *rest: Any) -> None:
        """Refuse what would move the weights that it holds."""
        refuse_freezing(trainer, "directions")

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Note where RL begins, and hold on to its directions where SFT does."""
        if previous == "rl":
            self._held = self._directions(pl_module)
        self._still = {}
        if current == "rl":
            self._start = {name: p.detach().clone() for name, p in trainable(pl_module).items()}
            return
        self._start = {}
        self._phases += 1
        for name, p, directions in self._weights(pl_module):
            self._still[name] = directions.T @ p.detach() if _is_b(name) else p.detach() @ directions
        if not self._still:
            rank_zero_warn("directions: SFT begins before RL has moved anything: nothing is frozen")

    def _directions(self, pl_module: LightningModule) -> dict[str, dict[str, Tensor]]:
        adapters = adapters_of(pl_module)
        assert adapters is not None, "asked for when training started"
        found = {}
        for position, (layer, change) in enumerate(adapters.changes(self._start, dict(pl_module.named_parameters()))):
            u, v = top_directions(change, self.k)
            if self.selector == "random":
                u, v = at_random(u, v, self.seed.value, self._phases, position)
            if u.shape[1]:
                found[layer] = {"u": u, "v": v}
        return found

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the held directions out of the gradient."""
        for name, p, directions in self._weights(pl_module):
            if p.grad is not None and name in self._still:
                p.grad -= _component(name, p.grad, directions)

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Put the weights' components along them back: AdamW's second moments and weight decay turn the step."""
        for name, p, directions in self._weights(pl_module):
            if p.grad is not None and name in self._still:
                still = self._still[name]
                wanted = directions @ still if _is_b(name) else still @ directions.T
                p.data += wanted - _component(name, p.data, directions)

    def _weights(self, pl_module: LightningModule) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Name, weight and [n or m, k] directions of every trained B and A of a layer that holds some."""
        for name, p in trainable(pl_module).items():
            held = self._held.get(name.partition(".lora_")[0])
            if held is not None and ".lora_" in name:
                yield name, p, held["u" if _is_b(name) else "v"]

    def state_dict(self) -> dict[str, Any]:
        """Directions, what stands still, and the adapters at the start of the RL phase under way."""
        return super().state_dict() | {
            "number": self._phases,
            "seed": self.seed.settled,
            "start": dict(self._start),
            "held": {layer: dict(pair) for layer, pair in self._held.items()},
            "still": dict(self._still),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self._phases = state_dict["number"]
        self.seed.restore(state_dict["seed"])
        self._start, self._still = dict(state_dict["start"]), dict(state_dict["still"])
        self._held = {layer: dict(pair) for layer, pair in state_dict["held"].items()}


@torch.no_grad()
def top_directions(change: Change, k: int) -> tuple[Tensor, Tensor]:
    """U_k [n, k] and V_k [m, k] of the largest singular values of a change, fewer where it has fewer.

    By QR of both factors and the singular value decomposition of the small core; in fp64 inside, fp32 outside.
    """
    (left, a), (right, b) = (torch.linalg.qr(factor.double()) for factor in (change.left, change.right.T))
    u, sizes, vt = torch.linalg.svd(a @ b.T)
    kept = min(k, int((sizes > SMALL * sizes[0]).sum()))
    return (left @ u[:, :kept]).float(), (right @ vt[:kept].T).float()


def _component(name: str, of: Tensor, directions: Tensor) -> Tensor:
    """The part of B, or of A, or of a gradient of one, that lies along directions."""
    return directions @ (directions.T @ of) if _is_b(name) else (of @ directions) @ directions.T


def _is_b(name: str) -> bool:
    return ".lora_B." in name
