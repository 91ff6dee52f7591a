"""avg@k and the unbiased pass@k."""

import torch
from torch import Tensor
from torchmetrics import Metric


def pass_at_k(n: int, correct: Tensor, k: int) -> Tensor:
    """Unbiased probability that one of k samples is right: `1 - C(n - c, k) / C(n, k)`.

    Args:
        n: Samples drawn per question.
        correct: [Q] int64, how many of them were right: c.
        k: At most n.

    Returns:
        [Q] fp64 in [0, 1].

    Raises:
        ValueError: If k is not in 1..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n, got k = {k}, n = {n}")
    wrong = (n - correct).double()[:, None]
    i = torch.arange(k, device=correct.device, dtype=torch.float64)
    return 1.0 - ((wrong - i).clamp_min(0.0) / (n - i)).prod(-1)


class _MeanOverQuestions(Metric):
    """A mean over questions that sums over ranks."""

    full_state_update = False
    higher_is_better = True
    total: Tensor
    questions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("questions", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean; nan if no question was seen."""
        return (self.total / self.questions).float()


class AverageAtK(_MeanOverQuestions):
    """avg@k: the share of right answers among k samples of each question, mean over questions."""

    def update(self, correct: Tensor, n: int) -> None:
        """Add questions: `correct` [Q] right answers among `n` samples of each."""
        self.total += (correct.double() / n).sum()
        self.questions += len(correct)


class PassAtK(_MeanOverQuestions):
    """Unbiased pass@k, mean over questions.

    Args:
        k: How many tries count; `update` needs n >= k samples.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def update(self, correct: Tensor, n: int) -> None:
        """Add questions: `correct` [Q] right answers among `n` samples of each."""
        self.total += pass_at_k(n, correct, self.k).sum()
        self.questions += len(correct)
