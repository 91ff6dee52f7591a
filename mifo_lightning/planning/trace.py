"""How many bytes the model's own forward and backward passes keep alive, found by running them without any memory.

Every operation runs on tensors that have a shape and no numbers (torch's FakeTensorMode), so that the autograd graph,
the casts of autocast and what gradient checkpointing leaves out are those of the model and not of a formula for it.
"""

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from mifo_lightning.common.errors import InputError
from mifo_lightning.planning.workload import DecodingBatch
from mifo_lightning.policy import running_scores
from mifo_lightning.policy.decoding import accepted
from mifo_lightning.policy.loading import recompute_layers
from mifo_lightning.policy.pretrained import first_line
from mifo_lightning.policy.slots import Slots
from mifo_lightning.policy.token_scores import token_scores
from mifo_lightning.rollout import sampler
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.sampler import next_token, uniforms

Bytes = dict[str, int]
"""Bytes by component: activations, logits, gradients, casts, cache."""


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while anything holds them.

    Args:
        label: The component that a tensor belongs to; None is not counted.
        known: Tensors that were there before.
        gradients: Share of a gradient that stays on this process.
    """

    def __init__(self, label: Callable[[Tensor], str | None], known: Iterator[Tensor], gradients: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label, self.gradients = label, gradients
        self.now: defaultdict[str, float] = defaultdict(float)
        self.peak: dict[str, float] = {}
        self._total = self._most = 0.0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            self._watch(tensor, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        if func is torch.ops.aten.nonzero.default:  # which places numbers would choose: all
            made = args[0].new_zeros(args[0].numel(), args[0].dim(), dtype=torch.long)
        else:
            made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                self._watch(tensor, self.label(tensor))
        return made

    def _watch(self, tensor: Tensor, label: str | None) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes() * (self.gradients if label == "gradients" else 1)
        self._seen[storage._cdata] = weakref.ref(storage, partial(self._gone, storage._cdata, label, size))
        if label is not None:
            self.now[label] += size
            self._total += size
            if self._total > self._most:
                self._most, self.peak = self._total, dict(self.now)

    def _gone(self, key: int, label: str | None, size: float, _: Any) -> None:
        self._seen.pop(key, None)
        if label is not None:
            self.now[label] -= size
            self._total -= size


class Tracer:
    """Runs the passes of one model without memory.

    Args:
        model: A causal LM on the meta device; it belongs to the tracer from now on.
        bf16: Whether passes run under autocast to bf16.
        checkpointing: Whether layers are recomputed in the backward pass.
        shards: Processes that share the gradients; 1 where each has them all.
        cpu: Whether it is for a CPU, where the head and the sampler work on pieces that stay in a core's cache.

    Raises:
        InputError: A pass cannot run without numbers, as where they choose which weights a token meets.
    """

    device = torch.device("cpu")

    def __init__(
        self, model: PreTrainedModel, bf16: bool, checkpointing: bool = False, shards: int = 1, cpu: bool = True
    ) -> None:
        self.bf16, self.shards, self.cpu = bf16, shards, cpu
        self._keeps_casts = False  # while sampling
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        if checkpointing:
            recompute_layers(model)
        with self._fake:
            self.model: Any = model.to_empty(device="cpu").eval()
        config = model.config.get_text_config(decoder=True)
        self._vocabulary = int(config.vocab_size)
        self._weights = {tuple(p.shape) for p in model.parameters()}
        self._weights |= {shape[::-1] for shape in self._weights}
        self._head: nn.Module = self.model.get_output_embeddings()

    def update(
        self, rows: int, prompts: int | None, prompt: int, response: int, chunks: int, entropy_gradient: bool
    ) -> Bytes:
        """At the peak of an optimizer step's passes, as of `OptimizerStep`: of several chunks a middle one.

        Args:
            rows: Of a chunk.
            prompts: Different prompts of a chunk, which run once each; None runs every row with its own.
            prompt: Tokens of each.
            response: Tokens of each.
            chunks: Of the optimizer step; from the second on gradients are there before a forward.
            entropy_gradient: Whether a gradient flows through the entropy.
        """
        with self._counting() as alive:
            if chunks > 1:
                for p in (p for p in self.model.parameters() if p.requires_grad):
                    p.grad = torch.empty_like(p)
            with self._precision():
                loss = self._scores(rows, prompts, prompt, response, entropy_gradient)
            loss.backward()
            del loss
            self.model.zero_grad(set_to_none=True)
        return self._found(alive)

    def scoring(self, rows: int, prompts: int | None, prompt: int, response: int) -> Bytes:
        """At the peak of scores without a gradient; arguments as of `update`."""
        with self._counting() as alive, self._sampling():
            self._scores(rows, prompts, prompt, response, False)
        return self._found(alive)

    def slots(self, batch: DecodingBatch, prompt: int, sampling: Sampling) -> Bytes:
        """At the peak of decoding in slots: prompts are read, a token is drawn, and the last one after all others.

        Args:
            batch: Rows decoded at once.
            prompt: Tokens of each prompt.
            sampling: How tokens are drawn, and how many.
        """
        width = prompt + sampling.max_new_tokens
        with self._counting(caches=True) as alive, self._sampling():
            policy: Any = self
            slots = Slots(policy, batch.slots, width, 0)
            # prompts differ in length, which needs a mask
            prompts = [[0] * (prompt if i else max(1, prompt - 1)) for i in range(batch.jobs)]
            logits = slots.enter(prompts, batch.samples)
            token = self._draw(logits, sampling)
            slots.columns = width - 1
            logits = slots.step(token)
            self._draw(logits, sampling)
        return self._found(alive)

    def growing(self, batch: DecodingBatch, prompt: int, sampling: Sampling) -> Bytes:
        """The same in a cache that grows; arguments as of `slots`."""
        rows, tokens = batch.rows, prompt + sampling.max_new_tokens - 1
        with self._counting(caches=True) as alive, self._sampling():
            self._decode(batch.jobs, prompt, DynamicCache(config=self.model.config), prompt)
            cache = DynamicCache(config=self.model.config)
            for i, (heads, width, dtype) in enumerate(self._cached_layers):
                states = torch.empty(rows, heads, tokens, width, dtype=dtype)
                cache.update(states, states, i)
            del states
            self._draw(self._decode(rows, 1, cache, tokens + 1), sampling)
        return self._found(alive)

    def decode(self, ids: Tensor, cache: Any, attention: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Any]:
        """As of `Policy`, for `Slots`."""
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        asked = {"attention_mask": attention, "position_ids": positions, "logits_to_keep": 1}
        arguments = accepted(self.model.forward, past_key_values=cache, **asked)
        with self._precision():
            return self.model(input_ids=ids, use_cache=True, **arguments).logits[:, -1], cache

    def cache_per_token(self, slots: bool) -> int:
        """Bytes that one token of one row takes in the cache, over all layers; slots hold autocast's dtype."""
        sizes = (2 if slots and self.bf16 else dtype.itemsize for _, _, dtype in self._cached_layers)
        return sum(2 * heads * width * n for (heads, width, _), n in zip(self._cached_layers, sizes, strict=True))

    @cached_property
    def _cached_layers(self) -> list[tuple[int, int, torch.dtype]]:
        """Heads, width and dtype of the keys of each layer, as a pass over one token leaves them."""
        with self._running(), torch.no_grad(), self._precision():
            cache: Any = DynamicCache(config=self.model.config)
            self._decode(1, 1, cache, 1)
        return [(k.shape[1], k.shape[3], k.dtype) for k in (layer.keys for layer in cache.layers)]

    # --- passes -------------------------------------------------------------------------------------------------

    def _scores(self, rows: int, prompts: int | None, prompt: int, response: int, entropy_gradient: bool) -> Tensor:
        """The sum of all log-probabilities of [rows, response], as `Policy.forward` makes them."""
        base = self.model.base_model
        with self._precision():
            row = torch.zeros(rows * response, dtype=torch.long)
            if prompts is None:
                ids = torch.zeros(rows, prompt + response, dtype=torch.long)
                hidden = base(input_ids=ids, **accepted(base.forward, use_cache=False)).last_hidden_state[row, row]
            else:
                cache = DynamicCache(config=self.model.config)
                first = self._base(prompts, prompt, cache, prompt)[:, -1:][torch.zeros(rows, dtype=torch.long)]
                cache.batch_select_indices(torch.zeros(rows, dtype=torch.long))
                rest = self._base(rows, max(response - 1, 1), cache, prompt + max(response - 1, 1))
                hidden = torch.cat([first, rest], 1)[:, :response][row, row]
                del cache
            logp, entropy = token_scores(self._head, hidden, row, entropy_gradient=entropy_gradient)
        return logp.sum() + entropy.sum()

    def _base(self, rows: int, tokens: int, cache: Any, seen: int) -> Tensor:
        states: Tensor = self.model.base_model(**self._cached(rows, tokens, cache, seen)).last_hidden_state
        return states

    def _draw(self, logits: Tensor, sampling: Sampling) -> Tensor:
        return next_token(logits, uniforms(torch.zeros(len(logits), dtype=torch.long), 0), sampling)[0]

    def _decode(self, rows: int, tokens: int, cache: Any, seen: int) -> Tensor:
        with self._precision():
            logits: Tensor = self.model(**self._cached(rows, tokens, cache, seen), logits_to_keep=1).logits
        return logits[:, -1]

    def _cached(self, rows: int, tokens: int, cache: Any, seen: int) -> dict[str, Any]:
        mask = torch.ones(rows, seen, dtype=torch.long)
        positions = torch.zeros(rows, tokens, dtype=torch.long)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
        }

    # --- counting -----------------------------------------------------------------------------------------------

    def _precision(self) -> AbstractContextManager[Any]:
        """The Trainer's own, whose autocast keeps no casts from one operation to the next, or that of `_sampling`."""
        if not self.bf16:
            return nullcontext()
        if self._keeps_casts:
            return torch.autocast("cpu", torch.bfloat16, cache_enabled=True)
        return MixedPrecision("bf16-mixed", "cpu").forward_context()

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """As `Policy.sampling`: no gradient, and casts of the weights are kept."""
        self._keeps_casts = True
        try:
            with torch.no_grad(), self._precision():
                yield
        finally:
            self._keeps_casts = False
            torch.clear_autocast_cache()

    @contextmanager
    def _running(self) -> Iterator[None]:
        pieces = sampler.IN_CACHE, running_scores.CPU_TILE
        try:
            if not self.cpu:  # the tensors that stand for a GPU's are a CPU's
                sampler.IN_CACHE, running_scores.CPU_TILE = sys.maxsize, running_scores.GPU_TILE
            with self._fake:
                yield
        except Exception as error:  # whatever a model's own code raises where it looks at a number
            raise InputError(
                f"model.model: {type(self.model).__name__} cannot be planned: its passes do not run without numbers "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        finally:
            sampler.IN_CACHE, running_scores.CPU_TILE = pieces

    @contextmanager
    def _counting(self, caches: bool = False) -> Iterator[Alive]:
        """A count of what is made inside; `caches` tells keys and values from other tensors."""
        cache = {(heads, width) for heads, width, _ in self._cached_layers} if caches else set()

        def label(tensor: Tensor) -> str:
            shape = tuple(tensor.shape)
            if len(shape) == 4 and (shape[1], shape[3]) in cache:
                return "cache"
            if shape in self._weights:
                return "gradients" if tensor.dtype == torch.float32 else "casts"
            return "logits" if len(shape) > 1 and shape[-1] == self._vocabulary else "activations"

        known = (t for ts in (self.model.parameters(), self.model.buffers()) for t in ts)
        with self._running(), Alive(label, known, 1 / self.shards) as alive:
            yield alive

    def _found(self, alive: Alive) -> Bytes:
        return {"activations": 0} | {name: int(size) for name, size in alive.peak.items()}
