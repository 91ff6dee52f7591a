"""Steps of this framework for `benchmarks.run`."""

from typing import Any

import lightning

import mifo_lightning as mifo
from benchmarks.endless import Endless
from benchmarks.sizes import Clock, Size, prompts
from mifo_callbacks import EntropyTokenSelection

TEXT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


class Timing(lightning.Callback):
    """The clock runs during every step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        """It starts."""
        self.clock.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        """It stops."""
        self.clock.end()


def grpo(model: str, size: Size, clock: Clock, bf16: bool, share: bool | None = None) -> None:
    """GRPO steps; `share` is `model.loading.share_prompts`."""

    def reward(responses: list[str], truths: list[str]) -> list[float]:
        return clock.coin(responses)

    lightning.seed_everything(0, verbose=False)
    switch: Any = {} if share is None else {"share_prompts": share}  # older commits, to be timed beside this, lack it
    module = mifo.MifoModule(
        model,
        mifo.FunctionReward(reward, isolate=False),
        mifo.Rollout(group_size=size.group, sampling=mifo.Sampling(max_new_tokens=size.length), self_check=False),
        loading=mifo.Loading(**switch),
    )
    texts = prompts(module.tokenizer, size.prompts * size.steps, size.tokens)
    schedule = mifo.Schedule(rl_steps=size.steps, prompts_per_step=size.prompts, fit_sizes=False)
    _fit(module, [(text, None) for text in texts], schedule, bf16, Timing(clock), *([] if size.ends else [Endless()]))


def sft(model: str, size: Size, clock: Clock, bf16: bool, selection: bool) -> None:
    """SFT steps; with `selection` the loss sees the fifth of the tokens that has the highest entropy."""
    lightning.seed_everything(0, verbose=False)
    module = mifo.MifoModule(model, mifo.FunctionReward(lambda responses, truths: [0.0], isolate=False))
    count = size.rows * size.steps
    texts = zip(*(prompts(module.tokenizer, count, n) for n in (size.tokens, size.length)), strict=True)
    schedule = mifo.Schedule(rl_steps=0, sft_before=size.steps, sft_batch=size.rows, fit_sizes=False)
    _fit(module, list(texts), schedule, bf16, Timing(clock), *([EntropyTokenSelection()] if selection else []))


def _fit(module: Any, texts: Any, schedule: mifo.Schedule, bf16: bool, *callbacks: lightning.Callback) -> None:
    rows: Any = [
        {"prompt": prompt, "data_source": "text", "reward_model": {"ground_truth": "-"}, "target": target}
        for prompt, target in texts
    ]
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        precision="bf16-mixed" if bf16 else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    demonstrations = mifo.Demonstrations(verify=False)
    data = mifo.QuestionData(
        rows, prompts=mifo.Prompts(chat_template=TEXT), demonstrations=demonstrations, schedule=schedule
    )
    trainer.fit(module, data)
