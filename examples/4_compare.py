"""A method and its controls.

Does a part of a method help, or would something simpler do as well? This compares MIFO's choice of tokens, those of
highest entropy, with as many tokens at random and with all tokens: three arms, two seeds each, everything else equal.
Two seeds decide nothing; the tutorial shows the form of a comparison. `python -m mifo_lightning.lab ablation` does the
same at length ([how](../comparing.md)).
"""

# %% The arms
# An arm is a list of callbacks. They differ in nothing but the one that is asked about: MIFO's four, the same with
# `selector="random"`, and the same without a selection.

import logging
import statistics
import warnings

import lightning
from lightning import Callback

import mifo_callbacks
import mifo_lightning as mifo
from mifo_callbacks import EntropyTokenSelection

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


def arm(name: str) -> list[Callback]:
    """New callbacks for each fit: a callback belongs to one run."""
    _, *others = mifo_callbacks.mifo(size=32)
    tokens = {
        "highest entropy": [EntropyTokenSelection(0.2)],
        "random tokens": [EntropyTokenSelection(0.2, selector="random")],
        "all tokens": [],
    }
    return [*tokens[name], *others]


# %% One fit
# The seed is the fit's: rollouts, the order of questions and the random tokens follow it, so arms with the same seed
# meet the same questions. Each is scored on questions that no fit has seen.


def fit(name: str, seed: int) -> dict[str, float]:
    """Accuracy of each skill after a short run."""
    lightning.seed_everything(seed, verbose=False)
    sampling = mifo.Sampling(max_new_tokens=14)
    module = mifo.MifoModule(
        "embedded",
        mifo.LastAnswerReward(">"),
        mifo.Rollout(sampling=sampling),
        optimizer=mifo.OptimizerSettings(rl=mifo.AdamWSettings(lr=5e-4), sft=mifo.AdamWSettings(lr=1e-3)),
        evaluation=mifo.Evaluation(sampling=sampling),
    )
    data = mifo.QuestionData(
        mifo.Skills(["addition", "mirrored"], count=512),
        mifo.Skills(["addition", "mirrored", "sorting", "reversal"], count=256, split="val"),
        demonstrations=mifo.Demonstrations(answer_after=">"),
        eval_batch=256,
        schedule=mifo.Schedule(rl_steps=10, prompts_per_step=16, sft_batch=16, sft_epochs=4),
    )
    trainer = lightning.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=arm(name),
    )
    trainer.fit(module, data)
    found = trainer.validate(module, data, verbose=False)[0]
    return {skill: found[f"val/{skill}/avg@1"] for skill in ("addition", "mirrored", "sorting", "reversal")}


# %% The comparison
# Learned: what is trained. Kept: what is not. The difference to the reference is taken seed by seed, which removes
# what the seeds share.

SEEDS = (0, 1)
REFERENCE = "highest entropy"
runs = {name: [fit(name, seed) for seed in SEEDS] for name in (REFERENCE, "random tokens", "all tokens")}


def means(name: str, *skills: str) -> list[float]:
    """Mean accuracy on some skills, of each seed."""
    return [statistics.mean(run[skill] for skill in skills) for run in runs[name]]


print(f"{'arm':<18}{'learned':>9}{'kept':>9}  difference of all four, by seed")
for name in runs:
    learned, kept = means(name, "addition", "mirrored"), means(name, "sorting", "reversal")
    differences = [
        statistics.mean(one.values()) - statistics.mean(other.values())
        for one, other in zip(runs[name], runs[REFERENCE], strict=True)
    ]
    shown = "" if name == REFERENCE else ", ".join(f"{d:+.3f}" for d in differences)
    print(f"{name:<18}{statistics.mean(learned):>9.3f}{statistics.mean(kept):>9.3f}  {shown}")

# %% What may be said
# Nothing yet: two seeds on one base model. Seeds on one base say nothing about other bases, and before a run someone
# has to write down which comparison is the one that counts. [Comparing methods](../comparing.md) says how many bases
# a claim needs, and [Results](../results.md) what longer studies could and could not show.
