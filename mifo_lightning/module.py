"""MifoModule: one LightningModule that switches between RL and SFT as the work items say."""

import copy
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mifo_callbacks import Seed
from mifo_callbacks.collectives import gather_ranks
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.sharding import full, require_data_parallel
from mifo_lightning.checkpoints import interruption, safe_points
from mifo_lightning.checkpoints.files import read_checkpoint
from mifo_lightning.checkpoints.hyperparameters import defaults_of, plain_settings, settings_again
from mifo_lightning.common.errors import InputError, check_kinds, require
from mifo_lightning.common.question import Question
from mifo_lightning.common.restoring import restoring
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.data.loader import WorkItem
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.policy.adapter import FINGERPRINT, Adapter, add_adapters, own_weights
from mifo_lightning.policy.ending import end_tokens
from mifo_lightning.policy.frozen import freeze_named, freeze_unused
from mifo_lightning.policy.loading import (
    Loaded,
    Loading,
    blueprint,
    check_same_weights,
    check_vocabulary,
    load_policy,
    load_tokenizer,
    shard_policy,
    shares_prompts,
)
from mifo_lightning.policy.policy import Policy
from mifo_lightning.policy.template import ChatTemplate
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.function import as_reward
from mifo_lightning.rollout.answers import Prompt, answers
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.evaluation import Evaluation, Evaluator
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.rollout.self_check import SelfCheck
from mifo_lightning.rollout.settings import Rollout
from mifo_lightning.steps.finite import FiniteSteps, check_weights
from mifo_lightning.steps.guards import (
    FORMAT,
    check_accumulation,
    check_adapter,
    check_chunks,
    check_ends,
    check_format,
    check_fp32,
    check_hooks,
    check_lengths,
    check_optimizer,
    check_trainer,
    own_rollout,
    warn_of_long_demonstrations,
    warn_of_single_steps,
)
from mifo_lightning.steps.metrics import StepMetrics
from mifo_lightning.steps.optimizer import OptimizerSettings, PhaseAdamW
from mifo_lightning.steps.reinforcement import Reinforcement
from mifo_lightning.steps.settings import PolicyLoss, SFTLoss
from mifo_lightning.steps.step import OptimizerStep
from mifo_lightning.steps.supervision import Supervision

TAKEN = ("reward", "sampling", "success_threshold", "seed", "loading", "adapter")
PARTS = ("rollout", "loss", "mixing", "sft_loss", "optimizer", "evaluation")
SETTINGS = (Rollout, Sampling, PolicyLoss, Mixing, SFTLoss, OptimizerSettings, Evaluation)
HOOKS = {"on_train_start", "on_train_batch_start", "on_after_backward", "configure_gradient_clipping"}
"""Those that a step cannot do without; a subclass's own calls super's."""


class MifoModule(LightningModule):
    """Trains a causal language model with RL and, when the loader hands out SFT work, with SFT.

    Every work item is one optimizer step: it becomes a `Batch`, which is cut into chunks and goes through one
    `Objective`. Callbacks meet the module in `batch["phase"]`, in `select_tokens` (called once per SFT optimizer step
    if set) and in the `groups` of what `training_step` returns. What a module is made of stands still; another reward
    or setting wants another module, which may take over model and tokenizer (`from_model`). Parameters are there after
    `load`, which the Trainer calls; `loading.frozen` names those that are not trained.

    Args:
        model: Hugging Face directory or hub name of the causal LM to train; `from_model` takes a loaded one.
        reward: Grades responses; from Python also a plain function (`FunctionReward`).
        rollout: How rollouts are drawn, and which of them are correct.
        loss: The policy loss of RL phases.
        mixing: A method that mixes demonstrations into RL steps; null mixes none in.
        sft_loss: The loss of SFT phases.
        optimizer: AdamW of both kinds of phases.
        evaluation: How validation and test draw responses.
        loading: How the model is loaded.
        adapter: Low-rank adapters that are trained in place of the weights (LoRA); null trains the weights.
        seed: Seed of all rollouts; None follows `seed_everything`.

    Raises:
        InputError: If a setting is impossible.
    """

    select_tokens: Any = None  # set by EntropyTokenSelection

    def __init__(
        self,
        model: str,
        reward: Reward,
        rollout: Rollout = Rollout(),
        loss: PolicyLoss = PolicyLoss(),
        mixing: Mixing | None = None,
        sft_loss: SFTLoss = SFTLoss(),
        optimizer: OptimizerSettings = OptimizerSettings(),
        evaluation: Evaluation = Evaluation(),
        loading: Loading = Loading(),
        adapter: Adapter | None = None,
        seed: int | None = None,
    ) -> None:
        model = str(model) if isinstance(model, Path) else model
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_kinds("model", given, MifoModule)
        super().__init__()
        self.save_hyperparameters(plain_settings(given), logger=False)
        optimizer.check("model.optimizer")
        evaluation.check("model.evaluation")
        loading.check("model.loading", adapter is not None)
        if adapter is not None:
            require("model.adapter", repr(adapter)[:80], isinstance(adapter, Adapter), "an Adapter, or null")
            adapter.check("model.adapter")
            fixed = "0 with an adapter: its reference is the model without it"
            require("model.loss.reference_sync_steps", loss.reference_sync_steps, not loss.reference_sync_steps, fixed)
        model = Loaded(*model) if isinstance(model, tuple) else model
        self.model_name, self.loading, self.optimizer_settings = model, loading, optimizer
        self.adapter = adapter
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model, loading.trust_remote_code)
        self.policy: Policy | None = None
        self.seed = Seed(seed, "model.seed")
        self.reward, self.success_threshold = as_reward(reward), rollout.success_threshold
        engine = rollout.engine or InProcessEngine()
        self.responder = Responder(engine, self.tokenizer, self.reward, self.success_threshold, self.seed)
        self.sampling = rollout.sampling
        self.reinforcement = Reinforcement(self.responder, rollout, loss, mixing)
        self.supervision = Supervision(self.tokenizer, sft_loss, self.responder, self.sampling)
        self.evaluator = Evaluator(self.responder, evaluation, self.sampling)
        check = SelfCheck(self.responder, self.sampling, rollout.check_every)
        self.self_check = check if rollout.self_check else None
        self.own_demonstrations = self.supervision.own_demonstrations
        self.needs_demonstrations = mixing is not None or self.supervision.measures
        self.teacher_template = None if sft_loss.distillation is None else sft_loss.distillation.template
        self.optimizer_of_phase: PhaseAdamW | None = None
        self._restored: dict[str, Any] = {}
        self._metrics = StepMetrics()
        self._step = OptimizerStep(self.reinforcement, self.supervision, optimizer, self._metrics)
        self._number = 0  # of the optimizer step, in the running phase kind
        self._template: ChatTemplate | None = None  # of the data of the last fit or evaluation
        self._ran: set[str] = set()  # of HOOKS
        self._finite = FiniteSteps()

    def __setattr__(self, name: str, value: Any) -> None:
        said = name in TAKEN or (name in PARTS and isinstance(value, SETTINGS))
        if said and "_finite" in self.__dict__:
            raise InputError(
                f"{type(self).__name__}.{name}: it is said when a module is made, which its parts take it from; make "
                "another one, of this model by from_model(module.policy.model, module.tokenizer, ...)"
            )
        super().__setattr__(name, value)

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> "MifoModule":
        """A module that trains a model which is in memory already; its weights become fp32 and change in place."""
        return cls((model, tokenizer), **settings)  # type: ignore[arg-type]  # the parser reads annotations

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # a plain class method: Lightning's is a descriptor
        cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu", **settings: Any
    ) -> "MifoModule":
        """The module of a run's checkpoint with its trained weights, without a Trainer.

        Args:
            checkpoint_path: Such as `last.ckpt`.
            map_location: Where the weights go.
            settings: Arguments of the constructor, in place of the checkpoint's; `**{"rollout.engine": ...}` is one of
                a group. Objects, such as a reward, are in no checkpoint: they are given again, a loaded model as
                (model, tokenizer). Whether code of the model's may run is never taken from a file.

        Raises:
            InputError: The file is no checkpoint of this module, or an object is missing.
        """
        checkpoint = read_checkpoint(Path(checkpoint_path))
        if "hyper_parameters" not in checkpoint:
            raise InputError(f"load_from_checkpoint: {checkpoint_path} is no checkpoint of a {cls.__name__}")
        saved = checkpoint["hyper_parameters"]
        if not isinstance(saved.get("loading"), dict):
            raise InputError(f"load_from_checkpoint: {checkpoint_path} was written by another version")
        for never in (saved, saved["loading"]):
            never.pop("trust_remote_code", None)
        defaults = defaults_of(cls, MifoModule)
        if isinstance(saved.get("adapter"), dict) and "adapter" in defaults:
            defaults["adapter"] = Adapter()  # which its default, none, does not say
        module = cls(**settings_again(saved, defaults, settings))
        module.load()
        module.load_state_dict(checkpoint["state_dict"])
        return module.to(map_location)

    # --- set-up -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the weights, if that is not done, and, under FSDP2, shard them."""
        if self._trainer is not None:
            require_data_parallel(self.trainer, "MifoModule")
            check_trainer(self.trainer)
            check_adapter(self.trainer, self.adapter)
            check_chunks(self.trainer, self.optimizer_settings)
        self.load()
        if isinstance(self.model_name, Loaded):
            check_same_weights(self._policy)
        for whole in (self._policy, *self.reinforcement.references):
            if self.device_mesh is not None and not isinstance(whole, FSDPModule):
                shard_policy(whole, self.device_mesh["data_parallel"])

    def blueprint(self) -> PreTrainedModel:
        """The model without its weights, on the meta device: names and shapes alone."""
        return blueprint(self.model_name, self.loading.trust_remote_code)

    def saved_weights(self) -> dict[str, torch.Size]:
        """Names and shapes of the weights that a checkpoint needs, without a base of adapters; none need be loaded."""
        if self.adapter is not None and self.policy is not None:
            return {f"policy.{name}": weight.shape for name, weight in own_weights(self.policy.state_dict()).items()}
        if self.adapter is not None:
            shapes = {f"policy.model.{name}": shape for name, shape in self.adapter.shapes(self.blueprint()).items()}
            return {f"policy.{FINGERPRINT}": torch.Size([1]), **shapes}
        return {f"policy.model.{name}": weight.shape for name, weight in self.blueprint().state_dict().items()}

    def trained_size(self) -> int:
        """How many weights are trained, and what a checkpoint keeps for each is kept of them; frozen ones count too."""
        if self.adapter is None:
            return sum(p.numel() for p in self.blueprint().parameters())
        return sum(shape.numel() for shape in self.saved_weights().values())

    @property
    def averages(self) -> int:
        """Further copies of the trained weights in a checkpoint: those of SDFT's teacher."""
        return int(self.supervision.teacher is not None and self.supervision.teacher.apart)

    def load(self) -> None:
        """Load the weights (fp32 master copy), once, and take the Trainer's precision, if there is a Trainer.

        Raises:
            InputError: If the model cannot be loaded, or its tokenizer is another's.
        """
        if self.policy is None:
            trust = self.loading.trust_remote_code
            # of a loaded model, before anything is done to it
            second = self.reinforcement.needs_reference and self.adapter is None
            initial = copy.deepcopy(self.model_name) if second else None
            self.policy = load_policy(self.model_name, self.loading.gradient_checkpointing, trust)
            check_vocabulary(self.policy, self.tokenizer)
            freeze_named(self.policy.model, self.loading.frozen)
            self.policy.share_prompts = shares_prompts(self.policy, self.loading)
            self.reinforcement.set_reference(load_policy(initial, trust_remote_code=trust) if initial else None)
            for reference in self.reinforcement.references:
                reference.share_prompts = self.policy.share_prompts
            if self.adapter is not None:
                add_adapters(self.policy, self.adapter, self.seed.value)
                freeze_unused(self.policy)  # text does not reach all adapters of, say, a vision tower
        if self._trainer is None:  # `generate` before a fit
            return
        for policy in (self._policy, *self.reinforcement.references):
            # hooks of callbacks run outside the Trainer's own context: they would measure another model
            policy.numerics = self.trainer.precision_plugin.forward_context

    def generate(
        self, prompts: Sequence[Prompt], samples: int = 1, sampling: Sampling | None = None
    ) -> list[list[str]]:
        """Responses to prompts, before a fit and after it.

        Args:
            prompts: Texts of a user, or conversations of dicts with `role` and `content`. After a fit they become text
                as its data's did (`chat_template`, `system_prompt`), before it as the tokenizer says.
            samples: Responses to each.
            sampling: How they are drawn; None draws as in RL.

        Returns:
            `samples` texts for each prompt. The same seed, prompt and weights give the same ones.

        Raises:
            InputError: If the model cannot be loaded, its weights are sharded, or a prompt, its length with the longest
                response, or a setting of the sampling is refused.
        """
        self.load()
        if isinstance(self.policy, FSDPModule):
            raise InputError("generate: the weights are sharded; load the exported model in a process of its own")
        template = self._template or ChatTemplate(self.tokenizer, None, date.today())
        sampling = sampling or self.sampling
        sampling.check("generate: sampling")
        with torch.no_grad():
            return answers(self.responder, self._policy, template, prompts, sampling, samples)

    def configure_optimizers(self) -> AdamW:
        """One fused AdamW; `PhaseAdamW` gives each phase kind its own moments and settings."""
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        optimizer = AdamW(parameters.values(), lr=self.optimizer_settings.rl.lr, fused=True)
        self.optimizer_of_phase = PhaseAdamW(optimizer, parameters, self.optimizer_settings)
        self._ran.clear()
        return optimizer

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Plain lists stay as they are; a safe point ahead of what callbacks do where a batch begins, of any kind."""
        if self.trainer.training:
            self._say_under_way(True)
        interruption.defer()
        safe_points.agree(device)
        return batch

    def on_train_start(self) -> None:
        """Put what a checkpoint held where it belongs; parameters are final only now."""
        self._ran.add("on_train_start")
        self._metrics.take()  # of a step that an exception ended
        self._finite.begin()
        check_optimizer(self.trainer)
        check_fp32(self)
        warn_of_single_steps(self.trainer, self.optimizer_settings.moments)
        with restoring("mifo.engines"):
            engines = self._restored.get("engines", [])
            if len(engines) == self.trainer.world_size:  # with another number there is nothing to be equal to
                self.responder.load_state_dict(engines[self.trainer.global_rank])  # before the engine is checked
        loader: Any = self.trainer.train_dataloader
        self._check(loader, evaluated=False)
        warn_of_long_demonstrations(_questions(loader), self.sampling.max_new_tokens)
        if self._restored:
            with restoring("mifo"):
                self._restore(self._restored)
            if self.trainer.fit_loop.done:  # what `on_train_epoch_end` asks: there is none to come
                self._finite.end()
            self._restored = {}
        else:
            self.supervision.measure(self._policy, loader.questions)
        if self.supervision.pool is not None:
            loader.lend(self.supervision.pool.responses)

    def teardown(self, stage: str) -> None:
        """Let the engine end what it has begun."""
        self.responder.close()

    # --- one optimizer step -------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: WorkItem, batch_idx: int) -> None:
        """Switch moments and learning rate at the start of an optimizer step."""
        self._ran.add("on_train_batch_start")
        check_accumulation(self.trainer)
        is_rl = batch["phase"] == "rl"
        counter = "rl_step" if is_rl else "sft_phase"
        self._metrics.put("phase", {"is_sft": float(not is_rl), counter: batch["rollout"] + 1})
        if is_rl and batch["update"] == 0 and self.self_check is not None:
            self.self_check.again(self._policy)
            self._metrics.put("self_check", self.self_check.take())
        self._number = batch["step"]
        lr = self._phase_optimizer.enter(batch["phase"], batch["step"], batch.get("phase_number"))
        self._metrics.put(batch["phase"], {"lr": lr})

    def training_step(self, batch: WorkItem, batch_idx: int) -> dict[str, Any]:
        """One optimizer step up to its last backward: its `loss`, `work` for accounts, and news of a fresh rollout.

        `groups` and `samples` tell callbacks of a rollout, in its first update.
        """
        self._phase_optimizer.optimizer.zero_grad(set_to_none=True)  # of a step that an exception ended
        return self._step(self.trainer, self._policy, batch, self.select_tokens)

    @property
    def last_reward(self) -> float | None:
        """Mean reward of the last rollout, for the progress bar; None before the first."""
        return self._step.last_reward

    def on_after_backward(self) -> None:
        """One kind of phase does not train the other's adapter."""
        self._ran.add("on_after_backward")
        if self._policy.adapter is not None:
            self._policy.adapter.keep_still(self._phase_optimizer.phase or "rl")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing: Lightning would do it after `training_step`, which has gradients of all chunks but the last."""

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the phase's norm; runs after callbacks have masked frozen coordinates, and before the step."""
        self._ran.add("configure_gradient_clipping")
        phase = self._phase_optimizer.phase or "rl"
        parameters = [p for p in self.parameters() if p.grad is not None]
        total = nn.utils.clip_grad_norm_(parameters, self._phase_optimizer.settings[phase].clip or torch.inf)
        norm = float(full(total))
        zeros = self._phase_optimizer.meet_norm(norm)
        self._metrics.put(phase, {"grad_norm": norm, "zero_gradient_steps": float(zeros)})
        if self._finite.skips(self._where(), self._metrics.broken()):
            self._phase_optimizer.optimizer.zero_grad(set_to_none=True)  # AdamW leaves alone what has no gradient

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        """Step, and log at once: a checkpoint written after this step must find its metrics logged."""
        super().optimizer_step(*arguments, **named)
        check_hooks(self, HOOKS - self._ran)
        self._ran &= {"on_train_start"}
        self._policy.version += 1
        self.reinforcement.end_update()
        if self._phase_optimizer.phase == "rl":
            self.reinforcement.sync_reference(self._policy, self._number + 1)
        if self.supervision.teacher is not None:
            self.supervision.teacher.follow(self._policy)
        self._phase_optimizer.look()
        self._say_under_way(False)
        check_weights(self._policy, self._where())
        log_metrics(self.trainer, {**self._metrics.take(), **self._finite.metrics()})

    def _say_under_way(self, under_way: bool) -> None:
        """Tell the loader whether its step is still to be done."""
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "under_way"):
            loader.under_way = under_way

    def _where(self) -> str:
        """The running optimizer step, for a person."""
        return f"{self._phase_optimizer.phase} step {self._number + 1}"

    def on_train_batch_end(self, outputs: Any, batch: WorkItem, batch_idx: int) -> None:
        """Let go of the optimizer step's gradients before the next rollout."""
        self._phase_optimizer.optimizer.zero_grad(set_to_none=True)

    def on_train_epoch_end(self) -> None:
        """The loader's schedule is one epoch, whatever `max_epochs` allows; nothing is exported after a broken end."""
        self.trainer.should_stop = True
        self._finite.end()

    # --- evaluation: `test` as validation ------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Check lengths and, before the first evaluation of a run, the engine."""
        self._check(self._evaluated, evaluated=True)

    def on_validation_epoch_start(self) -> None:
        """Empty the metrics."""
        self.evaluator.reset(_sources(self._evaluated), self.device)

    def validation_step(self, batch: list[Question], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Draw and grade responses to one batch of questions of one source."""
        return {"samples": self.evaluator.update(self._policy, batch, dataloader_idx)}

    def on_validation_epoch_end(self) -> None:
        """Log `val/<source>/<metric>` and `val/<metric>` over all questions, or the same of `test`."""
        self.log_dict(self.evaluator.compute("test" if self.trainer.testing else "val"))

    def test_step(self, *batch: Any, **named: Any) -> dict[str, Any]:
        """As validation, a subclass's too."""
        return self.validation_step(*batch, **named)

    on_test_start = on_validation_start
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    @property
    def _evaluated(self) -> Any:
        return self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders

    # --- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add parked moments and every rank's rollout: plain types and tensors; leave out a step that is not done."""
        safe_points.whole_steps(checkpoint["loops"])
        if self.trainer.validating and interruption.pending() is not None:
            safe_points.whole_evaluation(checkpoint["loops"])
        if self.optimizer_of_phase is not None:
            checkpoint["mifo"] = {
                "format": FORMAT,
                "seed": self.seed.settled,
                "optimizer": self.optimizer_of_phase.state_dict(),
                "rollouts": gather_ranks(self.reinforcement.state_dict()),
                "reference": self.reinforcement.reference_state(),
                "engines": gather_ranks(self.responder.state_dict()),
                **self.supervision.state_dict(),
                "finite": self._finite.state_dict(),
                "end_tokens": sorted(end_tokens(self.tokenizer)),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until `on_train_start`; evaluation needs the weights alone."""
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_format(checkpoint)
            self._restored = checkpoint["mifo"]
            self.seed.restore(self._restored.get("seed"))

    def _restore(self, state: dict[str, Any]) -> None:
        self._phase_optimizer.load_state_dict(state["optimizer"])
        rollout = own_rollout(state["rollouts"], self.trainer.global_rank, self.trainer.world_size)
        self.reinforcement.load_state_dict(rollout, self.device)
        self.reinforcement.load_reference(state.get("reference", {}))
        self.supervision.load_state_dict(state, self._policy)
        self._finite.load_state_dict(state["finite"])
        check_ends(sorted(end_tokens(self.tokenizer)), state.get("end_tokens"))

    def check_questions(self, loaders: Any, evaluated: bool, engine: bool = True) -> None:
        """Refuse what would be wrong without a word: too long sequences, and an engine that computes another model.

        Args:
            loaders: One dataloader, or several by name.
            evaluated: Whether they are those of an evaluation.
            engine: Whether to compare the engine with the model, once in each precision.

        Raises:
            InputError: One or the other.
        """
        questions = _questions(loaders)
        sampling = self.evaluator.sampling if evaluated else self.sampling
        own = evaluated and self.evaluator.settings.sampling.max_new_tokens is not None
        key = "model.evaluation.sampling" if own else "model.rollout.sampling"
        check_lengths(self._policy.model.config, questions, key, sampling.max_new_tokens)
        if engine and self.self_check is not None:
            prompts = [q.prompt for q in questions]
            self.self_check.run(self._policy, prompts, self.trainer.precision)
            self.self_check.again(self._policy)

    def _check(self, loaders: Any, evaluated: bool) -> None:
        """The same where no one has checked before, and log what the comparison found; `generate` asks as data do."""
        data = getattr(self.trainer, "datamodule", None)
        self._template = data.prompt_template() if isinstance(data, QuestionData) else self._template
        self.check_questions(loaders, evaluated)
        if self.self_check is not None and (found := self.self_check.take()):
            log_metrics(self.trainer, {f"self_check/{name}": value for name, value in found.items()})

    @property
    def _policy(self) -> Policy:
        assert self.policy is not None, "the Trainer calls configure_model first"
        return self.policy

    @property
    def _phase_optimizer(self) -> PhaseAdamW:
        assert self.optimizer_of_phase is not None, "the Trainer calls configure_optimizers first"
        return self.optimizer_of_phase


def _questions(loaders: Any) -> list[Question]:
    """All questions of one dataloader, or of several by name."""
    every = loaders.values() if isinstance(loaders, dict) else [loaders]
    return [q for loader in every for q in getattr(loader, "questions", [])]


def _sources(dataloaders: Any) -> list[str]:
    """Names of the evaluation sources: one dataloader each."""
    return list(dataloaders) if isinstance(dataloaders, dict) else ["all"]
