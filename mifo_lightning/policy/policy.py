"""The language model as the losses and the rollout engine see it: any Hugging Face causal LM."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel

from mifo_lightning.policy.decoding import Decoding, accepted
from mifo_lightning.policy.head import LogitTransform, head_transform
from mifo_lightning.policy.precision import exact_products
from mifo_lightning.policy.prefix import shared_states
from mifo_lightning.policy.slots import decodes_in_slots
from mifo_lightning.policy.token_scores import token_scores

if TYPE_CHECKING:
    from mifo_lightning.policy.adapter import Adapters


class Sequences(NamedTuple):
    """Prompts with responses, padded on the right so that no attention mask is needed (attention is causal).

    Attributes:
        tokens: [B, T] int64 token ids, prompt then response then padding.
        prompt_lengths: [B] int64.
        response_lengths: [B] int64, end-of-sequence token included.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    def mask(self) -> Tensor:
        """[B, L] bool response mask, L the longest response."""
        length = int(self.response_lengths.max())
        return torch.arange(length, device=self.tokens.device) < self.response_lengths[:, None]

    def select(self, rows: Tensor) -> "Sequences":
        """The given rows, trimmed to their own longest sequence."""
        chosen = Sequences(*(field[rows] for field in self))
        width = int((chosen.prompt_lengths + chosen.response_lengths).max())
        return chosen._replace(tokens=chosen.tokens[:, :width])

    def token_count(self) -> int:
        """Tokens of all prompts and responses, padding left out."""
        return int((self.prompt_lengths + self.response_lengths).sum())

    def to(self, device: torch.device) -> "Sequences":
        """The same on another device."""
        return Sequences(*(field.to(device) for field in self))

    @classmethod
    def pack(cls, prompts: list[list[int]], responses: list[list[int]], pad: int) -> "Sequences":
        """Pad lists of token ids to one tensor."""
        width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        rows = [p + r + [pad] * (width - len(p) - len(r)) for p, r in zip(prompts, responses, strict=True)]
        lengths = [[len(x) for x in xs] for xs in (prompts, responses)]
        return cls(torch.tensor(rows), torch.tensor(lengths[0]), torch.tensor(lengths[1]))


class Policy(nn.Module):
    """Answers with log-probability and entropy of response tokens, and with next-token logits for decoding.

    Args:
        model: A Hugging Face causal LM.

    Attributes:
        numerics: The context that every forward runs in, whoever asks for it and from wherever; MifoModule puts the
            Trainer's precision here.
        share_prompts: Whether rows of a group share their prompt's forward and backward pass.
        adapter: The low-rank adapters that are trained in place of the weights; None where there are none.
        version: Rises whenever the weights are others: after each optimizer step, and where they are loaded.
    """

    numerics: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        untyped: Any = model
        self.model = untyped.eval()
        with torch.no_grad():
            self.decoding = Decoding.of(model)
        self.decoding = replace(self.decoding, slots=decodes_in_slots(self))
        self.transform = head_transform(model)
        self.share_prompts = False
        self.adapter: Adapters | None = None
        self.version = 0
        self._gathered = False  # whether `sampling` is entered
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    def forward(
        self,
        sequences: Sequences,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        grouped: bool = False,
        top_k: int = 0,
        teacher: Tensor | None = None,
        teacher_head: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Teacher-forced scores of the response tokens.

        Args:
            sequences: B prompts with responses.
            temperature: Logits are divided by it before both scores.
            entropy_gradient: Whether a gradient flows through the entropy.
            grouped: Whether several rows may have the same prompt, which runs once then if `share_prompts` allows it.
                The same on all ranks.
            top_k: How many of each position's largest log-probabilities are wanted beside the token's own.
            teacher: [N, D] states of a teacher before the tokens of the same responses, response after response, as of
                `states`; None wants no KL.
            teacher_head: Makes outputs of them; None is the model's own.

        Returns:
            `logp` [B, L] with gradient and `entropy` [B, L], fp32 nats, 0 outside the response; where `top_k` is above
            0 also `top` [B, L, K], and with a `teacher` `kl` [B, L], as of `token_scores`.
        """
        mask = sequences.mask()
        row, step = mask.nonzero(as_tuple=True)
        position = sequences.prompt_lengths[row] + step
        targets = sequences.tokens[row, position]
        with self.numerics():
            if grouped and self.share_prompts:
                states = shared_states(self.model, sequences.tokens, sequences.prompt_lengths, mask.shape[1])
                hidden = states[row, step]
            else:
                hidden = self._states_before(sequences.tokens, row, position)
            transform = self.transform or LogitTransform()
            shown = teacher, teacher_head
            scores = token_scores(self.head, hidden, targets, temperature, entropy_gradient, transform, top_k, *shown)
        return tuple(_at(mask, s) for s in scores)

    def states(self, sequences: Sequences) -> Tensor:
        """What `logits` makes the distribution of each response token of: [N, D], response after response."""
        row, step = sequences.mask().nonzero(as_tuple=True)
        with self.numerics():
            return self._states_before(sequences.tokens, row, sequences.prompt_lengths[row] + step)

    def logits(self, states: Tensor) -> Tensor:
        """[n, V] fp32 logits of [n, D] `states`; under FSDP2 only inside `sampling`."""
        transform = self.transform or LogitTransform()
        if transform.input_scale != 1.0:
            states = states * transform.input_scale
        with self.numerics():
            return transform(self.head(states).float())

    def _states_before(self, tokens: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """The states that predict these tokens, each the one before it: only those ever reach the head."""
        base = self.model.base_model if self.split_head else self.model
        out = _run(base, tokens)
        states: Tensor = (out.last_hidden_state if self.split_head else out.logits)[row, position - 1]
        return states

    def decode(self, ids: Tensor, cache: Any, attention: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Any]:
        """One cached forward pass for generation.

        Args:
            ids: [B, T] int64 new tokens.
            cache: What the call before returned; None at first.
            attention: [B, tokens so far] int64, 0 at padding; None where nothing is padded.
            positions: [B, T] int64; None leaves them to the model.

        Returns:
            Logits [B, V] of the last position, and the cache.
        """
        if cache is None and self.decoding.given:
            cache = DynamicCache(config=self.model.config)
        arguments = {
            "attention_mask": attention,
            "position_ids": positions,
            self.decoding.argument: cache,
            "logits_to_keep": 1,
        }
        with self.numerics():
            out = self.model(input_ids=ids, use_cache=True, **accepted(self.model.forward, **arguments))
        return out.logits[:, -1], cache if self.decoding.given else out[self.decoding.argument]

    def train(self, mode: bool = True) -> "Policy":
        """The model stays in evaluation mode: updates score what rollouts drew, so dropout and the like are off."""
        self.training = mode
        return self

    @contextmanager
    def in_own_precision(self) -> Iterator[None]:
        """Every forward in the precision of the weights, whatever the Trainer's is, and without TF32."""
        numerics, self.numerics = self.numerics, lambda: torch.autocast(self.device.type, enabled=False)
        try:
            with exact_products():
                yield
        finally:
            self.numerics = numerics

    @property
    def head(self) -> Any:
        """What makes outputs of hidden states; nothing is left to do where it cannot be applied to them alone."""
        return self.model.get_output_embeddings() if self.split_head else nn.Identity()

    @property
    def split_head(self) -> bool:
        """Whether the head can be applied to chosen hidden states alone."""
        return self.transform is not None

    @contextmanager
    def _casts_kept(self) -> Iterator[None]:
        """Under autocast every forward uses the same casts of the weights, which would be made anew for each token."""
        numerics, device = self.numerics, self.device.type
        with numerics():
            if not torch.is_autocast_enabled(device):
                yield
                return
            dtype = torch.get_autocast_dtype(device)
            self.numerics = lambda: torch.autocast(device, dtype, cache_enabled=True)  # the Trainer keeps none
            try:
                with self.numerics():
                    yield
            finally:
                self.numerics = numerics

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """No gradient, and under FSDP2 the whole weights gathered once instead of every forward.

        Collective under FSDP2: every rank enters; inside, ranks may run different numbers of forwards.
        """
        root: nn.Module = self
        # inside of another nothing is given up at the end, which ranks that run another number of forwards would await
        shards = [m for m in self.modules() if isinstance(m, FSDPModule)] if not self._gathered else []
        outermost, self._gathered = not self._gathered, True
        for shard in shards:
            shard.set_reshard_after_forward(False)
            shard.unshard()
        try:
            with torch.no_grad(), self._casts_kept():
                yield
        finally:
            self._gathered = not outermost
            for shard in shards:
                # the root keeps its weights between forward and backward, as FSDP2 does by default
                shard.set_reshard_after_forward(shard is not root, recurse=False)
                shard.reshard()
            # frees the casts of the weights; older torch would reuse them, made without a graph, and lose gradients
            torch.clear_autocast_cache()


def _at(mask: Tensor, scores: Tensor) -> Tensor:
    """[B, L, ...] the scores [N, ...] of the N places of a mask [B, L], and 0 elsewhere."""
    whole = torch.zeros(*mask.shape, *scores.shape[1:], device=mask.device)
    return whole.masked_scatter(mask.view(*mask.shape, *[1] * (scores.dim() - 1)), scores)


def _loaded(policy: nn.Module, _: Any) -> None:
    assert isinstance(policy, Policy)
    policy.version += 1


def _run(model: nn.Module, tokens: Tensor) -> Any:
    """A forward pass over whole sequences, without a cache."""
    return model(input_ids=tokens, **accepted(model.forward, use_cache=False))
