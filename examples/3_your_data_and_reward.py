"""Your data and your reward.

Questions as a list of dictionaries, a reward as a plain function: what it takes to train on something of your own.
The task here is to double a number and write it backwards, in the symbols that the embedded model can read. It never
gets that right by itself, so it takes solutions to learn from. With a model of yours, all the rest stays.
"""

# %% Rows
# A row is a question with its right answer and, if SFT is to learn from it, a worked solution. `Columns` says which
# of your columns hold what; `data_source` names what metrics are kept apart by. Instead of a list, `QuestionData`
# takes a file (parquet, jsonl, json, csv), a `datasets.Dataset` or the name of a data set on the hub:
# [Data](../data.md).

import lightning

import mifo_callbacks
import mifo_lightning as mifo


def steps(n: int) -> str:
    """A worked doubling: digit and carry of each column, least first."""
    text, carry = "", 0
    for digit in reversed(f"{n:03d}"):
        carry, digit = divmod(2 * int(digit) + carry, 10)
        text += f"{digit}{carry}"
    return text


rows = [
    {
        "question": f"{n:03d}x{n:03d}=",
        "answer": f"{2 * n:04d}"[::-1],
        "solution": f"{steps(n)}>{f'{2 * n:04d}'[::-1]}",
        "level": "small" if n < 500 else "large",
    }
    for n in range(1000)
]
print(rows[123])
columns = mifo.Columns(prompt="question", truth="answer", target="solution", data_source="level")

# %% A reward
# A function gets what it declares: here the responses and the right answers, one entry for each response. Others to
# declare are `prompts`, `sources`, `lengths`, `finished`, `columns` or the name of a column:
# [Rewards](../rewards.md). It returns any finite numbers; from `success_threshold` on a response counts as correct, for
# the buffer and for accuracy. This one gives a tenth of a point for each right digit of a wrong answer.


def digits(responses: list[str], truths: list[str]) -> list[float]:
    """1 for the right answer, else 0.1 for each digit in its place."""
    scores = []
    for response, truth in zip(responses, truths, strict=True):
        answer = response.rpartition(">")[2]
        scores.append(1.0 if answer == truth else sum(a == t for a, t in zip(answer, truth, strict=False)) / 10)
    return scores


print(digits(["604020>6420", "604020>6020", "6420"], ["6420", "6420", "6420"]))

# %% Training
# A function of the program that was started runs in the training process, and one line says so. In a file of its own,
# named by `mifo.FunctionReward("my_rewards.digits")`, it runs in a child process: one that hangs or crashes costs its
# responses, not the run. `holdout` keeps questions back for validation; a demonstration that your reward does not
# accept is dropped and counted.

lightning.seed_everything(1)
module = mifo.MifoModule(
    "embedded",
    digits,
    mifo.Rollout(sampling=mifo.Sampling(max_new_tokens=14), success_threshold=1.0),
    optimizer=mifo.OptimizerSettings(rl=mifo.AdamWSettings(lr=5e-4), sft=mifo.AdamWSettings(lr=1e-3)),
)
data = mifo.QuestionData(
    rows,
    columns=columns,
    demonstrations=mifo.Demonstrations(answer_after=">"),
    holdout=200,
    eval_batch=200,
    schedule=mifo.Schedule(rl_steps=12, prompts_per_step=16, sft_batch=8, sft_epochs=4),
)
trainer = lightning.Trainer(
    max_epochs=-1,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=mifo_callbacks.mifo(size=16),
)
trainer.fit(module, data)

# %% What came out
# Metrics are kept apart by `data_source`, here by level.

found = trainer.validate(module, data, verbose=False)[0]
print({key: round(value, 3) for key, value in found.items() if key.endswith("avg@1")})
print(module.generate(["321x321="], samples=4))

# %% The same from the command line
# With `rows` in `mine.jsonl` and the function in `my_rewards.py`, these lines of YAML after a base do the same:
#
# ```yaml
# data:
#   train: mine.jsonl
#   columns: {prompt: question, truth: answer, target: solution, data_source: level}
#   holdout: 200
# reward:
#   class_path: mifo_lightning.rewards.function.FunctionReward
#   init_args: {function: my_rewards.digits}
# ```
