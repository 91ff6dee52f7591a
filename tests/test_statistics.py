"""Intervals that cover, tests that keep their level, the base as the unit, and no dependence on the order of arms."""

import numpy as np
import pytest

from mifo_lightning.lab.report.rates import DESIGNS, MEASURED
from mifo_lightning.lab.report.simulation import Case, ranges, simulate
from mifo_lightning.lab.report.statistics import (
    ALPHA,
    Design,
    Interval,
    Scores,
    bases_needed,
    holm,
    interval,
    judge,
    mean_error,
    probability,
    rank_correlation,
    sign_flip,
    t_probability,
)


@pytest.mark.slow
@pytest.mark.parametrize("failures", [False, True])
@pytest.mark.parametrize(("design", "bases", "seeds"), DESIGNS)
def test_simulated_rates(design: Design, bases: int, seeds: int, failures: bool) -> None:
    """What pages print is what the code does: variances of base, seed and run 0-4, one run in seven failed."""
    found, said = ranges(failures, design, bases, seeds), MEASURED[design, bases, failures]
    for name, expected in said.items():
        assert found[name] == pytest.approx(expected, abs=2e-3), name
    assert said["differences"].low > 0.92
    assert (said["alarms"].high < ALPHA) is ((design, bases) != ("crossed", 10))


def old_sign_flip(differences: Scores) -> Scores:
    """As it was: signs of single runs, [..., bases, seeds]."""
    values = differences.reshape(*differences.shape[:-2], -1)
    signs = np.random.default_rng(0).choice([1.0, -1.0], size=(4096, values.shape[-1]))
    return (np.abs(values @ signs.T) >= np.abs(values.sum(-1, keepdims=True))).mean(-1)


def test_flipping_runs_called_equal_arms_different_and_flipping_bases_does_not() -> None:
    """Family-wise, of 13 arms on 3 bases x 5 seeds that differ by base as much as the published ones do."""
    scores = simulate(Case(4, 0, 1, False), "crossed", 3, 5, 60)
    differences = scores[:, 1:] - scores[:, :1]
    assert (holm(old_sign_flip(differences)) < ALPHA).any(-1).mean() > 0.6
    assert (holm(probability(differences)) < ALPHA).any(-1).mean() == 0


def test_more_runs_on_the_same_bases_show_no_more_about_bases() -> None:
    rng = np.random.default_rng(1)
    by_base = rng.normal(size=(4, 1))
    few, many = (by_base + rng.normal(0, 1e-6, (4, seeds)) for seeds in (2, 200))
    for design in ("crossed", "nested"):
        assert interval(few, design).half == pytest.approx(interval(many, design).half, rel=1e-4)
    assert probability(few) == probability(many) >= 2 / 2**4


def test_random_effects_against_a_hand_computation() -> None:
    # base means 2 and 5, seed means 2, 3.5, 5: MS_base = 3 * 4.5, MS_seed = 2 * 2.25, residuals 0.5: MS_error = 0.75
    scores = np.array([[0.0, 2.0, 4.0], [4.0, 5.0, 6.0]])
    mean, error, df = mean_error(scores)
    ms = (3 * 4.5, 2 * 2.25, 2 * (0.5**2 * 2) / 2)
    assert (mean, error) == (3.5, pytest.approx(np.sqrt((ms[0] + ms[1] - ms[2]) / 6)))
    expected = (ms[0] + ms[1] - ms[2]) ** 2 / (ms[0] ** 2 / 1 + ms[1] ** 2 / 2 + ms[2] ** 2 / 2)
    assert df == pytest.approx(max(1.0, expected))


def test_where_the_variance_would_be_negative_the_larger_mean_square_takes_its_place() -> None:
    # no effect of base or seed at all but an interaction: MS_base = MS_seed = 0 but for what is added
    scores = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]) + np.array([[0.1, 0.1, 0.1], [0.0, 0.0, 0.0]])
    _, error, df = mean_error(scores)
    assert error == pytest.approx(np.sqrt(3 * 0.1**2 / 2 / 6))
    assert df == 1
    _, error, df = mean_error(np.zeros((2, 3)))
    assert (error, df) == (0, 1)


def test_one_run_on_each_base_is_students_t() -> None:
    scores = np.array([[1.0], [2.0], [3.0], [4.0]])
    for design in ("crossed", "nested"):
        found = interval(scores, design)
        # 3.182 is the quantile for 3 degrees of freedom
        assert found.half == pytest.approx(3.182 * np.sqrt(5 / 3) / 2, rel=1e-3)
        assert found.df == 3
    assert t_probability(np.array(2.5), np.array(2.5 / 3.182), np.array(3.0)) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("design", ["crossed", "nested"])
def test_with_one_base_the_seeds_are_units_and_nothing_is_significant(design: Design) -> None:
    found = interval(np.array([[1.0, 2.0, 3.0]]), design)
    assert (found.mean, found.df) == (2.0, 2)
    assert found.half == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
    assert probability(np.array([[1.0, 1.01, 0.99]]), design) == 1
    alone = interval(np.array([[1.0]]), design)
    assert alone.mean == 1.0
    assert np.isnan([alone.low, alone.high]).all()
    assert not alone.within(9.0)


def test_how_many_bases_flips_need() -> None:
    assert [bases_needed(count) for count in (1, 5, 13)] == [6, 8, 10]
    for count in (1, 5, 13):
        for bases in (bases_needed(count) - 1, bases_needed(count)):
            rng = np.random.default_rng(bases)
            large = {name: 1 + rng.normal(0, 1e-6, (bases, 1)) for name in range(count)}
            assert all(c.significant for c in judge(large).values()) is (bases == bases_needed(count))


@pytest.mark.parametrize("comparisons", [1, 13])
def test_the_smallest_detectable_difference_is_found_in_four_of_five_grids(comparisons: int) -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(2000, 12, 1))
    effect = Interval(0.0, 1 / np.sqrt(12), 11).detectable(comparisons)
    found = t_probability(*mean_error(noise + effect, "nested")) * comparisons < ALPHA
    assert found.mean() == pytest.approx(0.8, abs=0.04)


def test_the_order_of_arms_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    differences = {name: rng.normal(i / 10, 1, (3, 5)) for i, name in enumerate("abcd")}
    assert judge(differences) == judge(dict(reversed(differences.items())))


def test_a_missing_run_takes_the_mean_and_is_no_comparison() -> None:
    rng = np.random.default_rng(6)
    scores = rng.normal(5, 1, (12, 1))
    holes = scores.copy()
    holes[3] = np.nan
    found = interval(holes)
    assert np.isnan([found.mean, found.low, found.high]).all()
    assert np.isnan(interval(np.full((2, 2), np.nan)).mean)
    judged = judge({"whole": scores, "holes": holes})
    assert set(judged) == {"whole"}
    assert judged["whole"] == judge({"whole": scores})["whole"]
    assert (judged["whole"].ahead, judged["whole"].bases) == (12, 12)


def test_no_difference_is_an_interval_within_the_margin() -> None:
    found = interval(np.array([[0.01], [-0.01], [0.02], [-0.02], [0.01], [-0.01]]))
    assert found.within(0.02)
    assert not found.within(0.01)


def test_sign_flip_is_exact_up_to_sixteen_and_close_above() -> None:
    # +++ of magnitudes 1, 2, 3: of the 8 sums only +6 and -6 are as far from 0
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == 0.25
    # with -1, 2, 3 the sums of magnitude at least 4 are +-6 and +-4
    assert sign_flip(np.array([-1.0, 2.0, 3.0])) == 0.5
    assert sign_flip(np.zeros(6)) == 1.0
    assert sign_flip(np.array([[1.0, 2.0, 3.0], [-1.0, 2.0, 3.0]])).tolist() == [0.25, 0.5]
    values = np.random.default_rng(7).normal(0.4, 1, 16)
    more = np.append(values, 0.0)  # a zero changes no sum, but is drawn, not enumerated
    assert sign_flip(more) == pytest.approx(sign_flip(values), abs=0.01)


def test_holm_against_a_hand_computation() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0]
    with_gap = holm([[0.02, float("nan"), 0.03], [0.01, 0.02, 0.03]])
    assert with_gap[0, 0] == pytest.approx(0.04)
    assert np.isnan(with_gap[0, 1])
    assert with_gap[1] == pytest.approx([0.03, 0.04, 0.04])
    assert holm([]).size == 0


def test_rank_correlation() -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    assert rank_correlation(x, [np.exp(v) for v in x]) == pytest.approx(1.0)
    assert rank_correlation(x, [4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # ranks 1 2 3 4 and 1.5 1.5 3 4: the covariance is 4.5, the squared norms are 5 and 4.5
    assert rank_correlation(x, [0.0, 0.0, 1.0, 2.0]) == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert rank_correlation([*x, np.nan], [*x, 0.0]) == pytest.approx(1.0)
    assert np.isnan(rank_correlation(x, [1.0] * 4))
