"""How necessary is a part, which heads suffice, how alike are two circuits? On questions whose right answer is known.

Accuracy is that of greedy decoding that must give the demonstration word for word: with the demonstration as input,
every token from `first` on must be the likeliest one. So one forward pass measures it.
"""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments.circuits.patching import Outputs, Part, replaced
from mifo_lightning.common.seeds import stable_key

CHUNK = 32
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Questions:
    """Prompts with their demonstrations, int64 [N, L], all of one length; tokens from `first` on are scored."""

    tokens: Tensor
    first: int

    @property
    def inputs(self) -> Tensor:
        """What the model reads: all but the last token, int64 [N, L - 1]."""
        return self.tokens[:, :-1]


@torch.no_grad()
def right(model: PreTrainedModel, questions: Questions) -> Tensor:
    """Whether each question is answered right, bool [N]."""
    logits = model(questions.inputs, use_cache=False).logits[:, questions.first - 1 :]
    return (logits.argmax(-1) == questions.tokens[:, questions.first :]).all(-1)


def accuracy(
    model: PreTrainedModel, questions: Questions, parts: Collection[Part] = (), by: Outputs | None = None
) -> float:
    """The share that is answered right, with the outputs of `parts`, if there are any, taken from `by`."""
    if by is None:
        return float(right(model, questions).double().mean())
    with replaced(model, parts, by):
        return float(right(model, questions).double().mean())


def necessity(
    model: PreTrainedModel, questions: Questions, parts: Sequence[Part], by: Outputs, whole: float
) -> dict[Part, float]:
    """The accuracy that is lost where the output of one part alone is another's; `whole` is the model's own."""
    return {part: whole - accuracy(model, questions, [part], by) for part in parts}


def suffices(
    model: PreTrainedModel, questions: Questions, ablated: Collection[Part], mean: Outputs, level: float
) -> bool:
    """Whether accuracy is at least `level` with these parts at their mean, [1, L, ...].

    Exactly that, but it ends as soon as too many questions are wrong, which most sets of heads are known by.
    """
    allowed = len(questions.tokens) * (1 - level) + 1e-6
    wrong = 0
    with replaced(model, ablated, mean):
        for tokens in questions.tokens.split(CHUNK):
            wrong += int((~right(model, Questions(tokens, questions.first))).sum())
            if wrong > allowed:
                return False
    return True


def by_necessity(necessities: dict[Part, float]) -> list[Part]:
    """The parts, the most necessary first; the earlier one first where two are alike."""
    return sorted(necessities, key=lambda part: (-necessities[part], str(part)))


def grow(necessities: dict[Part, float], enough: Callable[[frozenset[Part]], bool]) -> frozenset[Part]:
    """The most necessary parts, one after the other until it is enough; all of them are taken to be."""
    order = by_necessity(necessities)
    for size in range(len(order)):
        if enough(chosen := frozenset(order[:size])):
            return chosen
    return frozenset(order)


def smallest(
    parts: Sequence[Part], enough: Callable[[frozenset[Part]], bool], known: frozenset[Part]
) -> frozenset[Part]:
    """A set with the fewest parts that is enough: all sets smaller than `known`, which is enough, are tried."""
    for size in range(len(known)):
        for chosen in combinations(parts, size):
            if enough(frozenset(chosen)):
                return frozenset(chosen)
    return known


def other_sets(parts: Sequence[Part], circuit: frozenset[Part], count: int, seed: str) -> list[frozenset[Part]]:
    """Up to `count` different random sets of as many parts as the circuit has, none of them the circuit itself."""
    draw = random.Random(seed)
    wanted = min(count, comb(len(parts), len(circuit)) - 1)
    chosen: dict[frozenset[Part], None] = {}
    while len(chosen) < wanted:
        if (one := frozenset(draw.sample(parts, len(circuit)))) != circuit:
            chosen[one] = None
    return list(chosen)


def jaccard(a: Collection[Part] | Collection[str], b: Collection[Part] | Collection[str]) -> float:
    """Parts in both over parts in either; 1 for two empty sets."""
    return len(set(a) & set(b)) / len(set(a) | set(b)) if a or b else 1.0


def chance_jaccard(layers: Sequence[tuple[int, int, int]]) -> float:
    """The expected Jaccard index of a set with a random one that has as many parts in each layer as another set.

    Sets that share nothing but how many heads each layer has are alike by this much.

    Args:
        layers: Of each layer the parts of the set, those of the other one, and all that there are.
    """
    whole = sum(a + b for a, b, _ in layers)
    if not whole:
        return 1.0
    overlap = np.ones(1)  # probability of 0, 1, ... shared parts in the layers so far (hypergeometric in each)
    for a, b, n in layers:
        overlap = np.convolve(overlap, [comb(a, k) * comb(n - a, b - k) / comb(n, b) for k in range(min(a, b) + 1)])
    return float(sum(p * k / (whole - k) for k, p in enumerate(overlap) if p))


def random_change(base: Weights, tuned: Weights, seed: str) -> Weights:
    """The base with each tensor changed at random (Gaussian) by the L2 norm by which `tuned` differs from it there."""
    draw = torch.Generator().manual_seed(stable_key(seed))
    changed = {}
    for name, weight in base.items():
        noise = torch.randn(weight.shape, generator=draw)
        changed[name] = weight + noise * ((tuned[name] - weight).norm() / noise.norm())
    return changed
