"""The one file that knows DTensor: local shards, full tensors, and the strategies that are supported."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from mifo_callbacks.collectives import rank, sum_over


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of `module` that require a gradient, by name; tied weights appear once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, detached, in the same memory; all of it when it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_group(tensors: Iterable[Tensor]) -> dist.ProcessGroup | None:
    """The ranks that hold the other shards of `tensors`; None when every rank holds all of them.

    Raises:
        MisconfigurationException: If the tensors are not all sharded over the same ranks.
    """
    groups = {_shard_group(t) for t in tensors}
    if len(groups) > 1:
        raise MisconfigurationException(
            "some trainable parameters are sharded and others are not, or over other ranks; "
            "allowed: all of them under one `fully_shard` mesh (apply it to the root module too)"
        )
    return groups.pop() if groups else None


def _shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    if not isinstance(tensor, DTensor):
        return None
    dims = [i for i, placement in enumerate(tensor.placements) if placement.is_shard()]
    if len(dims) > 1:
        raise MisconfigurationException(f"a parameter is sharded over {len(dims)} mesh dimensions; allowed: one")
    return tensor.device_mesh.get_group(dims[0]) if dims else None


def full_on_first_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full plain tensors for a checkpoint, in the order given; collective when the tensors are sharded.

    Lightning writes the callback state of rank 0 only, so for sharded tensors the other ranks keep nothing.
    """
    gathered = {}
    for name, tensor in tensors.items():
        whole = full(tensor)
        if whole is tensor:
            gathered[name] = tensor
        elif rank() == 0:
            gathered[name] = whole.cpu()
    return gathered


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor`, the same full tensor on every rank, laid out like `parameter`; no communication.

    A tensor that already is a DTensor is only moved to the parameter's device.

    Raises:
        MisconfigurationException: If the shapes differ.
    """
    if tensor.shape != parameter.shape:
        raise MisconfigurationException(
            f"a stored tensor has shape {tuple(tensor.shape)}; its parameter has {tuple(parameter.shape)}"
        )
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor.to(parameter.device)
    part = tensor
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            pieces = part.chunk(parameter.device_mesh.size(dim), dim=placement.dim)
            place = parameter.device_mesh.get_local_rank(dim)
            part = pieces[place] if place < len(pieces) else part.narrow(placement.dim, 0, 0)
    return as_part(part.to(parameter.device, copy=True), parameter)


def as_part(part: Tensor, parameter: Tensor) -> Tensor:
    """`part`, this rank's shard of a tensor of the parameter's shape, as a tensor laid out like it."""
    if not isinstance(parameter, DTensor):
        return part
    layout = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, *layout, run_check=False, shape=parameter.shape, stride=parameter.stride())


def require_data_parallel(trainer: Trainer, who: str) -> None:
    """Raise unless all ranks are data-parallel: token and question counts are summed over all of them."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    size = strategy.device_mesh["data_parallel"].size()
    if size != strategy.world_size:
        raise MisconfigurationException(
            f"{who} needs data-parallel ranks, but ModelParallelStrategy has data_parallel_size={size} on "
            f"{strategy.world_size} ranks; allowed: data_parallel_size={strategy.world_size}, "
            "tensor_parallel_size=1"
        )


def require_visible_weights(trainer: Trainer, pl_module: LightningModule, who: str) -> None:
    """Raise unless the weights can be read and written around the optimizer's step, under one sharding."""
    for refused in (DeepSpeedStrategy, FSDPStrategy):
        if isinstance(trainer.strategy, refused):
            raise MisconfigurationException(
                f"{who} cannot see the weights around the optimizer step under {refused.__name__}; "
                "allowed: single device, DDP, or ModelParallelStrategy (FSDP2) with data-parallel ranks only"
            )
    require_data_parallel(trainer, who)
    shard_group(trainable(pl_module).values())


def usable(params: Iterable[nn.Parameter]) -> bool:
    """Whether there is a gradient and all of it is finite, on every rank: a scaled one may overflow; collective."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return False
    wrong = torch.stack([local(grad).isfinite().logical_not().sum() for grad in grads]).sum()
    return not int(sum_over(wrong, shard_group(grads)))
