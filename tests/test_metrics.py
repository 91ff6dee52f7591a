"""avg@k and pass@k."""

import itertools

import pytest
import torch

from mifo_lightning.rollout.at_k import AverageAtK, PassAtK, pass_at_k


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(k: int) -> None:
    for correct in range(6):
        answers = [i < correct for i in range(5)]
        subsets = list(itertools.combinations(answers, k))
        expected = sum(any(s) for s in subsets) / len(subsets)
        assert pass_at_k(5, torch.tensor([correct]), k).item() == pytest.approx(expected)


def test_metrics_are_means_over_questions_however_they_are_cut() -> None:
    correct = torch.tensor([0, 1, 4, 2])
    average, passed = AverageAtK(), PassAtK(2)
    for part in (correct[:1], correct[1:]):
        average.update(part, 4)
        passed.update(part, 4)
    assert average.compute().item() == pytest.approx(7 / 16)
    assert passed.compute().item() == pytest.approx((0 + 1 / 2 + 1 + 5 / 6) / 4)


def test_pass_at_one_is_avg() -> None:
    correct = torch.randint(9, (50,))
    average = AverageAtK()
    average.update(correct, 8)
    torch.testing.assert_close(pass_at_k(8, correct, 1).mean().float(), average.compute())


def test_more_tries_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="k = 5, n = 4"):
        pass_at_k(4, torch.tensor([1]), 5)
