"""Before a run: a wrong engine, sequences that do not fit and tokens without an embedding are refused in one line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, weights
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mifo_callbacks import Seed
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.module import MifoModule
from mifo_lightning.monitors.history import History
from mifo_lightning.policy.loading import check_vocabulary, positions
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.evaluation import Evaluation, EvaluationSampling
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.rollout.self_check import self_check, unequal_prompts
from mifo_lightning.steps.guards import check_lengths, warn_of_long_demonstrations

MakeTrainer = Callable[..., Trainer]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12]] * 3 + [[4, 5, 6, 7]]


class Off(InProcessEngine):
    """Its log-probabilities are off by so many nats, where autocast is on or everywhere."""

    def __init__(self, by: float, in_autocast: bool = False) -> None:
        super().__init__()
        self.by, self.in_autocast = by, in_autocast

    def generate(self, *arguments: Any) -> list[list[Completion]]:
        drawn = super().generate(*arguments)
        with arguments[0].numerics():
            low = torch.is_autocast_enabled("cpu")
        if low or not self.in_autocast:
            for c in (c for group in drawn for c in group):
                c.logp = [x + self.by for x in c.logp]
        return drawn


class Broken(InProcessEngine):
    def generate(self, *arguments: Any) -> list[list[Completion]]:
        raise AttributeError("no such\nlayer")


def check(engine: Any, policy: Policy, tokenizer: Any, low: bool = False) -> dict[str, float]:
    if low:
        policy.numerics = partial(torch.autocast, "cpu", torch.bfloat16)
    responder = Responder(engine, tokenizer, LastAnswerReward(), 1.0, Seed(0, "seed"))
    return self_check(responder, policy, PROMPTS, Sampling(max_new_tokens=14), mixed=low)


def test_a_right_engine_passes_in_both_precisions(policy: Policy, tokenizer: Any) -> None:
    exact, low = (check(InProcessEngine(), policy, tokenizer, low) for low in (False, True))
    assert exact["mean"] <= exact["max"] < 1e-4
    assert low["mean"] < 0.05
    assert low != exact  # numbers of another precision


def test_the_exact_part_is_exact_inside_a_mixed_run(make_trainer: MakeTrainer) -> None:
    history = History(["self_check/*"])
    make_trainer([history], precision="bf16-mixed").fit(make_module(), datamodule=make_data())
    (line,) = history.lines
    assert 1e-5 < line["self_check/mean"] < 0.01


@pytest.mark.parametrize("by", [0.002, float("nan")])
def test_an_engine_that_is_off_in_fp32_is_refused(policy: Policy, tokenizer: Any, by: float) -> None:
    with pytest.raises(InputError, match=r"model.model: log-probabilities of Qwen2ForCausalLM by Off differ by up to"):
        check(Off(by), policy, tokenizer)


def test_at_the_runs_precision_the_mean_warns_and_refuses(policy: Policy, tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match=r"self-check: .* 0\.03"):
        assert check(Off(0.03, in_autocast=True), policy, tokenizer, low=True)["max"] > 0.02
    with pytest.raises(InputError, match=r"set trainer.precision 32-true"):
        check(Off(0.3, in_autocast=True), policy, tokenizer, low=True)


def test_a_traceback_becomes_one_line(policy: Policy, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"Broken cannot decode Qwen2ForCausalLM \(AttributeError: no such layer\)"):
        check(Broken(), policy, tokenizer)


def test_prompts_are_of_unequal_length() -> None:
    assert [len(p) for p in unequal_prompts([[1] * 8] * 9)] == [5, 6, 7, 8]
    assert [len(p) for p in unequal_prompts([[1], [1], [1, 2]])] == [1, 1, 2]


def test_a_wrong_engine_ends_fit_and_evaluation_before_they_begin(make_trainer: MakeTrainer) -> None:
    for start in ("fit", "validate"):
        trainer = make_trainer(limit_val_batches=1.0)
        with pytest.raises(InputError, match="by Off differ"):
            getattr(trainer, start)(make_module(engine=Off(0.5), self_check=True), datamodule=make_data(holdout=4))
        assert trainer.global_step == 0


def fitted(
    make_trainer: MakeTrainer, callbacks: list[Callback], ckpt: Path | None = None, **changes: Any
) -> MifoModule:
    module = make_module(**changes)
    data = make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4, epochs_per_rollout=2))
    trainer = make_trainer(callbacks, enable_checkpointing=bool(callbacks))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module


def test_the_check_changes_no_bit_of_a_run_or_of_its_resume(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    torch.manual_seed(5)
    checked = fitted(make_trainer, [saver], self_check=True)
    after = torch.rand(3)
    torch.manual_seed(5)
    unchecked = fitted(make_trainer, [], self_check=False)
    assert (torch.rand(3) == after).all()
    resumed = fitted(make_trainer, [], tmp_path / "step=3.ckpt", self_check=True)
    for name, value in weights(checked).items():
        assert (value == weights(unchecked)[name]).all()
        assert (value == weights(resumed)[name]).all()


def question(prompt: int, demonstration: int) -> Question:
    return Question(0, "s", "", [3] * prompt, "7", [4] * demonstration)


def test_sequences_beyond_the_models_positions_are_refused_with_the_numbers(policy: Policy) -> None:
    config = policy.model.config
    assert positions(config) == 64
    check_lengths(config, [question(50, 14)], "model.rollout.sampling", 14)
    with pytest.raises(
        InputError, match=r"model.rollout.sampling.max_new_tokens: 15 .* 50 tokens makes 65, .* 64 positions"
    ):
        check_lengths(config, [question(50, 1)], "model.rollout.sampling", 15)
    with pytest.raises(
        InputError, match=r"data.demonstrations.max_tokens: .* 65 tokens, and the model has 64 positions"
    ):
        check_lengths(config, [question(5, 60)], "model.rollout.sampling", 59)


def test_demonstrations_longer_than_a_response_may_be_are_warned_of(policy: Policy) -> None:
    with pytest.warns(UserWarning, match=r"up to 20 tokens and model.rollout.sampling.max_new_tokens is 14"):
        warn_of_long_demonstrations([question(5, 20)], 14)


def test_stretched_rotary_positions_count(policy: Policy) -> None:
    config = policy.model.config
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert positions(config) == 256


def test_too_long_runs_and_evaluations_end_at_once(make_trainer: MakeTrainer) -> None:
    long = Sampling(max_new_tokens=60)
    with pytest.raises(
        InputError, match=r"model.rollout.sampling.max_new_tokens: 60 after the longest prompt of 8 tokens"
    ):
        make_trainer().fit(make_module(sampling=long), datamodule=make_data())
    module = make_module(evaluation=Evaluation(sampling=EvaluationSampling(max_new_tokens=60)))
    with pytest.raises(InputError, match=r"model.evaluation.sampling.max_new_tokens: 60 after the longest prompt"):
        make_trainer(limit_val_batches=1.0).validate(module, datamodule=make_data(holdout=4))


def test_a_tokenizer_larger_than_the_embedding_is_refused(policy: Policy, tokenizer: Any) -> None:
    check_vocabulary(policy, tokenizer)
    policy.model.resize_token_embeddings(23)
    with pytest.raises(InputError, match=r"the tokenizer has 24 tokens, the embedding 23 rows"):
        check_vocabulary(policy, tokenizer)
