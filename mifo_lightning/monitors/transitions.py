"""What was forgotten and what was learned, apart from what sampling alone turns round."""

from collections.abc import Sequence

import torch


def transitions(shares: Sequence[Sequence[float]]) -> dict[str, float]:
    """Loss and gain of Q questions between two models, without the share that chance makes of them.

    Of a question that the models answer rightly with probability p and p', one pair of samples is right before and
    wrong after with probability p (1 - p'), though nothing may have changed: p (1 - p) of it is chance, which two
    independent sets of samples of the first model show. With shares a, b and c, as `P(right, then wrong)` less the
    same of the first model twice, means over questions (chance correction: arXiv 2510.17776):

        lost = a (1 - c) - a (1 - b) = a (b - c)            E lost = p (p - p')
        gained = (1 - a) c - (1 - a) b = (1 - a) (c - b)    E gained = (1 - p) (p' - p)

    so that lost - gained = b - c. Both are unbiased and either may be below 0.

    Args:
        shares: [Q, 3] shares right: a and b of two sets of samples of the first model, c of samples of the second.
            Questions may be chosen by anything but these.

    Returns:
        `questions` Q, and unless that is 0 the means `before` (b), `after` (c), `lost`, `gained` and `floor`,
        a (1 - b), the loss that sampling shows of a model that does not change; from two questions on the standard
        errors over questions `lost_se` and `gained_se`.
    """
    if not shares:
        return {"questions": 0}
    a, b, c = torch.tensor(shares, dtype=torch.float64).T
    changes = {"lost": a * (b - c), "gained": (1 - a) * (c - b)}
    means = {"before": b, "after": c, **changes, "floor": a * (1 - b)}
    found = {"questions": len(a), **{name: float(values.mean()) for name, values in means.items()}}
    if len(a) > 1:
        found |= {f"{name}_se": float(values.std() / len(a) ** 0.5) for name, values in changes.items()}
    return found
