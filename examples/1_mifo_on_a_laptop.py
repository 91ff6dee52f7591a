"""MIFO on a laptop.

A whole run of MIFO from Python in half a minute, without a GPU or a download: a model that ships with the package, a
task that RL alone cannot learn, and a look at what each phase did. The question: how does a model learn what it never
samples, and what does that cost?
"""

# %% The task
# Two skills on three-digit numbers. *addition* the model solves one time in three, so RL has something to reward. Of
# *mirrored* addition it knows the steps but never the answer: rollouts find no reward there, and only demonstrations
# teach it. Two more skills, *sorting* and *reversal*, are never trained; they show what is forgotten.

import lightning

import mifo_callbacks
import mifo_lightning as mifo

lightning.seed_everything(1)
train = mifo.Skills(["addition", "mirrored"], count=2048)
val = mifo.Skills(["addition", "mirrored", "sorting", "reversal"], count=512, split="val")

# %% The model
# `MifoModule` takes a Hugging Face directory or hub name; `embedded` is the model of 0.31 million parameters that the
# package brings. The reward compares what follows the last `>` with the right answer. It answers before it is
# trained:

sampling = mifo.Sampling(max_new_tokens=14)  # at temperature 1
module = mifo.MifoModule(
    "embedded",
    mifo.LastAnswerReward(">"),
    mifo.Rollout(sampling=sampling),
    optimizer=mifo.OptimizerSettings(rl=mifo.AdamWSettings(lr=5e-4), sft=mifo.AdamWSettings(lr=1e-3)),
    evaluation=mifo.Evaluation(sampling=sampling),
)
print("addition and mirrored, before:", module.generate(["123+456=", "123x456="], samples=2))

# %% Data and schedule
# What is not given to the data (reward, tokenizer, threshold, seed) is the module's. 32 RL steps of 32 questions, 8
# rollouts each; SFT phases come on top, whenever the buffer is full, and pass four times over their demonstrations.

data = mifo.QuestionData(
    train,
    val,
    demonstrations=mifo.Demonstrations(answer_after=">"),
    eval_batch=512,
    schedule=mifo.Schedule(rl_steps=32, prompts_per_step=32, sft_batch=64, sft_epochs=4),
)

# %% The method
# MIFO is four callbacks: token selection, the map of importance, freezing, and the buffer that starts SFT phases.
# `size` is S, the number of hard questions that start one. Without callbacks the same module does plain RL. The
# callback below is your own: it collects what training measures, for the last section.


class Diary(lightning.Callback):
    """Keeps a line for each optimizer step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        measured = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.lines.append({"sft": batch["phase"] == "sft", **measured})


diary = Diary()
trainer = lightning.Trainer(
    max_epochs=-1,  # the schedule ends the run
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[*mifo_callbacks.mifo(size=64), diary],
)

# %% Training, with a look before and after

before = trainer.validate(module, data, verbose=False)[0]
trainer.fit(module, data)
after = trainer.validate(module, data, verbose=False)[0]

print(f"{'skill':<12}{'before':>8}{'after':>8}")
for skill in ("addition", "mirrored", "sorting", "reversal"):
    print(f"{skill:<12}{before[f'val/{skill}/avg@1']:>8.2f}{after[f'val/{skill}/avg@1']:>8.2f}")

# %% What happened
# RL sharpened addition. The buffer filled with mirrored additions, each full buffer started a phase, and in each
# phase half of the weights, those that RL had moved most, stood still. The phases taught mirrored addition, and cost
# some of the skills that nothing trains. Whether they cost less than without the mask one run cannot say: [compare it
# with its controls](tutorial_4_compare.md). `make demo` trains four times as long. Every curve is explained on the
# [metrics page](../metrics.md).

phases = sum(line["sft"] and not earlier["sft"] for earlier, line in zip(diary.lines, diary.lines[1:], strict=False))
frozen = next(line["freeze/share"] for line in diary.lines if "freeze/share" in line)
print(f"{len(diary.lines)} optimizer steps, {phases} SFT phases, {frozen:.1%} of the weights frozen in each")
print("mirrored, after:", module.generate(["123x456="], samples=4))
