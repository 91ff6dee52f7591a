"""Steps of this framework that are timed: what its runs in benchmarks/ have in common, and GRPO and SFT steps."""

from collections.abc import Sequence
from typing import Any

import lightning

import mifo_lightning as mifo
from benchmarks.endless import Endless
from benchmarks.sizes import Clock, Model, Size, coin, prompts
from mifo_callbacks import EntropyTokenSelection


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


def module(model: Model, size: Size, clock: Clock | None = None, **settings: Any) -> mifo.MifoModule:
    """What trains, graded by a coin; `settings` are others of a `MifoModule`."""

    def reward(responses: list[str], truths: list[str]) -> list[float]:
        return coin(responses) if clock is None else clock.coin(responses)

    lightning.seed_everything(0, verbose=False)
    return mifo.MifoModule(
        model,  # type: ignore[arg-type]  # a loaded one in place of a name
        mifo.FunctionReward(reward, isolate=False),
        mifo.Rollout(
            group_size=max(size.group, 2),  # 1 is of SFT steps, which draw none
            sampling=mifo.Sampling(max_new_tokens=size.length),
            self_check=False,
        ),
        **settings,
    )


def data(texts: Sequence[tuple[str, str | None]], **schedule: Any) -> mifo.QuestionData:
    """Prompts with demonstrations, or with None, as they stand; `schedule` is `data.schedule`."""
    rows: Any = [
        {"prompt": prompt, "data_source": "text", "reward_model": {"ground_truth": "-"}, "target": target}
        for prompt, target in texts
    ]
    return mifo.QuestionData(
        rows,
        prompts=mifo.Prompts(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"),
        demonstrations=mifo.Demonstrations(verify=False),
        schedule=mifo.Schedule(fit_sizes=False, **schedule),
    )


def trainer(*callbacks: lightning.Callback, bf16: bool = False, **settings: Any) -> lightning.Trainer:
    """A Trainer that does nothing beside; `settings` are others of its own."""
    usual: dict[str, Any] = {"accelerator": "cpu", "logger": False, "precision": "bf16-mixed" if bf16 else "32-true"}
    return lightning.Trainer(
        devices=1,
        max_epochs=-1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**usual, **settings},
    )


def grpo(model: Model, size: Size, clock: Clock, bf16: bool, share: bool | None = None, parts: int = 1) -> None:
    """GRPO steps in `parts` micro-batches; `share` is `model.loading.share_prompts`."""
    switch: Any = {} if share is None else {"share_prompts": share}  # older commits, to be timed beside this, lack it
    cut = mifo.OptimizerSettings(micro_batches=parts)
    trained = module(model, size, clock, loading=mifo.Loading(**switch), optimizer=cut)
    texts = prompts(trained.tokenizer, size.prompts * size.steps, size.tokens)
    questions = data([(text, None) for text in texts], rl_steps=size.steps, prompts_per_step=size.prompts)
    trainer(Timing(clock), *([] if size.ends else [Endless()]), bf16=bf16).fit(trained, questions)


def sft(model: Model, size: Size, clock: Clock, bf16: bool, selection: bool) -> None:
    """SFT steps; with `selection` the loss sees the fifth of the tokens that has the highest entropy."""
    trained = module(model, size)
    count = size.rows * size.steps
    texts = zip(*(prompts(trained.tokenizer, count, n) for n in (size.tokens, size.length)), strict=True)
    demonstrations = data(list(texts), rl_steps=0, sft_before=size.steps, sft_batch=size.rows)
    trainer(Timing(clock), *([EntropyTokenSelection()] if selection else []), bf16=bf16).fit(trained, demonstrations)
