"""The same steps of TRL's trainers for `benchmarks.run`; runs in an environment with TRL and without this framework."""

import tempfile
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from benchmarks.sizes import Clock, Model, Size, prompts


class Timing(TrainerCallback):
    """The clock runs during every step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """It starts."""
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """It stops."""
        self.clock.end()


def grpo(model: Model, size: Size, clock: Clock, bf16: bool) -> None:
    """GRPO steps."""
    tokenizer = _tokenizer(model)
    texts = prompts(tokenizer, size.prompts * size.steps, size.tokens)
    with tempfile.TemporaryDirectory() as place:
        settings = GRPOConfig(
            num_generations=size.group,
            max_completion_length=size.length,
            generation_kwargs={} if size.ends else {"min_new_tokens": size.length},
            loss_type="grpo",
            beta=0.0,
            **_common(model, place, size, bf16),
        )
        trainer = GRPOTrainer(
            model=model[0] if isinstance(model, tuple) else model,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: clock.coin(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            callbacks=[Timing(clock)],
        )
        trainer.train()


def sft(model: Model, size: Size, clock: Clock, bf16: bool) -> None:
    """SFT steps on completions, without a selection of tokens, which it does not have."""
    tokenizer, count = _tokenizer(model), size.rows * size.steps
    texts = zip(*(prompts(tokenizer, count, n) for n in (size.tokens, size.length)), strict=True)
    rows = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in texts])
    with tempfile.TemporaryDirectory() as place:
        trainer = SFTTrainer(
            model=model[0] if isinstance(model, tuple) else model,
            processing_class=tokenizer,
            args=SFTConfig(**_common(model, place, size, bf16)),
            train_dataset=rows,
            callbacks=[Timing(clock)],
        )
        trainer.train()


def _tokenizer(model: Model) -> Any:
    return model[1] if isinstance(model, tuple) else AutoTokenizer.from_pretrained(model)


def _common(model: Model, place: str, size: Size, bf16: bool) -> dict[str, Any]:
    """Settings of both trainers; as many rows at once as a chunk of ours has room for."""
    fits = [n for n in range(1, size.rows + 1) if size.rows % n == 0 and n * (size.tokens + size.length) <= size.room]
    loading = {} if isinstance(model, tuple) else {"model_init_kwargs": {"dtype": "float32"}}
    return loading | {
        "output_dir": place,
        "per_device_train_batch_size": max(fits),
        "gradient_accumulation_steps": size.rows // max(fits),
        "max_steps": size.steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "seed": 0,
        "use_cpu": isinstance(model, str) or model[0].device.type == "cpu",
        "bf16": bf16,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
