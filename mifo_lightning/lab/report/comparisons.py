"""Which arms are compared, and as what? The primary contrast by itself, all others as one exploratory family."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mifo_lightning.lab.grid import as_pairs
from mifo_lightning.lab.report.results import Ablation
from mifo_lightning.lab.report.statistics import Comparison, Scores, judge

Pair = tuple[str, str]


@dataclass(frozen=True)
class Comparisons:
    """What was compared: the first arm of a pair minus the second. A pair without all of its runs has no comparison."""

    primary: dict[Pair, Comparison]
    """What was named before the run, probabilities as they are (of several all must hold); empty if nothing was."""
    exploratory: dict[Pair, Comparison]
    """Arms with the reference, then further contrasts; probabilities corrected for how many they are."""
    beyond: dict[Pair, bool]
    """Whether a primary difference is shown to be above the margin (one-sided p below .025); empty without one."""

    def get(self, pair: Pair) -> Comparison | None:
        """What was found for a pair."""
        return {**self.exploratory, **self.primary}.get(pair)

    @property
    def significant(self) -> dict[Pair, Comparison]:
        """The exploratory ones that are called significant."""
        return {pair: found for pair, found in self.exploratory.items() if found.significant}


def compare(ablation: Ablation, scores: Mapping[str, Scores], where_both: bool = False) -> Comparisons:
    """All comparisons of the ablation in these scores; with `where_both` over the bases that have both of a pair."""
    differences = {pair: scores[pair[0]] - scores[pair[1]] for pair in pairs(ablation)}
    if where_both:
        differences = {pair: values[np.isfinite(values).all(1)] for pair, values in differences.items()}
    named = {pair: differences.pop(pair) for pair in primary(ablation)}
    alone = {pair: found for pair, values in named.items() for found in judge({pair: values}, ablation.design).values()}
    beyond = {}
    if (margin := ablation.margin) is not None:
        above = {pair: judge({pair: values - margin}, ablation.design).get(pair) for pair, values in named.items()}
        beyond = {pair: c.significant and c.difference.mean > 0 for pair, c in above.items() if c}
    return Comparisons(alone, judge(differences, ablation.design), beyond)


def primary(ablation: Ablation) -> list[Pair]:
    """The primary contrast, if one was named, or those that must all hold."""
    return [(first, second) for first, second in as_pairs(ablation.primary_contrast)]


def pairs(ablation: Ablation) -> list[Pair]:
    """The primary contrast, every arm with the reference, and the contrasts; each pair of arms once."""
    wanted = primary(ablation)
    wanted += [(arm, ablation.reference) for arm in ablation.swept if arm != ablation.reference]
    wanted += [(first, second) for first, second in ablation.contrasts]
    once: dict[frozenset[str], Pair] = {}
    for pair in wanted:
        once.setdefault(frozenset(pair), pair)
    return list(once.values())
