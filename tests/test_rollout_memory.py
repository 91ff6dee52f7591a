"""Decoding that runs out of memory: half the rows, the same responses, said once, and resumed alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import short
from conftest import make_data, make_module, weights
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mifo_lightning.cli import main
from mifo_lightning.common.errors import InputError, TrainingError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.module import MifoModule
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.engine import Completion, Decoded, Sampling
from mifo_lightning.rollout.in_process import InProcessEngine

TEXTS = ["123+456=", "9+9=", "s:40312=", "777x12=", "r:12345="]
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore lines")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: 7 bytes")


def limit(monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception, late: bool = False) -> list[int]:
    """Policies find no memory for more than so many rows, from the third token on if `late`; returns rows tried."""
    decode, tried = Policy.decode, []

    def narrow(self: Policy, ids: Any, cache: Any, attention: Any, positions: Any) -> Any:
        tried.append(len(ids))
        if len(ids) > rows and (not late or (positions is not None and int(positions.max()) > 10)):
            raise error
        return decode(self, ids, cache, attention, positions)

    monkeypatch.setattr(Policy, "decode", narrow)
    return tried


def draw(engine: InProcessEngine, policy: Policy, tokenizer: Any, samples: int = 3) -> list[list[Completion]]:
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    return engine.generate(policy, tokenizer, prompts, [7, 8, 9, 2**62, 5], samples, Sampling(1.3, max_new_tokens=14))


@pytest.mark.parametrize(("error", "late"), [(CUDA, False), (CUDA, True), (CPU, False)])
def test_out_of_memory_halves_the_rows_and_gives_the_bits_of_so_few_rows(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, late: bool
) -> None:
    wanted = draw(InProcessEngine(7), policy, tokenizer)
    tried = limit(monkeypatch, 6, error, late)
    engine, told = InProcessEngine(64), []
    engine.listener = told.append
    with pytest.warns(UserWarning, match="out of memory while decoding 15 responses at once.*engine rows") as said:
        found = draw(engine, policy, tokenizer)
    assert found == wanted, "tokens and log-probabilities, to the bit"
    assert engine.rows == 7
    assert told[-1] == Decoded(15, 15, told[-1].step, 14, told[-1].tokens), "it counts from the beginning"
    assert draw(engine, policy, tokenizer) == wanted, "and so do later calls, without another failure"
    assert len(said) == 1
    assert tried[-1] <= 6


def test_half_is_half_of_what_was_tried_where_the_cache_bounds_it(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS) + 14
    tried = limit(monkeypatch, 3, CUDA)
    engine = InProcessEngine(64, cache_tokens=6 * width)
    with pytest.warns(UserWarning, match="decoding 6 responses at once: this call begins anew with 3"):
        draw(engine, policy, tokenizer)
    assert engine.rows == 3
    assert sum(rows > 3 for rows in tried) == 1, "one failure was enough"


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_rows_bound_what_is_decoded_at_once_below_a_question_s_samples_too(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    whole = draw(InProcessEngine(), policy, tokenizer, samples=5)
    tried = limit(monkeypatch, 10**9, CUDA)
    parts = draw(InProcessEngine(rows), policy, tokenizer, samples=5)
    assert [[c.tokens for c in group] for group in parts] == [[c.tokens for c in group] for group in whole]
    assert max(tried) <= rows


def test_a_single_response_without_memory_stops_with_one_line(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 0, CUDA)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(TrainingError, match="single resp") as end:
        draw(InProcessEngine(4), policy, tokenizer)
    assert "\n" not in str(end.value)


def test_other_errors_are_not_taken_for_it(policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = limit(monkeypatch, 6, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        draw(InProcessEngine(), policy, tokenizer)
    assert len(tried) <= 2
    with pytest.raises(InputError, match="rows: 0"):
        InProcessEngine(0)


def test_a_run_that_halved_resumes_to_the_same_bits(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 6, CUDA)

    def run(steps: int, start: Path | None = None) -> tuple[Any, InProcessEngine]:
        module, engine = make_module(), InProcessEngine(64)
        module.responder.engine = engine
        saver = ModelCheckpoint(tmp_path / f"{steps}", save_last=True, every_n_train_steps=1)
        trainer = make_trainer([saver], enable_checkpointing=True, max_steps=steps)
        data = make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4))
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=False)
        return module, engine

    with pytest.warns(UserWarning, match="out of memory"):
        whole, _ = run(3)
    with pytest.warns(UserWarning, match="out of memory"):
        run(2)
    with pytest.warns() as said:
        resumed, engine = run(3, tmp_path / "2" / "last.ckpt")
    assert not [w for w in said if "out of memory" in str(w.message)], "it begins with the rows that it ended with"
    assert engine.rows < 6
    pairs = zip(weights(whole).values(), weights(resumed).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_training_without_memory_is_one_line_and_keeps_what_was_saved(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, left = MifoModule.training_step, iter(range(2))

    def narrow(self: MifoModule, *arguments: Any) -> Any:
        if next(left, None) is None:
            raise CUDA
        return step(self, *arguments)

    monkeypatch.setattr(MifoModule, "training_step", narrow)
    flags = short(tmp_path, trainer__enable_checkpointing="true", checkpoint__every="1")
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "CUDA out of memory. Tried to allocate 20.00 MiB." in line
    assert "model.optimizer.micro_batches" in line
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
