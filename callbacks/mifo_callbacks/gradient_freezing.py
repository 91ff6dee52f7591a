"""GradientFreezing: hold the most important coordinates still during one phase."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from mifo_callbacks.checks import require_choice, require_fraction
from mifo_callbacks.collectives import sum_over
from mifo_callbacks.contracts import Importance, PhaseOf, importance_before, map_of
from mifo_callbacks.freezing_rules import (
    Coordinates,
    FreezingRule,
    Frozen,
    RuleName,
    Scope,
    checked_score,
    frozen_blocks,
    rule_of,
    together,
)
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.masking import Converted, PackedMask, kept, mask_gradients, moved, restore_
from mifo_callbacks.ownership import claim, distinct, renew
from mifo_callbacks.phase import PhaseCallback
from mifo_callbacks.seeds import Seed
from mifo_callbacks.sharding import (
    as_part,
    full_on_first_rank,
    local,
    require_visible_weights,
    shard_group,
    shard_like,
    usable,
)
from mifo_callbacks.thresholds import random_scores

TIED = 0.1  # ties per frozen coordinate from which on importance says little


class GradientFreezing(PhaseCallback):
    """Freeze a share of the coordinates, chosen by importance, for the duration of a phase (MIFO, freezing).

    At the start of the phase the mask is drawn; before every optimizer step the gradient of frozen
    coordinates is set to zero, ahead of clipping; after the step their weights are put back, because momentum
    and weight decay move a weight without a gradient. Frozen coordinates are bit-identical over the phase and
    free again after it; a module that moves them otherwise is refused. Buffers, such as BatchNorm's running
    statistics, are no coordinates and go on moving, unless `buffers` holds them. A rule that goes by importance needs
    a callback that has some (`contracts.Importance`, such as `ImportanceEMA`) earlier in the trainer's list; before it
    has a map nothing is frozen and a warning says so. Where the rule looks at the gradient, the mask is drawn at the
    phase's first optimizer step whose gradient is there and finite, before any weight moves.

    Args:
        fraction: Share of the coordinates to freeze, in (0, 1]; floor(fraction * n) of n, so never more than
            asked.
        selector: Freeze the most important "rl_topk", the least "rl_bottomk", as many at "random", "none", or what a
            `FreezingRule` of your own says.
        scope: Rank the coordinates within each "tensor", or all of them together ("global").
        seed: Seed of "random" and of rules that draw; each phase and parameter draws anew.
            None follows `seed_everything`.
        during: Label of the phase in which coordinates are frozen.
        phase: Batch key that holds the phase label, or callable(trainer, pl_module, batch) -> label.
        buffers: Whether all buffers of the module keep the values they have at the start of the phase: what a batch
            made of them is undone when it ends. A BatchNorm still normalizes by the statistics of the batch.

    Raises:
        MisconfigurationException: If an argument is outside what is allowed; when training starts, if
            importance is needed and no callback before this one has it, or the strategy hides the weights; in the
            phase, if something else than a torch optimizer moves a frozen weight, or a score cannot be ranked.

    Example::

        trainer = Trainer(callbacks=[ImportanceEMA(alpha=0.5), GradientFreezing(fraction=0.5)])
        trainer.fit(module)  # batches are {"phase": "rl" or "sft", ...}
    """

    def __init__(
        self,
        fraction: float = 0.5,
        selector: RuleName | FreezingRule = "rl_topk",
        scope: Scope = "tensor",
        seed: int | None = None,
        during: str = "sft",
        phase: str | PhaseOf = "phase",
        buffers: bool = False,
    ) -> None:
        self.rule = rule_of("GradientFreezing.selector", selector)
        super().__init__(phase, None if self.rule is None and not buffers else during)
        require_fraction("GradientFreezing.fraction", fraction)
        require_choice("GradientFreezing.scope", scope, Scope)
        if self.rule is not None and self.rule.scope not in (None, scope):
            raise MisconfigurationException(
                f"GradientFreezing.scope is {scope!r}; allowed with selector {type(self.rule).__name__}: "
                f"{self.rule.scope}"
            )
        self.fraction = fraction
        self._selector = selector
        self.scope: Scope = scope
        self.seed = Seed(seed, "GradientFreezing.seed")
        self.during = during
        self.buffers = buffers
        self._frozen_phases = 0  # how many phases have been frozen: the mask of "random" depends on it
        self._warned = False
        self._importance: Importance | None = None
        self._masks: dict[str, PackedMask] = {}
        self._stored: dict[str, Tensor] = {}  # masks that follow from more than the map, for the checkpoint
        self._waits = False  # for the first gradient of the phase, by which the mask is drawn
        self._reference: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}  # buffers by name
        self._checked = False  # whether a batch of this phase has been found to leave frozen weights alone

    @property
    def state_key(self) -> str:
        return distinct(self, self._generate_state_key(during=self.during))

    @property
    def selector(self) -> RuleName | FreezingRule:
        """As it was given; another one wants another callback."""
        return self._selector

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Bool masks by parameter name, True where frozen, this rank's shards; empty outside the phase.

        Kept in one bit a coordinate; each is unpacked when it is asked for.
        """
        return Converted(self._masks, PackedMask.unpack)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        require_visible_weights(trainer, pl_module, "GradientFreezing")
        self.preflight(trainer)
        claim(self, pl_module)
        params = self.trained(pl_module)
        if unknown := sorted(self._stored.keys() - params.keys()):
            raise MisconfigurationException(
                f"the state of GradientFreezing names {unknown[0]!r}, no trainable parameter of this module"
            )
        self._stored = {name: shard_like(mask, params[name]) for name, mask in self._stored.items()}
        if self._current == self.during:  # resumed inside the phase: frozen weights are still what they were
            self._freeze(trainer, pl_module, resumed=True)

    def preflight(self, trainer: Trainer, *rest: Any) -> None:
        """Find the importance that the rule needs, or raise if it is missing or late; looks at the callbacks alone."""
        if self.rule is None or not self.rule.needs_importance:
            return
        rule = self.selector if isinstance(self.selector, str) else type(self.selector).__name__
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        who = f"GradientFreezing.selector {rule!r}"
        self._importance = importance_before(self, callbacks, self.during, who, ", or selector random, none")

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        self._require_unmoved(pl_module)
        self._let_go()
        self._forget()
        if current == self.during:
            self._frozen_phases += 1
            self._freeze(trainer, pl_module)

    def _freeze(self, trainer: Trainer, pl_module: LightningModule, resumed: bool = False) -> None:
        if self.buffers:
            self._held = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}
        if self.rule is None:
            return
        if resumed and self._stored:
            self._masks = {name: PackedMask(local(mask)) for name, mask in self._stored.items()}
            self._remember(pl_module)
            return
        if self._importance is not None and not self._known(pl_module):
            rank_zero_warn(f"phase {self.during!r} begins before there is an importance map: nothing is frozen")
            return
        self._waits = self.rule.needs_gradient
        if not self._waits:
            self._hold(trainer, pl_module, self.rule)

    def _hold(self, trainer: Trainer, pl_module: LightningModule, rule: FreezingRule) -> None:
        """Draw the masks and keep what the weights under them are."""
        params = self.trained(pl_module)
        frozen = together(self._packed(self._blocks(rule, pl_module, params), params))
        self._remember(pl_module)
        metrics = {"freeze/share": frozen.frozen / max(frozen.total, 1), "freeze/ties": frozen.tied}
        if rule.needs_importance:
            metrics["freeze/zero_share"] = frozen.zero / max(frozen.frozen, 1)
            self._warn_of_ties(frozen)
        log_metrics(trainer, metrics)

    def _remember(self, pl_module: LightningModule) -> None:
        params = self.trained(pl_module)
        self._reference = {name: kept(local(params[name]), mask) for name, mask in self._masks.items()}

    @property
    def _stores(self) -> bool:
        """Whether a checkpoint has to hold the masks."""
        return self.rule is not None and self.rule.needs_gradient

    def _forget(self) -> None:
        """Let go of what is stored of a phase that has ended."""
        self._stored = {}

    def _blocks(
        self, rule: FreezingRule, pl_module: LightningModule, params: Mapping[str, nn.Parameter]
    ) -> Iterable[Frozen]:
        """The masks, and what they freeze, one tensor after the other."""
        scores = self._scores(rule, params, self._known(pl_module))
        return frozen_blocks(scores, self.fraction, self.scope, rule.order)

    def _known(self, pl_module: LightningModule) -> Mapping[str, Tensor] | None:
        """The map of importance, empty before there is one; None where the rule needs none."""
        return None if self._importance is None else map_of(self._importance, pl_module)

    def _packed(self, blocks: Iterable[Frozen], params: Mapping[str, nn.Parameter]) -> Iterator[Frozen]:
        """Keep the masks, each packed before the next is drawn; the counts go on."""
        for block in blocks:
            self._masks |= {name: PackedMask(mask) for name, mask in block.masks.items()}
            if self._stores:
                self._stored |= {name: as_part(mask, params[name]) for name, mask in block.masks.items()}
            yield block._replace(masks={})

    def _warn_of_ties(self, frozen: Frozen) -> None:
        """Say once that position, not importance, chose much of what is frozen."""
        if self._warned or frozen.tied <= TIED * frozen.frozen:
            return
        self._warned = True
        rank_zero_warn(
            f"GradientFreezing: {frozen.tied} coordinates are tied at the threshold of importance, {frozen.frozen} are "
            "frozen, and position decides which: the measured phase moves weights by little more than rounding; make "
            "it several optimizer steps long or its learning rate higher, or take selector random"
        )

    def _scores(
        self, rule: FreezingRule, params: Mapping[str, nn.Parameter], known: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[str, Tensor]]:
        for position, (name, p) in enumerate(params.items()):
            if known is not None and name not in known:
                continue  # no optimizer stepped it in the measured phase
            importance = None if known is None else shard_like(known[name], p)
            gradient = _gradient_of(p) if rule.needs_gradient else None
            score = rule.score(Coordinates(name, p.shape, partial(self._draw, p, position), importance, gradient))
            if score is not None:
                yield name, checked_score(score, name, p)

    def _draw(self, p: nn.Parameter, position: int) -> Tensor:
        # On the full shape and the CPU: the same mask for every strategy and device.
        return shard_like(random_scores(p.shape, self.seed.value, self._frozen_phases, position), p)

    def on_gradients_ready(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._waits and self.rule is not None and usable(self.trained(pl_module).values()):
            self._waits = False
            self._hold(trainer, pl_module, self.rule)
        found = [(p.grad, self._masks[name]) for name, p in self._frozen_weights(pl_module) if p.grad is not None]
        if not found:
            return
        norms = mask_gradients([local(grad) for grad, _ in found], [mask for _, mask in found])
        if trainer.loggers:
            group = shard_group(grad for grad, _ in found)
            total, kept = sum_over(norms.double().square(), group).tolist()
            log_metrics(trainer, {"freeze/masked_grad_share": 1 - kept / total if total else 0.0})

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for name, p in self._frozen_weights(pl_module):
            restore_(local(p), self._masks[name], self._reference[name])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        for name, buffer in pl_module.named_buffers():
            if name in self._held:
                buffer.copy_(self._held[name])
        if not self._checked:
            self._checked = True
            self._require_unmoved(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._require_unmoved(pl_module)

    def _require_unmoved(self, pl_module: LightningModule) -> None:
        """Raise if a frozen weight moved; called after a phase's first batch, at its end and at the epoch's."""
        frozen = list(self._frozen_weights(pl_module))
        if not frozen:
            return
        counts = [moved(local(p), self._masks[name], self._reference[name]) for name, p in frozen]
        totals = sum_over(torch.stack(counts), shard_group(p for _, p in frozen)).tolist()
        for (name, _), count in zip(frozen, totals, strict=True):
            if count:
                raise MisconfigurationException(
                    f"GradientFreezing: {count} frozen coordinates of {name!r} moved in phase {self.during!r} outside "
                    "of an optimizer's step; allowed: weights that the step of a torch.optim.Optimizer moves in "
                    "training_step"
                )

    def _frozen_weights(self, pl_module: LightningModule) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in pl_module.named_parameters() if name in self._masks)

    def _let_go(self) -> None:
        self._masks, self._reference, self._held, self._checked, self._waits = {}, {}, {}, False, False

    def release(self) -> None:
        super().release()
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        stored = {"masks": full_on_first_rank(self._stored)} if self._stored else {}
        return super().state_dict() | {"number": self._frozen_phases, "seed": self.seed.settled} | stored

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        renew(self)
        self._frozen_phases = state_dict["number"]
        self.seed.restore(state_dict.get("seed"))
        self._stored = dict(state_dict.get("masks", {}))


def _gradient_of(p: nn.Parameter) -> Tensor:
    """fp32, laid out like `p`; 0 where the loss does not depend on it."""
    return torch.zeros_like(p.detach()) if p.grad is None else p.grad.detach().float()
