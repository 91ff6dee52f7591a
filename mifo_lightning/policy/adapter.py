"""LoRA (arXiv 2106.09685): W + (alpha / rank) B A beside frozen linear layers, put inside the model by peft."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mifo_callbacks.sharding import full
from mifo_lightning.common.errors import InputError, require
from mifo_lightning.policy.policy import Policy

ALL = "all-linear"
SHOWN = 8  # names of layers in a message
FINGERPRINT = "adapter_base"  # buffer of a policy: which base the adapter belongs to


@dataclass(frozen=True)
class Adapter:
    """Which low-rank adapters are trained in place of the weights.

    Args:
        rank: r; each adapted layer of m inputs and n outputs has r (m + n) weights more.
        alpha: An adapter's output is multiplied by alpha / rank.
        targets: all-linear, which leaves the output head out, or the last parts of names of linear layers.
        frozen_a: Whether A is random with orthonormal rows and stands still, so that only B is trained: importance and
            freezing of B's coordinates are then exact, as B is all that the change of W depends on.
        per_phase: Whether RL and SFT train an adapter each, whose sum the model runs with; the other one stands still.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    frozen_a: bool = False
    per_phase: bool = False

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed; also where peft is missing."""
        require(f"{key}.rank", self.rank, self.rank >= 1, "at least 1")
        require(f"{key}.alpha", self.alpha, 0 < self.alpha < float("inf"), "above 0")
        named = self.targets == ALL or (isinstance(self.targets, list) and bool(self.targets))
        require(f"{key}.targets", self.targets, named, f"{ALL} or a list of names")
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise InputError(f"{key}: needs peft; pip install mifo_lightning[lora]") from error

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters of each layer."""
        return ("rl", "sft") if self.per_phase else ("lora",)

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The linear layers of a model without adapters that get one, by name.

        Raises:
            InputError: A target names none, or a layer has fewer inputs than the rank.
        """
        head = model.get_output_embeddings()
        linear: dict[str, nn.Module]
        linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
        if self.targets != ALL:
            for target in self.targets:
                if not any(_ends(name, target) for name in linear):
                    kinds = ", ".join(list(dict.fromkeys(name.rpartition(".")[2] for name in linear))[:SHOWN])
                    raise InputError(
                        f"model.adapter.targets: {target!r} is not allowed; linear layers of {type(model).__name__} "
                        f"are {kinds}"
                    )
            linear = {name: m for name, m in linear.items() if any(_ends(name, target) for target in self.targets)}
        if not linear:
            raise InputError(f"model.adapter: {type(model).__name__} has no linear layers; set it to null")
        name, inputs = min(((name, _sizes(m)[0]) for name, m in linear.items()), key=lambda one: one[1])
        require("model.adapter.rank", self.rank, self.rank <= inputs, f"at most {inputs}, the inputs of {name}")
        return linear

    def shapes(self, model: PreTrainedModel) -> dict[str, torch.Size]:
        """Shapes of the adapters' weights by their names in the model, which has none yet."""
        return {
            f"{name}.lora_{part}.{adapter}.weight": torch.Size(shape)
            for name, layer in self.layers(model).items()
            for adapter in self.names
            for part, shape in (("A", (self.rank, _sizes(layer)[0])), ("B", (_sizes(layer)[1], self.rank)))
        }


class Change(NamedTuple):
    """The change of one weight as `left` [n, k] @ `right` [k, m], fp32; `before` and `after` are B and A then.

    Both factors are as small as the change is, so that nothing cancels in the product.
    """

    left: Tensor
    right: Tensor

    def squares(self) -> Tensor:
        """The squared Frobenius norm, fp64, by way of two [k, k] products."""
        left, right = self.left.double(), self.right.double()
        return ((left.T @ left) * (right @ right.T)).sum()


class Adapters:
    """The adapters inside a policy's model, which stays the same object with the same methods.

    Args:
        model: Its layers have been replaced.
        settings: What they were made by.
    """

    def __init__(self, model: PreTrainedModel, settings: Adapter) -> None:
        from peft.tuners.lora import LoraLayer

        self.settings = settings
        self.scale = settings.alpha / settings.rank
        self.layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it was before training."""
        # not by peft's `enable_adapters`, which trains all that it enables, a frozen A too
        for layer in self.layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer._disable_adapters = False

    def keep_still(self, phase: str) -> None:
        """Let go of the gradient of the adapter that another kind of phase trains: AdamW leaves it alone then."""
        if self.settings.per_phase:
            for layer in self.layers.values():
                for name in set(self.settings.names) - {phase}:
                    for part in (layer.lora_A, layer.lora_B):
                        part[name].weight.grad = None

    def plain(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a model without adapters that computes the same, by its names; nothing is changed in place.

        Args:
            weights: `state_dict` of the model with adapters, whole tensors.
        """
        merged = {}
        for name, weight in weights.items():
            if ".lora_" in name:
                continue
            layer, _, rest = name.rpartition(".base_layer.")
            merged[f"{layer}.{rest}" if layer else name] = (
                self.merged(layer, weights) if layer and rest == "weight" else weight
            )
        return merged

    def merged(self, layer: str, weights: Mapping[str, Tensor]) -> Tensor:
        """The whole weight of an adapted layer, as it lies, with its adapters, fp32; collective if they are sharded.

        Args:
            layer: Its name, in the model or in a module around it.
            weights: By names that begin alike.
        """
        a, b = self._factors(layer, weights)
        weight, change = full(weights[f"{layer}.base_layer.weight"]).detach(), b @ a * self.scale
        return weight + (change if weight.shape == change.shape else change.T)

    def changes(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[tuple[str, Change]]:
        """Name of each adapted layer in the module, and the change of its weight; collective if they are sharded.

        Args:
            before: Weights by their names in the module; what did not change may be missing.
            after: All parameters of the module.
        """
        prefix = next(name for name in after if ".lora_A." in name).split(next(iter(self.layers)))[0]
        for name in self.layers:
            a0, b0 = self._factors(prefix + name, {**after, **before})
            a1, b1 = self._factors(prefix + name, after)
            yield prefix + name, Change(torch.cat([b1 - b0, b0], 1) * self.scale, torch.cat([a1, a1 - a0]))

    def _factors(self, layer: str, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A [k, m] and B [n, k] of all adapters of a layer, one below and beside the other."""
        a, b = (
            [full(weights[f"{layer}.lora_{part}.{name}.weight"]).detach() for name in self.settings.names]
            for part in ("A", "B")
        )
        return torch.cat(a), torch.cat(b, 1)


def adapters_of(module: nn.Module) -> Adapters | None:
    """The adapters that a module trains in place of its weights; None where it trains the weights."""
    return getattr(getattr(module, "policy", None), "adapter", None)


def add_adapters(policy: Policy, settings: Adapter, seed: int) -> None:
    """Freeze the weights of a policy and put adapters beside them, which change nothing before they are trained: B = 0.

    Args:
        policy: Whole, in fp32.
        settings: Which adapters.
        seed: Of A, which is the same on all ranks.

    Raises:
        InputError: The model has adapters already, or `Adapter.layers` refuses a setting.
    """
    base = fingerprint(policy.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy.adapter = put_beside(policy.model, settings)
    policy.register_buffer(FINGERPRINT, base)
    policy.register_state_dict_post_hook(_without_base)  # type: ignore[no-untyped-call]
    policy.register_load_state_dict_pre_hook(_with_base)  # type: ignore[no-untyped-call]


def put_beside(model: Any, settings: Adapter) -> Adapters:
    """Freeze the weights of a model and put adapters beside them; arguments and errors as of `add_adapters`."""
    from peft import LoraConfig, inject_adapter_in_model

    if any("lora_" in name for name, _ in model.named_parameters()):
        raise InputError("model.adapter: the model has LoRA layers already; merge them, or give adapter: null")
    targets = list(settings.layers(model))
    config = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": targets, "bias": "none"}
    for name in settings.names:
        with warnings.catch_warnings():  # that there are several is meant
            warnings.simplefilter("ignore")
            inject_adapter_in_model(LoraConfig(**config), model, name)  # type: ignore[arg-type]
    model.requires_grad_(False)
    adapters = Adapters(model, settings)
    for layer in adapters.layers.values():
        layer.set_adapter(list(settings.names))
        for name in settings.names:
            a = layer.lora_A[name].weight
            if settings.frozen_a:
                a.data = torch.linalg.qr(torch.randn(a.shape[::-1]))[0].T.contiguous().to(a)
                a.requires_grad_(False)
    model.eval()
    return adapters


def _without_base(policy: Any, weights: dict[str, Any], prefix: str, _: Any) -> None:
    """Checkpoints hold the adapters alone: the base is where it was loaded from. Lightning's FSDP2 wants it there."""
    if not isinstance(policy, FSDPModule):
        for name in [name for name in weights if name.startswith(prefix) and not _is_own(name)]:
            del weights[name]


def _is_own(name: str) -> bool:
    """Whether a weight of a policy with adapters is none of the base."""
    return ".lora_" in name or name.endswith(FINGERPRINT)


def own_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a checkpoint's weights is no base of adapters."""
    return {name: weight for name, weight in weights.items() if _is_own(name)}


def _with_base(policy: Any, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the base that is there, if it is the one that the adapters were trained on."""
    there, here = weights.get(prefix + FINGERPRINT), getattr(policy, FINGERPRINT)
    if there is not None and not torch.equal(there.cpu(), here.cpu()):
        raise InputError("ckpt_path: its adapters were trained beside other weights than those of model.model")
    for name, weight in policy.model.state_dict().items():
        if not _is_own(name):
            weights.setdefault(f"{prefix}model.{name}", weight)


def fingerprint(model: nn.Module) -> Tensor:
    """[1] int64: the sum of the bits of all fp32 weights, the same in whatever order it is taken.

    Collective if they are sharded.
    """
    bits = (full(p.detach()).view(torch.int32) for p in model.parameters())
    return torch.stack([b.sum(dtype=torch.int64) for b in bits]).sum()[None]


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    weight: Any = layer.weight
    return weight.shape[0], weight.shape[1]
