"""Estimates of KL(policy || reference) from the tokens that the policy drew (Schulman, "Approximating KL divergence").

With d = logp_ref - logp: k1 = -d has the right mean and a large variance, and as a loss a gradient of mean 0; k2 =
d^2 / 2 has a small variance, and as a loss the right gradient; k3 = exp(d) - d - 1 has the right mean and is never
negative.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from mifo_lightning.policy.scoring import kl_k3

KLName = Literal["k1", "k2", "k3"]


def kl_k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """`logp - logp_ref` per token, both in nats and of one shape."""
    return logp - logp_ref


def kl_k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """`(logp - logp_ref)^2 / 2` per token, both in nats and of one shape."""
    return (logp - logp_ref).square() / 2


KL_ESTIMATORS: dict[KLName, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
