"""Tensors that say that they are on a GPU and compute on the CPU: what would raise there raises here, and waits show.

A real GPU refuses an operation on tensors of two devices, and every look at a number makes the CPU wait for it; on a
CPU neither is seen. Values are the CPU's, so results can be compared.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
# operations whose result, or whose size, the CPU has to wait for
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}
# that take indices from the CPU, at the price of a copy
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class OnGPU(Tensor):
    """A tensor whose numbers are those of `held`, on the CPU."""

    held: Tensor
    waits: Counter[str] = Counter()  # by file and line of this project, all tensors together

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        made: OnGPU = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cpu",
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        check(func, name, args, kwargs)
        found = func(*_held(args), **{key: _held(x) for key, x in kwargs.items()})
        wrapped = tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, found)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _held(x: Any) -> Any:
    if isinstance(x, OnGPU):
        return x.held
    return type(x)(map(_held, x)) if isinstance(x, (list, tuple)) and not isinstance(x, torch.Size) else x


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for part in x for t in _tensors(part)] if isinstance(x, (list, tuple)) else []


def check(func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Raise where devices are mixed as CUDA would; note where the CPU waits."""
    tensors = _tensors([*args, *kwargs.values()])
    here = [x for x in tensors if not isinstance(x, OnGPU)]
    by_mask = name in INDEXED and any(x.dtype == torch.bool for x in _tensors(args[1]))
    copied = name == "copy_"
    if name in WAITS or by_mask or (copied and here):
        OnGPU.waits[where(name)] += 1
    if not here or copied:
        return
    if name in INDEXED and isinstance(args[0], OnGPU):
        OnGPU.waits[where(name)] += 1
        return
    numbers = (torch.Tag.pointwise in func.tags or name == "fill_") and all(x.dim() == 0 for x in here)
    if not numbers:
        raise RuntimeError(f"{name}: tensors on {GPU} and on the CPU, at {where(name)}")


def where(name: str) -> str:
    """The innermost line of this project, tests left out."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and "tests" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {name}"
        frame = frame.f_back  # type: ignore[assignment]
    return name


class PretendGPU(TorchFunctionMode):
    """Inside, what is made on or moved to `GPU` is an `OnGPU`."""

    def __init__(self) -> None:
        super().__init__()
        OnGPU.waits = Counter()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.backward:  # what functions of our own do in it is to be seen too
            super().__enter__()
            try:
                run: Any = torch.autograd.graph._engine_run_backward
                ones = (torch.ones_like(args[0]),)
                return run((args[0],), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)
            finally:
                super().__exit__(None, None, None)
        if func is torch.Tensor.tolist and isinstance(args[0], OnGPU):
            OnGPU.waits[where("tolist")] += 1
            return args[0].held.tolist()
        if func is torch.Tensor.to:
            devices = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, (torch.device, str))]
            rest = [x for x in args[1:] if isinstance(x, torch.dtype)]
            here = args[0]
            if devices and (torch.device(devices[0]).type == "cuda") != isinstance(here, OnGPU):
                OnGPU.waits[where("to")] += 1
                here = here.held.clone() if isinstance(here, OnGPU) else OnGPU(here.detach().clone())
            rest += [kwargs["dtype"]] if kwargs.get("dtype") is not None else []
            return func(here, *rest) if rest else here
        if func is torch.Tensor.cpu:
            OnGPU.waits[where("cpu")] += 1
            return args[0].held.clone() if isinstance(args[0], OnGPU) else args[0]
        there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if there and not any(isinstance(x, OnGPU) for x in _tensors(args)):
            if func is torch.tensor:
                OnGPU.waits[where("tensor")] += 1
            return OnGPU(func(*args, **kwargs | {"device": torch.device("cpu")}))
        return func(*args, **kwargs)


def moved(module: nn.Module) -> nn.Module:
    """The module with its weights and buffers on `GPU`; tied ones stay tied."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                if id(p) not in known:
                    known[id(p)] = nn.Parameter(OnGPU(p.data), p.requires_grad)
                part._parameters[name] = known[id(p)]
        for name, b in list(part._buffers.items()):
            if b is not None:
                part._buffers[name] = OnGPU(b)
    return module
