"""EntropyTokenSelection: learn from the tokens the model is unsure about."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mifo_callbacks.checks import require_choice, require_fraction
from mifo_callbacks.collectives import sum_over, world_group
from mifo_callbacks.contracts import SelectTokens
from mifo_callbacks.logging import log_metrics, profiled
from mifo_callbacks.ownership import TrainerCallback
from mifo_callbacks.seeds import Seed
from mifo_callbacks.sharding import require_data_parallel
from mifo_callbacks.tokens import (
    Denominator,
    Scope,
    Selection,
    Selector,
    select_tokens,
    selection_metrics,
    threshold_metrics,
    with_forced,
)

END = "eos"  # name of the mask of end tokens
WATCHED = 64  # end tokens after which a selection that took none of them is reported


class EntropyTokenSelection(TrainerCallback):
    """Choose the tokens a supervised step learns from by the model's entropy (entropy selection of MIFO).

    While a Trainer runs the module, its sanity check included, `pl_module.select_tokens` is this callback's
    `select`; a module calls it once per supervised optimizer step, with the entropies of all micro-batches of
    that step, before the first backward.

    Args:
        fraction: Share of the valid tokens to choose, in (0, 1]; scope "fixed" does not use it.
        selector: "top" entropies, or the controls "bottom" and "random", which choose the same number of
            tokens.
        scope: One ranking over the whole optimizer "batch" of all ranks, one per "sequence", or a "fixed"
            threshold.
        threshold: Entropy in nats from which on a token is chosen; for scope "fixed" only.
        denominator: What the loss is divided by: the "selected" tokens or "all" valid ones.
        force_keep: Name of a token mask the module hands over ("eos", "answer"); those tokens are always
            added.
        seed: Seed of selector "random"; the choice depends on it and on the optimizer step only.
            None follows `seed_everything`.

    Raises:
        MisconfigurationException: If an argument is outside what is allowed, or ranks are not data-parallel.

    Example::

        trainer = Trainer(callbacks=[EntropyTokenSelection(fraction=0.2)])
        # in training_step of the module:
        selection = self.select_tokens(entropy, mask)  # [B, L] nats, [B, L] bool
        loss = -(logp * selection.mask).sum() / selection.denominator
    """

    def __init__(
        self,
        fraction: float = 0.2,
        selector: Selector = "top",
        scope: Scope = "batch",
        threshold: float | None = None,
        denominator: Denominator = "selected",
        force_keep: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        require_fraction("EntropyTokenSelection.fraction", fraction)
        require_choice("EntropyTokenSelection.selector", selector, Selector)
        require_choice("EntropyTokenSelection.scope", scope, Scope)
        require_choice("EntropyTokenSelection.denominator", denominator, Denominator)
        if (scope == "fixed") != (threshold is not None) or (threshold is not None and threshold < 0):
            raise MisconfigurationException(
                f"EntropyTokenSelection.threshold is {threshold} with scope {scope!r}; "
                "allowed: a number >= 0 with scope 'fixed', otherwise none"
            )
        self.fraction = fraction
        self.selector = selector
        self.scope = scope
        self.threshold = threshold
        self.denominator = denominator
        self.force_keep = force_keep
        self.seed = Seed(seed, "EntropyTokenSelection.seed")
        self._ends_seen: int | None = 0  # end tokens so far, none of them taken; None: no longer watched
        self._trainer: Trainer | None = None
        self._replaced: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        require_data_parallel(trainer, "EntropyTokenSelection")
        self.teardown(trainer, pl_module, stage)
        self._trainer, self._ends_seen = trainer, 0
        self._replaced = {k: v for k, v in vars(pl_module).items() if k == "select_tokens"}

        # a function, not the method: a copy of the module shares it instead of copying callback and trainer
        def select_tokens(entropy: Tensor, mask: Tensor, named: Mapping[str, Tensor] | None = None) -> Selection:
            return self.select(entropy, mask, named)

        shared: SelectTokens = select_tokens
        vars(pl_module)["select_tokens"] = shared

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._trainer is not None:
            vars(pl_module).pop("select_tokens", None)
            vars(pl_module).update(self._replaced)
            self._trainer = None

    def select(self, entropy: Tensor, mask: Tensor, named: Mapping[str, Tensor] | None = None) -> Selection:
        """Select the tokens of one optimizer step; collective: every rank calls it once per supervised step.

        Args:
            entropy: Entropy in nats, float [B, L]: all sequences of the step on this rank; used without its
                graph.
            mask: Valid response tokens, bool [B, L].
            named: Token masks, bool [B, L], that `force_keep` may name; whether tokens of "eos" are ever taken
                is watched.

        Returns:
            The selected tokens, bool [B, L], and the denominator over all ranks.

        Raises:
            MisconfigurationException: If `force_keep` names no mask, shapes differ, or an entropy is not
                finite.
        """
        if self._trainer is None:
            raise MisconfigurationException("select_tokens is called outside of a run of the Trainer")
        trainer, group = self._trainer, world_group()
        with profiled(trainer, self, "select"):
            forced = self._forced(named or {})
            seed = self.seed.value if self.selector == "random" else 0
            plain = select_tokens(
                entropy,
                mask,
                fraction=self.fraction,
                selector=self.selector,
                scope=self.scope,
                threshold=self.threshold,
                denominator=self.denominator,
                seed=(seed, *step_of(trainer)),
                group=group,
            )
            chosen = plain.mask
            selection = plain if forced is None else with_forced(chosen, mask, forced, self.denominator, group)
            if not trainer.training:
                return selection
            if named and END in named:
                self._watch_ends(named[END] & mask, selection.mask, group)
            if trainer.loggers:
                metrics = selection_metrics(entropy, mask, chosen, selection.mask, group)
                if self.scope != "sequence" and self.selector != "random":
                    metrics |= threshold_metrics(entropy, mask, chosen, self.selector, group)
                log_metrics(trainer, {f"entropy/{name}": value for name, value in metrics.items()})
        return selection

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed.settled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed.restore(state_dict.get("seed"))

    def _watch_ends(self, ends: Tensor, selected: Tensor, group: dist.ProcessGroup | None) -> None:
        """Say once that end tokens are never learned from, if none of the first ones was; collective until known."""
        if self._ends_seen is None:
            return
        seen, taken = sum_over(torch.stack([ends.sum(), (ends & selected).sum()]), group).tolist()
        self._ends_seen = None if taken else self._ends_seen + seen
        if self._ends_seen is not None and self._ends_seen >= WATCHED:
            rank_zero_warn(
                f"EntropyTokenSelection: none of the first {self._ends_seen} end tokens was selected, so the model may "
                f"never learn to stop; force_keep: {END} adds them"
            )
            self._ends_seen = None

    def _forced(self, named: Mapping[str, Tensor]) -> Tensor | None:
        if self.force_keep is None:
            return None
        if self.force_keep not in named:
            raise MisconfigurationException(
                f"EntropyTokenSelection.force_keep is {self.force_keep!r}; allowed: {sorted(named)}"
            )
        return named[self.force_keep]


def step_of(trainer: Trainer) -> tuple[int, ...]:
    """What tells an optimizer step from the others: its number, and the batch where optimization is manual.

    There a module may step `optimizers(use_pl_optimizer=False)`, which Lightning does not count.
    """
    if trainer.lightning_module.automatic_optimization:
        return (trainer.global_step,)
    return trainer.global_step, trainer.fit_loop.total_batch_idx
