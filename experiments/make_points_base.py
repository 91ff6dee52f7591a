"""What must a model know of the 24 game for RL to matter? Makes the base model of GeneralPoints from nothing.

It knows what cards count under both rules, does whole-number arithmetic and keeps track of the numbers at hand. It
often begins at random, so it makes 24 only now and then (RL has something to sharpen), less often where few solutions
exist (demonstrations have something to teach).

    python -m experiments.make_points_base --seeds 0 --out runs/points_bases        # writes runs/points_bases/seed0
    python -m experiments.make_points_base --seeds 0 1 2 --jobs 2 --out runs/points_bases

About five minutes of one CPU thread a seed. One thread and seeded throughout: the same seed gives the same weights on
the same machine. Training uses hands of the train split only, the printed accuracies those of the test split. The
recipe was settled by those of the base alone, before any method ran on it: they are no measure of how well it
generalizes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from experiments.base_training import (
    EOS,
    PAD,
    Result,
    Training,
    answers,
    decayed,
    make_all,
    make_model,
    optimize,
    parsed,
    parser,
)
from mifo_lightning.common.seeds import stable_key
from mifo_lightning.data.general_points import (
    CARDS,
    RANKS,
    RULES,
    GeneralPoints,
    Number,
    Step,
    belongs,
    prompt,
    results,
    values,
    ways,
    written,
)
from mifo_lightning.rewards.points import PointsReward

VOCABULARY = [PAD, EOS, *"0123456789ATJQK+-*/()=,:tl"]
IDS = {token: index for index, token in enumerate(VOCABULARY)}
PROMPT_TOKENS, RESPONSE_TOKENS, SAMPLES = 7, 32, 8


@dataclass(frozen=True)
class Recipe(Training):
    """How the base is trained."""

    batch: int = 160
    decay_from: int = 1000
    """From here the rate falls linearly to a twentieth."""
    pool: int = 128_000
    """Responses drawn before training; each is seen about twice."""
    solved: float = 0.5
    """Share of responses that begin with a step of a solution; the others begin at random. As every response goes
    on to 24 once three or two numbers can make it, the last two steps are learned and the first is left open."""
    largest: int = 99
    """Results above it, which hardly ever help, are left out of the random responses."""


def response(numbers: tuple[int, ...], recipe: Recipe, rng: np.random.Generator) -> str:
    """A correct response to the cards: random steps until the numbers at hand are seen to make 24, then these steps."""
    hand: list[Number] = list(numbers)
    steps: list[Step] = []
    while len(hand) > 1:
        seen = ways(tuple(sorted(hand))) if len(hand) < CARDS or rng.random() < recipe.solved else ()
        if seen:
            steps += seen[rng.integers(len(seen))]
            break
        a, b = (hand.pop(rng.integers(len(hand))) for _ in range(2))
        allowed = [step for step in results(a, b) if isinstance(step[3], int) and step[3] <= recipe.largest]
        steps.append(allowed[rng.integers(len(allowed))])  # the difference is always allowed
        hand.append(steps[-1][3])
    return written(tuple(steps))


def corpus(recipe: Recipe, seed: int) -> Tensor:
    """Prompts and responses on hands of the train split, solvable or not, both rules alike: int64 [pool, 39]."""
    rng = np.random.default_rng(seed)
    tokens = np.full((recipe.pool, PROMPT_TOKENS + RESPONSE_TOKENS), IDS[PAD], dtype=np.int64)
    for row in range(recipe.pool):
        rule = list(RULES)[row % 2]
        ranks: tuple[int, ...] = ()
        while not ranks or not belongs(tuple(sorted(values(ranks, rule))), "train"):
            ranks = tuple(rng.integers(len(RANKS), size=CARDS).tolist())
        text = prompt(ranks, rule) + response(values(ranks, rule), recipe, rng)
        tokens[row, : len(text) + 1] = [*(IDS[char] for char in text), IDS[EOS]]
    return torch.from_numpy(tokens)


def train(model: Qwen2ForCausalLM, recipe: Recipe, seed: int) -> None:
    """Trains `model` in place; the loss is the mean over the response tokens of a batch, EOS included."""
    pool = corpus(recipe, seed)
    rng = np.random.default_rng([seed, 1])

    def batch(step: int) -> Tensor:
        tokens = pool[rng.integers(recipe.pool, size=recipe.batch)]
        return tokens[:, : int((tokens != IDS[PAD]).sum(1).max())]

    optimize(model, recipe, batch, lambda step: decayed(step, recipe, recipe.decay_from, 0.05), PROMPT_TOKENS)


def grades(model: Qwen2ForCausalLM, rule: str, questions: int, samples: int = 1, seed: int = 0) -> Tensor:
    """Graded rewards of responses at temperature 1 to test hands, [questions, samples]; without EOS they are 0."""
    rows = GeneralPoints([rule], questions, "test", seed).rows()
    prompts = [row["prompt"][0]["content"] for row in rows]
    keys = [stable_key(seed, rule, index) for index in range(questions)]
    texts = answers(model, VOCABULARY, prompts, keys, samples, RESPONSE_TOKENS)
    truths = [row["reward_model"]["ground_truth"] for row in rows for _ in range(samples)]
    return torch.tensor(PointsReward(graded=True)(texts, truths)).view(questions, samples)


def make(seed: int, out: Path, questions: int, recipe: Recipe = Recipe()) -> Result:
    """Trains one base, writes it to `out` as a Hugging Face directory and measures it."""
    model, seconds = make_model(VOCABULARY, seed, out, lambda model: train(model, recipe, seed))
    accuracy = {}
    for rule in RULES:
        right = grades(model, rule, questions, SAMPLES) == 1
        accuracy[f"{rule} avg"] = float(right.float().mean())
        accuracy[f"{rule} pass@{SAMPLES}"] = float(right.any(1).float().mean())
    return Result(seed, accuracy, seconds)


def main() -> None:
    """Make the bases that are asked for."""
    args = parsed(parser("Train the base model of GeneralPoints from random weights.", questions=1024))
    seeds = args.seeds or [0]
    make_all(make, seeds, [args.out / f"seed{seed}" for seed in seeds], args.questions, args.jobs)


if __name__ == "__main__":
    main()
