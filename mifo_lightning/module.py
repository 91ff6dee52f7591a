"""MifoModule: one LightningModule that switches between RL and SFT as the work items say."""

import copy
import inspect
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mifo_callbacks import Seed
from mifo_callbacks.collectives import gather_ranks
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.sharding import full, require_data_parallel
from mifo_lightning.checkpoints import interruption, safe_points
from mifo_lightning.checkpoints.files import read_checkpoint
from mifo_lightning.checkpoints.hyperparameters import plain_settings, settings_again
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.common.restoring import restoring
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.data.loader import WorkItem
from mifo_lightning.losses.sft_weights import SFTWeight, SFTWeightName, as_sft_weight
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.policy.ending import end_tokens, padding
from mifo_lightning.policy.loading import (
    Loaded,
    check_same_weights,
    check_vocabulary,
    load_policy,
    load_tokenizer,
    shard_policy,
)
from mifo_lightning.policy.policy import Policy
from mifo_lightning.policy.scoring import score_without_gradient
from mifo_lightning.policy.template import ChatTemplate
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.function import as_reward
from mifo_lightning.rollout.answers import Prompt, answers
from mifo_lightning.rollout.engine import RolloutEngine, Sampling
from mifo_lightning.rollout.evaluation import Evaluation, Evaluator
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.rollout.self_check import SelfCheck
from mifo_lightning.steps.batch import Batch
from mifo_lightning.steps.finite import FiniteSteps, check_weights
from mifo_lightning.steps.guards import (
    FORMAT,
    check_accumulation,
    check_chunks,
    check_ends,
    check_format,
    check_lengths,
    check_trainer,
    own_rollout,
    warn_of_long_demonstrations,
    warn_of_single_steps,
)
from mifo_lightning.steps.metrics import StepMetrics
from mifo_lightning.steps.objective import Objective
from mifo_lightning.steps.optimizer import AdamWSettings, PhaseAdamW
from mifo_lightning.steps.reinforcement import Reinforcement
from mifo_lightning.steps.settings import PolicyLoss, check_sft
from mifo_lightning.steps.supervision import initial_losses, selected, sft_batch


class MifoModule(LightningModule):
    """Trains a causal language model with RL and, when the loader hands out SFT work, with SFT.

    Every work item is one optimizer step: it becomes a `Batch`, which is cut into chunks and goes through one
    `Objective`. Callbacks meet the module in `batch["phase"]`, in `select_tokens` (called once per SFT optimizer step
    if set) and in the `groups` of what `training_step` returns.

    Args:
        model: Hugging Face directory or hub name of the causal LM to train; `from_model` takes a loaded one.
        reward: Grades responses; from Python also a plain function (`FunctionReward`).
        engine: Draws responses; null decodes in the training process.
        group_size: G, rollouts per question.
        success_threshold: Reward from which a rollout counts as correct.
        sampling: How RL rollouts are drawn.
        loss: The policy loss.
        mixing: A method that mixes demonstrations into RL steps; null mixes none in.
        demonstrations: What a buffered question is learned from in an SFT phase: the data's solution, or the model's
            own correct rollout.
        sft_weight: What multiplies each demonstration token's cross-entropy in SFT phases: uniform, dft, chord,
            low_entropy, high_entropy, flow, or an `SFTWeight` by class_path.
        sft_entropy_bonus: Weight of the policy's mean entropy on demonstration tokens, which is taken off the SFT loss
            (ReLIFT).
        rl: AdamW of RL phases.
        sft: AdamW of SFT phases.
        moments: SFT moments: reset at the start of each SFT phase, keep from one to the next, or shared with RL.
        skip_zero_gradient: Whether an optimizer step whose gradient is exactly 0 over all ranks moves nothing; without
            it AdamW's momentum and weight decay go on moving the weights. Steps and schedules advance either way.
        evaluation: How validation and test draw responses.
        micro_batches: Chunks that each rank cuts an optimizer step into; more need less memory, the step is the same.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        seed: Seed of all rollouts; None follows `seed_everything`.
        trust_remote_code: Whether code that the model brings (`auto_map`) may be run; nobody is asked.
        self_check: Whether to compare the engine with a teacher-forced forward before a run; false is for an engine
            whose log-probabilities are not the model's.

    Raises:
        InputError: If a setting is impossible.
    """

    select_tokens: Any = None  # set by EntropyTokenSelection

    def __init__(
        self,
        model: str,
        reward: Reward,
        engine: RolloutEngine | None = None,
        group_size: int = 8,
        success_threshold: float = 1.0,
        sampling: Sampling = Sampling(),
        loss: PolicyLoss = PolicyLoss(),
        mixing: Mixing | None = None,
        demonstrations: Literal["data", "own"] = "data",
        sft_weight: SFTWeightName | SFTWeight = "uniform",
        sft_entropy_bonus: float = 0.0,
        rl: AdamWSettings = AdamWSettings(),
        sft: AdamWSettings = AdamWSettings(),
        moments: Literal["reset", "keep", "shared"] = "reset",
        skip_zero_gradient: bool = False,
        evaluation: Evaluation = Evaluation(),
        micro_batches: int = 1,
        gradient_checkpointing: bool = False,
        seed: int | None = None,
        trust_remote_code: bool = False,
        self_check: bool = True,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.save_hyperparameters(plain_settings(given), logger=False)
        rl.check("model.rl")
        sft.check("model.sft")
        evaluation.check("model.evaluation")
        model = str(model) if isinstance(model, Path) else Loaded(*model) if isinstance(model, tuple) else model
        self.model_name, self.gradient_checkpointing = model, gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.rl_settings, self.sft_settings, self.moments = rl, sft, moments
        self.skip_zero_gradient = skip_zero_gradient
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model, trust_remote_code)
        self.policy: Policy | None = None
        self.seed = Seed(seed, "model.seed")
        self.reward, self.group_size, self.success_threshold = as_reward(reward), group_size, success_threshold
        self.responder = Responder(
            engine or InProcessEngine(), self.tokenizer, self.reward, success_threshold, self.seed
        )
        self.sampling = sampling
        self.reinforcement = Reinforcement(self.responder, sampling, loss, group_size, mixing)
        self.evaluator = Evaluator(self.responder, evaluation, sampling)
        self.optimizer_of_phase: PhaseAdamW | None = None
        self.micro_batches = micro_batches
        self.own_demonstrations = demonstrations == "own"
        self.sft_entropy_bonus = sft_entropy_bonus
        self.sft_objective = Objective(sft_weight=as_sft_weight(sft_weight))
        self.initial_losses: Tensor | None = None  # [N] by question id, for a weight that wants them
        self.needs_demonstrations = mixing is not None or self._weighs_by_initial_losses
        check_sft(sft_entropy_bonus, micro_batches, self.own_demonstrations and self._weighs_by_initial_losses)
        self._rollout: Batch | None = None  # with updates to come, or the last one under way
        self._used_up = False
        self._step = 0  # of the running phase kind
        self._restored: dict[str, Any] = {}
        self.last_reward: float | None = None  # for the progress bar
        self._metrics = StepMetrics()
        self._finite = FiniteSteps()
        self.self_check = SelfCheck(self.responder, sampling) if self_check else None

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
            settings: Arguments of the constructor, in place of the checkpoint's. Objects, such as a reward, are in no
                checkpoint: they are given again, a loaded model as (model, tokenizer). Whether code of the model's may
                run is never taken from a file.

        Raises:
            InputError: The file is no checkpoint of this module, or an object is missing.
        """
        checkpoint = read_checkpoint(Path(checkpoint_path))
        if "hyper_parameters" not in checkpoint:
            raise InputError(f"load_from_checkpoint: {checkpoint_path} is no checkpoint of a {cls.__name__}")
        own, ours = inspect.signature(cls).parameters, inspect.signature(MifoModule).parameters
        passes_on = any(p.kind is p.VAR_KEYWORD for p in own.values())
        defaults = {name: p.default for name, p in {**(ours if passes_on else {}), **own}.items()}
        saved = {name: value for name, value in checkpoint["hyper_parameters"].items() if name != "trust_remote_code"}
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
            check_chunks(self.trainer, self.micro_batches)
        self.load()
        if isinstance(self.model_name, Loaded):
            check_same_weights(self._policy)
        for whole in (self._policy, *self.reinforcement.references):
            if self.device_mesh is not None and not isinstance(whole, FSDPModule):
                shard_policy(whole, self.device_mesh["data_parallel"])

    def load(self) -> None:
        """Load the weights (fp32 master copy), once, and take the Trainer's precision, if there is a Trainer.

        Raises:
            InputError: If the model cannot be loaded, or its tokenizer is another's.
        """
        if self.policy is None:
            trust = self.trust_remote_code
            # of a loaded model, before anything is done to it
            initial = copy.deepcopy(self.model_name) if self.reinforcement.needs_reference else None
            self.policy = load_policy(self.model_name, self.gradient_checkpointing, trust)
            check_vocabulary(self.policy, self.tokenizer)
            self.reinforcement.set_reference(load_policy(initial, trust_remote_code=trust) if initial else None)
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
            InputError: If the model cannot be loaded, its weights are sharded, or a prompt is refused.
        """
        self.load()
        if isinstance(self.policy, FSDPModule):
            raise InputError("generate: the weights are sharded; load the exported model in a process of its own")
        data = getattr(self._trainer, "datamodule", None)
        own = ChatTemplate(self.tokenizer, None, date.today())
        template = data.prompt_template() if isinstance(data, QuestionData) else own
        drawn_by = sampling or self.reinforcement.sampling
        with torch.no_grad():
            return answers(self.responder, self._policy, template, prompts, drawn_by, samples)

    def configure_optimizers(self) -> AdamW:
        """One fused AdamW; `PhaseAdamW` gives each phase kind its own moments and settings."""
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        optimizer = AdamW(parameters.values(), lr=self.rl_settings.lr, fused=True)
        self.optimizer_of_phase = PhaseAdamW(
            optimizer, parameters, self.rl_settings, self.sft_settings, self.moments, self.skip_zero_gradient
        )
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
        warn_of_single_steps(self.trainer, self.moments)
        with restoring("mifo.engines"):
            engines = self._restored.get("engines", [])
            if len(engines) == self.trainer.world_size:  # with another number there is nothing to be equal to
                self.responder.load_state_dict(engines[self.trainer.global_rank])  # before the engine is checked
        sampling = self.reinforcement.sampling
        self._check(self.trainer.train_dataloader, evaluated=False)
        warn_of_long_demonstrations(_questions(self.trainer.train_dataloader), sampling.max_new_tokens)
        if self._restored:
            with restoring("mifo"):
                self._restore(self._restored)
            if self.trainer.fit_loop.done:  # what `on_train_epoch_end` asks: there is none to come
                self._finite.end()
            self._restored = {}
        elif self._weighs_by_initial_losses:
            loader: Any = self.trainer.train_dataloader
            self.initial_losses = initial_losses(self._policy, loader.questions, padding(self.tokenizer))

    def teardown(self, stage: str) -> None:
        """Let the engine end what it has begun."""
        self.responder.close()

    # --- one optimizer step -------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: WorkItem, batch_idx: int) -> None:
        """Switch moments and learning rate at the start of an optimizer step."""
        check_accumulation(self.trainer)
        is_rl = batch["phase"] == "rl"
        counter = "rl_step" if is_rl else "sft_phase"
        self._metrics.put("phase", {"is_sft": float(not is_rl), counter: batch["rollout"] + 1})
        self._step = batch["step"]
        lr = self._phase_optimizer.enter(batch["phase"], batch["step"], batch.get("phase_number"))
        self._metrics.put(batch["phase"], {"lr": lr})

    def training_step(self, batch: WorkItem, batch_idx: int) -> dict[str, Any]:
        """One optimizer step up to its last backward: its `loss`, `work` for accounts, and news of a fresh rollout.

        `groups` and `samples` tell callbacks of a rollout, in its first update.
        """
        self._phase_optimizer.optimizer.zero_grad(set_to_none=True)  # of a step that an exception ended
        output: dict[str, Any] = {"work": {"generated": 0, "scored": 0}}
        is_rl = batch["phase"] == "rl"
        whole = self._rl_batch(batch, output) if is_rl else self._sft_batch(batch, output)
        chunks = whole.chunks(batch["update"] % batch["minibatches"], self.micro_batches)
        objective = self.reinforcement.objective if is_rl else self.sft_objective
        output["loss"] = self._descend(chunks, objective, batch["phase"])
        output["work"] |= {
            "trained": sum(chunk.sequences.token_count() for chunk in chunks if not chunk.idle),
            "demonstrations": [i for chunk in chunks if not chunk.idle for i in chunk.demonstrations],
        }
        return output

    def _descend(self, chunks: list[Batch], objective: Objective, phase: str) -> Tensor:
        """The loss of the whole step, with the graph of its last chunk; the gradients of the others are there already.

        Only the last backward is Lightning's: its hooks see the whole gradient, once.
        """
        before = torch.zeros((), device=self.device)
        synchronises_late = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        for number, chunk in enumerate(chunks, 1):
            with_bonus = chunk.bonus is not None and chunk.bonus.scale > 0
            with self._profile("forward"):
                logp, entropy = self._policy(chunk.sequences, chunk.temperature, entropy_gradient=with_bonus)
            if phase == "sft" and self.select_tokens is not None and len(chunks) == 1:
                chunk = selected(chunk, self.select_tokens, entropy.detach())
            loss, metrics = objective(chunk, logp, entropy)
            self._metrics.add(phase, metrics)
            loss = loss * self.trainer.world_size  # undo the strategy's mean over ranks: our denominators count all
            if number == len(chunks):
                return before + loss
            # outside of the Trainer's autocast, as Lightning's own; its cache would keep casts with a used graph
            with self._profile("backward"), synchronises_late(), torch.autocast(self.device.type, enabled=False):
                loss.backward()
            torch.clear_autocast_cache()
            before += loss.detach()
        raise AssertionError("an optimizer step has at least one chunk")

    def _rl_batch(self, item: WorkItem, output: dict[str, Any]) -> Batch:
        """What the rollout under way trains on; its first update draws and grades it, and says so in `output`."""
        if item["update"] == 0:
            self._rollout = None  # the old one is not needed while the new one is made
            more: Any = getattr(self.trainer.train_dataloader, "more", None)
            start = time.perf_counter()
            drawn, chosen = self.reinforcement.roll_out(self._policy, item, more, self._profile)
            seconds = time.perf_counter() - start
            with self._profile("score"):
                self._rollout = self.reinforcement.prepare(self._policy, item, drawn, chosen)
            output |= {
                "groups": drawn.groups(self.own_demonstrations),
                "samples": drawn.samples(),
                "work": self.reinforcement.work(drawn, self._rollout),
            }
            described = self.reinforcement.describe(drawn, self._rollout, seconds)
            self._metrics.put("rollout", described)
            self.last_reward = described["reward"]
        rollout = self._rollout
        assert rollout is not None, "the loader begins every rollout with its first update"
        self._used_up = item["update"] + 1 == item["updates"]
        return rollout

    def _sft_batch(self, item: WorkItem, output: dict[str, Any]) -> Batch:
        """The demonstrations of the step, and, if it is cut into chunks, which of their tokens it learns from."""
        batch = sft_batch(item["questions"], self.tokenizer, self.device, self.sft_entropy_bonus, self.initial_losses)
        if self.select_tokens is not None and self.micro_batches > 1:
            # the threshold belongs to the optimizer step: all entropies are needed before the first backward
            output["work"]["scored"] = batch.sequences.token_count()
            with self._profile("entropies"):
                entropy = score_without_gradient(self._policy, batch.sequences, temperature=1.0)[1]
            batch = selected(batch, self.select_tokens, entropy)
        return batch

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing: Lightning would do it after `training_step`, which has gradients of all chunks but the last."""

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the phase's norm; runs after callbacks have masked frozen coordinates, and before the step."""
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
        self._policy.version += 1
        if self._used_up:
            self._rollout = None  # no checkpoint need hold it
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
        return f"{self._phase_optimizer.phase} step {self._step + 1}"

    def on_train_batch_end(self, outputs: Any, batch: WorkItem, batch_idx: int) -> None:
        """Let go of the optimizer step's gradients before the next rollout."""
        self._phase_optimizer.optimizer.zero_grad(set_to_none=True)

    def on_train_epoch_end(self) -> None:
        """The loader's schedule is one epoch, whatever `max_epochs` allows; nothing is exported after a broken end."""
        self.trainer.should_stop = True
        self._finite.end()

    # --- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Check lengths and, before the first evaluation of a run, the engine."""
        self._check(self.trainer.val_dataloaders, evaluated=True)

    def on_test_start(self) -> None:
        """As validation."""
        self._check(self.trainer.test_dataloaders, evaluated=True)

    def on_validation_epoch_start(self) -> None:
        """Empty the metrics."""
        self.evaluator.reset(_sources(self.trainer.val_dataloaders), self.device)

    def on_test_epoch_start(self) -> None:
        """Empty the metrics."""
        self.evaluator.reset(_sources(self.trainer.test_dataloaders), self.device)

    def validation_step(self, batch: list[Question], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Draw and grade responses to one batch of questions of one source."""
        return {"samples": self.evaluator.update(self._policy, batch, dataloader_idx)}

    def test_step(self, batch: list[Question], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """As validation."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `val/<source>/<metric>` and `val/<metric>` over all questions."""
        self.log_dict(self.evaluator.compute("val"))

    def on_test_epoch_end(self) -> None:
        """Log `test/<source>/<metric>` and `test/<metric>` over all questions."""
        self.log_dict(self.evaluator.compute("test"))

    # --- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add parked moments and every rank's rollout: plain types and tensors; leave out a step that is not done."""
        safe_points.whole_steps(checkpoint["loops"])
        if self.trainer.validating and interruption.pending() is not None:
            safe_points.whole_evaluation(checkpoint["loops"])
        if self.optimizer_of_phase is not None:
            rollout = None if self._rollout is None else self._rollout.state_dict()
            checkpoint["mifo"] = {
                "format": FORMAT,
                "seed": self.seed.settled,
                "optimizer": self.optimizer_of_phase.state_dict(),
                "rollouts": gather_ranks(rollout),
                "engines": gather_ranks(self.responder.state_dict()),
                "initial_losses": self.initial_losses,
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
        self._rollout = None if rollout is None else Batch.from_state_dict(rollout, self.device)
        self.initial_losses = state["initial_losses"]
        if (self.initial_losses is None) == self._weighs_by_initial_losses:
            raise InputError(
                "model.sft_weight: flow is not allowed here, nor its loss; with flow a run begins and ends"
            )
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
        sampling = self.evaluator.sampling if evaluated else self.reinforcement.sampling
        own = evaluated and self.evaluator.settings.sampling.max_new_tokens is not None
        key = "model.evaluation.sampling" if own else "model.sampling"
        check_lengths(self._policy.model.config, questions, key, sampling.max_new_tokens)
        if engine and self.self_check is not None:
            prompts = [q.prompt for q in questions]
            self.self_check.run(self._policy, prompts, self.trainer.precision)

    def _check(self, loaders: Any, evaluated: bool) -> None:
        """The same where no one has checked before, and log what the comparison found."""
        self.check_questions(loaders, evaluated)
        if self.self_check is not None and (found := self.self_check.take()):
            log_metrics(self.trainer, found)

    def _profile(self, activity: str) -> AbstractContextManager[None]:
        profiler: Any = self.trainer.profiler  # type: ignore[attr-defined]
        timed: AbstractContextManager[None] = profiler.profile(f"mifo.{activity}")
        return timed

    @property
    def _weighs_by_initial_losses(self) -> bool:
        return self.sft_objective.sft_weight.needs_initial_losses

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
