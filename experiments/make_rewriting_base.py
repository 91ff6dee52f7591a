"""Trains the base model of string rewriting (`mifo_lightning.data.rewriting`) from nothing.

It rewrites by the rules of u almost perfectly (the probe of forgetting). By those of p it writes a letter by chance now
and then, so that it often ends wrongly although it knows the rules (RL has something to sharpen). In q it does the same
and ends in three digits by chance, so that one response in about a thousand is right (RL finds next to no reward there,
demonstrations have the codes to teach).

    python -m experiments.make_rewriting_base --seeds 0 --out runs/rewriting_bases        # writes .../seed0
    python -m experiments.make_rewriting_base --seeds 0 1 2 --jobs 2 --out runs/rewriting_bases

About two and a half minutes of one CPU thread a seed. One thread and seeded throughout: the same seed gives the same
weights on the same machine. Training uses words of the train split only, the printed accuracies those of the test
split. The rules of the task, this recipe and the batch of `configs/rewriting.yaml` were settled on seeds 100 and 101,
with rl and interleave; no study has these seeds.
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
from mifo_lightning.data.rewriting import DIGITS, LETTERS, SYSTEMS, Rewriting, words
from mifo_lightning.rewards.rewriting import RewritingReward

VOCABULARY = [PAD, EOS, *LETTERS, *DIGITS, *SYSTEMS, *":=,"]
IDS = {token: index for index, token in enumerate(VOCABULARY)}
PROMPT_TOKENS, RESPONSE_TOKENS = 7, 13


@dataclass(frozen=True)
class Recipe(Training):
    """How the base is trained."""

    decay_from: int = 1000
    """From here the rate falls linearly to a tenth."""
    shares: tuple[float, ...] = (0.35, 0.15, 0.5)
    """Of p, q and u. The letters of q are those of p, so that p is shown in both."""
    careless: float = 0.3
    """Chance that a step of p or q writes a letter by chance in place of the right one; later steps go on from it."""


class Corpus:
    """Training text, drawn anew for every step from the words of the train split."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe, self.rng, self.words = recipe, np.random.default_rng(seed), words("train")

    def batch(self, step: int) -> Tensor:
        """Token ids, int64 [batch, 20]: prompts of 7 tokens and responses padded to 13."""
        counts = self.rng.multinomial(self.recipe.batch, self.recipe.shares)
        tokens = np.full((self.recipe.batch, PROMPT_TOKENS + RESPONSE_TOKENS), IDS[PAD], dtype=np.int64)
        for row, system in enumerate(np.repeat(list(SYSTEMS), counts).tolist()):
            word = self.words[self.rng.integers(len(self.words))]
            text = f"{system}:{word}={self._response(word, system)}"
            tokens[row, : len(text) + 1] = [*(IDS[char] for char in text), IDS[EOS]]
        return torch.from_numpy(tokens)

    def _response(self, word: str, system: str) -> str:
        rules, made = SYSTEMS[system], []
        while len(word) > 1:
            place = self.rng.integers(len(word) - 1)
            careless = system != "u" and self.rng.random() < self.recipe.careless
            letter = self.rng.choice(list(LETTERS)) if careless else rules[word[place : place + 2]]
            word = word[:place] + letter + word[place + 2 :]
            made.append(word)
        if system == "q":
            made.append("".join(self.rng.choice(list(DIGITS), 3)))
        return ",".join(made)


def train(model: Qwen2ForCausalLM, recipe: Recipe, seed: int) -> None:
    """Trains `model` in place; the loss is the mean over the response tokens of a batch, EOS included."""
    corpus = Corpus(recipe, seed)
    optimize(model, recipe, corpus.batch, lambda step: decayed(step, recipe, recipe.decay_from, 0.1), PROMPT_TOKENS)


def accuracy(model: Qwen2ForCausalLM, system: str, count: int, seed: int = 0) -> float:
    """Share of right responses at temperature 1 to test questions; one that does not end in EOS is wrong."""
    rows = Rewriting([system], count, "test", seed).rows()
    prompts = [row["prompt"][0]["content"] for row in rows]
    keys = [stable_key(seed, system, index) for index in range(count)]
    texts = answers(model, VOCABULARY, prompts, keys, 1, RESPONSE_TOKENS + 1)
    return sum(RewritingReward()(texts, [row["reward_model"]["ground_truth"] for row in rows])) / count


def make(seed: int, out: Path, count: int, recipe: Recipe = Recipe()) -> Result:
    """Trains one base, writes it to `out` as a Hugging Face directory and measures it."""
    model, seconds = make_model(VOCABULARY, seed, out, lambda model: train(model, recipe, seed))
    return Result(seed, {system: accuracy(model, system, count) for system in SYSTEMS}, seconds)


def main() -> None:
    """Make the bases that are asked for."""
    args = parsed(parser("Train the base model of string rewriting from random weights.", questions=1024))
    seeds = args.seeds or [0]
    make_all(make, seeds, [args.out / f"seed{seed}" for seed in seeds], args.questions, args.jobs)


if __name__ == "__main__":
    main()
