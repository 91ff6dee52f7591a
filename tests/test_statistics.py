"""Intervals that cover, tests that keep their level, pairing that helps, and no dependence on the order of arms."""

import numpy as np
import pytest

from experiments.report.statistics import (
    COVERAGE,
    FALSE_ALARMS,
    Design,
    Scores,
    compare,
    holm,
    interval,
    rank_correlation,
    sign_flip,
)


def random_effects(rng: np.random.Generator, bases: int, seeds: int, base: float = 1.0, run: float = 1.0) -> Scores:
    return rng.normal(0, base, (bases, 1)) + rng.normal(0, run, (bases, seeds))


def coverage(bases: int, base: float, run: float, trials: int = 2000, design: Design = "nested") -> float:
    """Share of simulated grids with 5 seeds whose interval contains the true mean, 0."""
    rng = np.random.default_rng(0)
    grids = (random_effects(rng, bases, 5, base, run) for _ in range(trials))
    found = [interval(grid, design, resamples=300) for grid in grids]
    return float(np.mean([i.low <= 0 <= i.high for i in found]))


def test_coverage() -> None:
    # the numbers of `interval`'s docstring
    assert coverage(30, 1, 1) == pytest.approx(0.95, abs=0.02)
    for design, expected in COVERAGE.items():
        assert coverage(3, 1, 1, design=design) == pytest.approx(expected, abs=0.02)
    assert coverage(3, 1, 0.1) == pytest.approx(0.73, abs=0.02)


def test_false_alarms() -> None:
    """Of a comparison of two arms without a true difference, 3 bases x 5 seeds."""
    for shared, expected in FALSE_ALARMS.items():
        rng = np.random.default_rng(0)
        called = 0
        for _ in range(200):
            by_base, by_seed = rng.normal(size=(3, 1)), rng.normal(size=(1, 5))
            by_cell = rng.normal(size=(3, 5))
            differences = by_cell + {"nothing": 0.0, "base": by_base, "seed": by_seed}[shared]
            called += sign_flip(differences) < 0.05 and interval(differences, resamples=300).excludes_zero
        assert called / 200 == pytest.approx(expected, abs=0.05)


def test_crossed_seeds_that_share_an_effect_need_the_crossed_design() -> None:
    rng = np.random.default_rng(1)
    seeds = [np.repeat(rng.normal(0, 1, (1, 12)), 12, axis=0) + rng.normal(0, 0.1, (12, 12)) for _ in range(300)]
    hits = {
        design: np.mean([i.low <= 0 <= i.high for i in (interval(s, design, resamples=200) for s in seeds)])
        for design in ("crossed", "nested")
    }
    assert hits["crossed"] > 0.85
    assert hits["nested"] < 0.6


def test_no_arm_wins_by_chance_among_twelve() -> None:
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(60):
        scores = {f"arm{i}": rng.normal(0, 1, (3, 4)) for i in range(13)}
        wrong += any(c.significant for c in compare(scores, "arm0").values())
    assert wrong / 60 <= 0.1


def test_a_large_difference_is_significant_and_three_runs_never_suffice() -> None:
    rng = np.random.default_rng(3)
    reference = rng.normal(0, 0.01, (3, 5))
    better = reference + 0.05 + rng.normal(0, 0.01, (3, 5))
    found = compare({"ref": reference, "better": better}, "ref")["better"]
    assert found.significant
    assert (found.ahead, found.cells) == (15, 15)
    assert 0.04 < found.difference.low < found.difference.mean < found.difference.high < 0.06
    few = compare({"ref": reference[:1, :3], "better": better[:1, :3]}, "ref")["better"]
    assert few.difference.excludes_zero
    assert few.p == 0.25
    assert not few.significant


def test_the_order_of_arms_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    scores = {name: rng.normal(i / 10, 1, (3, 5)) for i, name in enumerate("abcd")}
    turned = dict(reversed(scores.items()))
    assert compare(scores, "b") == compare(turned, "b")


def test_pairing_narrows_the_interval_when_cells_correlate() -> None:
    rng = np.random.default_rng(5)
    cells = random_effects(rng, 4, 5)
    a, b = cells + rng.normal(0, 0.1, cells.shape), cells + rng.normal(0, 0.1, cells.shape)
    paired, single = compare({"a": a, "b": b}, "b")["a"].difference, interval(a)
    assert paired.high - paired.low < 0.3 * (single.high - single.low)


def test_failed_cells_are_left_out() -> None:
    rng = np.random.default_rng(6)
    scores = rng.normal(5, 1, (3, 5))
    holes = scores.copy()
    holes[1, 2] = holes[0, 0] = np.nan
    found = interval(holes)
    assert found.mean == pytest.approx(np.nanmean(holes))
    assert np.isfinite([found.low, found.high]).all()
    padded = np.full((4, 6), np.nan)
    padded[:3, :5] = scores
    assert interval(padded) == interval(scores)
    compared = compare({"ref": scores, "holes": holes}, "ref")["holes"]
    assert compared.cells == 13
    nothing = compare({"ref": scores, "none": np.full((3, 5), np.nan), "holes": holes + 1}, "ref")
    assert not nothing["none"].significant
    assert np.isnan(nothing["none"].p)
    assert nothing["holes"].p == compare({"ref": scores, "holes": holes + 1}, "ref")["holes"].p  # not a comparison


@pytest.mark.parametrize("design", ["crossed", "nested"])
def test_one_base_resamples_seeds_and_one_run_has_no_interval(design: Design) -> None:
    scores = np.array([[1.0, 2.0, 4.0]])
    found = interval(scores, design)
    assert (found.low, found.high) == (1.0, 4.0)
    alone = interval(scores[:, :1], design)
    assert alone.mean == 1.0
    assert np.isnan([alone.low, alone.high]).all()
    assert not alone.excludes_zero
    assert np.isnan(interval(np.full((2, 2), np.nan), design).mean)


def test_sign_flip_is_exact_up_to_sixteen_and_close_above() -> None:
    # +++ of magnitudes 1, 2, 3: of the 8 sums only +6 and -6 are as far from 0
    assert sign_flip(np.array([[1.0, 2.0, 3.0]])) == 0.25
    # with -1, 2, 3 the sums of magnitude at least 4 are +-6 and +-4
    assert sign_flip(np.array([[-1.0, 2.0, 3.0]])) == 0.5
    assert sign_flip(np.zeros((2, 3))) == 1.0
    rng = np.random.default_rng(7)
    values = rng.normal(0.4, 1, (1, 16))
    more = np.concatenate([values, np.zeros((1, 1))], axis=1)  # a zero changes no sum, but is drawn, not enumerated
    assert sign_flip(more) == pytest.approx(sign_flip(values), abs=0.01)


def test_holm_against_a_hand_computation() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    with_gap = holm([0.02, float("nan"), 0.03])
    assert with_gap[0] == pytest.approx(0.04)
    assert np.isnan(with_gap[1])


def test_rank_correlation() -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    assert rank_correlation(x, [np.exp(v) for v in x]) == pytest.approx(1.0)
    assert rank_correlation(x, [4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # ranks 1 2 3 4 and 1.5 1.5 3 4: the covariance is 4.5, the squared norms are 5 and 4.5
    assert rank_correlation(x, [0.0, 0.0, 1.0, 2.0]) == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert rank_correlation([*x, np.nan], [*x, 0.0]) == pytest.approx(1.0)
    assert np.isnan(rank_correlation(x, [1.0] * 4))
