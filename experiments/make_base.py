"""What must a model know for RL and for demonstrations to matter? Remakes the base of the embedded task from nothing.

It sorts and reverses almost perfectly (the probes of forgetting), adds right about one time in three because it often
answers tersely and noisily although it can work sums out (so RL has something to sharpen), and knows the steps of
mirrored addition but never its answer (so RL finds no reward there and only demonstrations teach it).

    python -m experiments.make_base --seed 0 --out mifo_lightning/assets/base
    python -m experiments.make_base --seeds 0 1 2 --jobs 2 --out bases        # writes bases/seed0, bases/seed1, ...

About two minutes of one CPU thread a seed. One thread and seeded throughout: the same seed gives the same weights on
the same machine. Training uses questions of the train split only, the printed accuracies those of the test split.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, Qwen2ForCausalLM

from experiments.base_training import EOS, PAD, Result, Training, make_all, make_model, optimize, parsed, parser
from mifo_lightning.data.skills import SIZES, Ids, Skills, Worked, belongs, worked

# The last five symbols occur in no skill: room for a further skill without a new base.
VOCABULARY = [PAD, EOS, *"0123456789+x=>sr:", *"-*<,;"]
IDS = {token: index for index, token in enumerate(VOCABULARY)}
CODE_TO_ID = np.array([IDS.get(chr(code), -1) for code in range(128)], dtype=np.int64)
DIGITS = np.frombuffer(b"0123456789", np.uint8)
PROMPT_TOKENS, RESPONSE_TOKENS, SAMPLED_TOKENS = 8, 12, 14
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Recipe(Training):
    """How the base is trained: steps before `mixed_from` teach to work sums out, later ones the bad habits."""

    steps: int = 900
    """Two minutes of one CPU thread; sums with carries come out right from about step 300, sorting last."""

    sorting: float = 0.22
    reversal: float = 0.15
    """Sorting is the harder of the two and gets the larger share."""
    mirrored: float = 0.12
    """Little, as it shares its steps with addition, which is the rest."""

    mixed_from: int = 600
    """Until here sums are always worked out: with terse answers from the start, working them out is never learnt.
    Mirrored additions stop after the `>` until here; then they end in four random digits. So the format is known, a
    right answer is one in ten thousand, and a demonstration has only the digits to teach. With 100 instead of 300 such
    steps the randomness is a thin layer: RL on plain sums wears it off and sometimes finds mirrored answers."""
    mixed_lr: float = 1.5e-3
    """From here the rate falls linearly to a tenth, so that the mixture of habits settles."""
    terse: float = 0.7
    """Share of the later additions answered without steps: the habit that RL has to unlearn."""
    wrong_digit: float = 0.4
    """Chance that a digit of a terse answer is replaced by a random one, so that being terse rarely pays."""


class Corpus:
    """Training text, drawn anew for every step from the questions of the train split."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.rng = np.random.default_rng(seed)
        self.pools = {skill: _split_ids(skill) for skill in SIZES}

    def batch(self, step: int) -> Tensor:
        """Token ids, int64 [batch, 20]: prompts of 8 tokens and responses padded to 12."""
        recipe = self.recipe
        mixed = step >= recipe.mixed_from
        additions = 1 - recipe.sorting - recipe.reversal - recipe.mirrored
        terse = additions * recipe.terse if mixed else 0.0
        shares = [recipe.sorting, recipe.reversal, recipe.mirrored, terse, additions - terse]
        sorting, reversal, mirrored, tersely, fully = self.rng.multinomial(recipe.batch, shares)
        texts = [
            self._right("sorting", sorting),
            self._right("reversal", reversal),
            self._mirrored(mirrored, answered=mixed),
            self._terse(tersely),
            self._right("addition", fully),
        ]
        return torch.from_numpy(np.concatenate(texts))

    def _draw(self, skill: str, count: int) -> Worked:
        return worked(skill, self.rng.choice(self.pools[skill], count))

    def _right(self, skill: str, count: int) -> Tokens:
        text = self._draw(skill, count)
        return _tokens(text.prompt, text.steps, ">", text.answer, EOS)

    def _mirrored(self, count: int, answered: bool) -> Tokens:
        text = self._draw("mirrored", count)
        if not answered:
            return _tokens(text.prompt, text.steps, ">")
        return _tokens(text.prompt, text.steps, ">", self._random_digits(text.answer.shape), EOS)

    def _terse(self, count: int) -> Tokens:
        text = self._draw("addition", count)
        replace = self.rng.random(text.answer.shape) < self.recipe.wrong_digit
        answer = np.where(replace, self._random_digits(text.answer.shape), text.answer)
        return _tokens(text.prompt, ">", answer, EOS)

    def _random_digits(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return self.rng.choice(DIGITS, shape)


def train(model: Qwen2ForCausalLM, recipe: Recipe, seed: int) -> None:
    """Trains `model` in place; the loss is the mean over the response tokens of a batch, EOS included."""
    corpus = Corpus(recipe, seed)
    optimize(model, recipe, corpus.batch, lambda step: learning_rate(step, recipe), PROMPT_TOKENS)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then from `mixed_from` linear from `mixed_lr` to a tenth of it."""
    if step < recipe.mixed_from:
        return recipe.lr * min(1.0, (step + 1) / recipe.warmup)
    progress = (step - recipe.mixed_from) / (recipe.steps - recipe.mixed_from)
    return recipe.mixed_lr * (1 - 0.9 * progress)


@torch.no_grad()
def sample(model: Qwen2ForCausalLM, prompts: Tensor, seed: int) -> Tensor:
    """Responses at temperature 1, int64 [N, 14], to prompts int64 [N, 8] of equal length; what follows EOS is noise."""
    generator = torch.Generator().manual_seed(seed)
    cache, last, response = DynamicCache(config=model.config), prompts, []
    for _ in range(SAMPLED_TOKENS):
        logits = model(last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        last = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        response.append(last)
    return torch.cat(response, dim=1)


def accuracy(model: Qwen2ForCausalLM, skill: str, questions: int, seed: int = 0) -> float:
    """Share of test questions whose sampled response ends in EOS with the right answer after its last `>`."""
    rows = Skills([skill], questions, "test", seed).rows()
    prompts = torch.tensor([[IDS[char] for char in row["prompt"][0]["content"]] for row in rows])
    texts = ("".join(VOCABULARY[token] for token in tokens) for tokens in sample(model, prompts, seed).tolist())
    right = 0
    for row, text in zip(rows, texts, strict=True):
        response, eos, _ = text.partition(EOS)
        right += bool(eos) and response.rpartition(">")[2] == row["reward_model"]["ground_truth"]
    return right / questions


def make(seed: int, out: Path, questions: int, recipe: Recipe = Recipe()) -> Result:
    """Trains one base, writes it to `out` as a Hugging Face directory and measures it."""
    model, seconds = make_model(VOCABULARY, seed, out, lambda model: train(model, recipe, seed))
    return Result(seed, {skill: accuracy(model, skill, questions) for skill in SIZES}, seconds)


def main() -> None:
    """Make the bases that are asked for; a single one in a directory of its own."""
    arguments = parser("Train the base model of the embedded task from random weights.", questions=2048)
    arguments.add_argument("--seed", type=int, default=0, help="one base instead, written to --out itself")
    args = parsed(arguments)
    outs = [args.out / f"seed{seed}" for seed in args.seeds] if args.seeds else [args.out]
    make_all(make, args.seeds or [args.seed], outs, args.questions, args.jobs)


@cache
def _split_ids(skill: str) -> Ids:
    ids = np.arange(SIZES[skill])
    return ids[belongs(skill, ids, "train")]


def _tokens(*parts: NDArray[np.uint8] | str) -> Tokens:
    """Columns of characters and single tokens side by side, padded: int64 [N, 20]."""
    count = len(parts[0])
    columns = [np.full((count, 1), IDS[part]) if isinstance(part, str) else CODE_TO_ID[part] for part in parts]
    text = np.concatenate(columns, axis=1)
    width = PROMPT_TOKENS + RESPONSE_TOKENS
    return np.pad(text, ((0, 0), (0, width - text.shape[1])), constant_values=IDS[PAD])


if __name__ == "__main__":
    main()
