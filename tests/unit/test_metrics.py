"""Figures by hand, their intervals against what is known of them, folds that never divide a group, calibration."""

import numpy as np
import pytest
from trainyard.trainers.scores.metrics import (
    accuracy,
    auroc,
    average_ranks,
    bootstrap_interval,
    f1_score,
    fit_calibration_line,
    fit_isotonic_curve,
    grouped_folds,
    mae,
    merge_paired_groups,
    pairwise_accuracy,
    plcc,
    srcc,
)


def noisy(count, spread, seed=0):
    """(said, rated): said is rated plus noise."""
    rng = np.random.default_rng(seed)
    rated = rng.normal(size=count)
    return rated + spread * rng.normal(size=count), rated


def test_ties_share_the_mean_of_their_ranks():
    assert average_ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys_also_with_ties(seed):
    from scipy import stats

    said, rated = (np.round(v, 1) for v in noisy(60, 1.0, seed))
    assert srcc(said, rated) == pytest.approx(stats.spearmanr(said, rated).statistic)
    assert plcc(said, rated) == pytest.approx(stats.pearsonr(said, rated).statistic)
    label = rated > 0
    wins = stats.mannwhitneyu(said[label], said[~label]).statistic / (label.sum() * (~label).sum())
    assert auroc(said, label) == pytest.approx(wins)


def test_figures_by_hand():
    """said 1 2 4 3 of rated 1 2 3 4: one pair of six is wrong; ranks differ by 1 twice, so SRCC = 1 - 6 * 2 / (4 * 15)
    = .8"""
    said, rated = [1, 2, 4, 3], [1, 2, 3, 4]
    assert pairwise_accuracy(said, rated) == pytest.approx(5 / 6)
    assert srcc(said, rated) == pytest.approx(0.8)
    assert mae(said, rated) == 0.5
    assert pairwise_accuracy([1, 1], [1, 2]) == 0.5, "a tie counts half"
    assert auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert f1_score([1, 1, -1, 1], [1, 1, 1, 0]) == pytest.approx(2 / 3), "precision 2/3, recall 2/3"
    assert accuracy([0, 1, 2], [0, 1, 1]) == pytest.approx(2 / 3)


def test_what_never_changes_agrees_with_nothing():
    assert srcc([2, 2, 2], [1, 2, 3]) == plcc([1, 2, 3], [5, 5, 5]) == 0
    assert pairwise_accuracy([1, 2], [3, 3]) == auroc([1, 2], [1, 1]) == 0.5
    assert f1_score([-1, -1], [0, 0]) == 0


def test_intervals_cover_the_truth_about_19_times_of_20():
    """Sixty samples of a known correlation: said = rated + noise of the same size, so Pearson's is 1 / sqrt(2)."""
    found = [bootstrap_interval(plcc, *noisy(80, 1.0, seed), seed=seed, draws=200) for seed in range(60)]
    inside = sum(f.low <= 2**-0.5 <= f.high for f in found)
    assert 50 <= inside <= 60, inside
    assert all(f.low <= f.value <= f.high for f in found)


def test_an_interval_of_pure_chance_includes_it():
    rng = np.random.default_rng(0)
    includes = 0
    for seed in range(40):
        said, rated = rng.normal(size=30), rng.normal(size=30)
        one, other = (
            bootstrap_interval(srcc, said, rated, seed, 200),
            bootstrap_interval(pairwise_accuracy, said, rated, seed, 200),
        )
        includes += (one.low <= 0 <= one.high) and (other.low <= 0.5 <= other.high)
    assert includes >= 34, includes


def test_the_pairwise_interval_by_tables_is_that_of_drawing_again():
    said, rated = noisy(40, 1.0)
    fast = bootstrap_interval(pairwise_accuracy, said, rated, draws=2000)
    slow = bootstrap_interval(lambda a, b: pairwise_accuracy(a, b), said, rated, draws=2000)
    assert fast.value == slow.value
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high), abs=0.02)


def test_copies_of_a_picture_are_no_independent_evidence():
    """Each image ten times over: told of it, the interval is as wide as without the copies, and three times narrower
    otherwise."""
    said, rated = noisy(40, 1.0)
    width = lambda f: f.high - f.low
    once = width(bootstrap_interval(srcc, said, rated))
    copies = np.repeat(said, 10), np.repeat(rated, 10)
    told = width(bootstrap_interval(srcc, *copies, groups=np.repeat(np.arange(40), 10).tolist()))
    assert told == pytest.approx(once, rel=0.15)
    assert width(bootstrap_interval(srcc, *copies)) < 0.5 * once


def test_the_same_seed_gives_the_same_interval():
    assert (
        bootstrap_interval(srcc, *noisy(30, 1.0), seed=4)
        == bootstrap_interval(srcc, *noisy(30, 1.0), seed=4)
        != bootstrap_interval(srcc, *noisy(30, 1.0), seed=5)
    )


# -- folds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_group_is_never_divided_and_folds_are_of_about_equal_size(seed):
    rng = np.random.default_rng(seed)
    groups = [f"g{i}" for i in rng.integers(0, 40, size=120)]
    folds = grouped_folds(groups, 5, seed)
    assert all(len({f for f, g in zip(folds, groups, strict=True) if g == name}) == 1 for name in set(groups))
    sizes = np.bincount(folds, minlength=5)
    assert sizes.sum() == 120 and sizes.max() - sizes.min() <= 3, sizes


def test_another_seed_gives_other_folds():
    groups = list(range(50))
    assert (grouped_folds(groups, 5, 0) == grouped_folds(groups, 5, 0)).all()
    assert (grouped_folds(groups, 5, 0) != grouped_folds(groups, 5, 1)).any()


def test_fewer_groups_than_folds_are_an_error_that_says_how_many_fit():
    with pytest.raises(ValueError, match="3 groups .* 5 folds are asked for.*at most 3 members"):
        grouped_folds([1, 1, 2, 3], 5, 0)


def test_both_sides_of_a_pair_are_tied_and_ties_go_on():
    names = merge_paired_groups(["a", "b", "c", "d", "a"], [(0, 1), (2, 3)])
    assert names[0] == names[1] == names[4] and names[2] == names[3] and names[0] != names[2]


# -- calibration -------------------------------------------------------------------------------------------------------


def test_a_line_by_hand():
    """said 0 1 2, rated 1 3 5"""
    assert fit_calibration_line([0, 1, 2], [1, 3, 5]) == pytest.approx((2, 1))


def test_a_line_never_turns_a_scorer_around():
    assert fit_calibration_line([0, 1, 2], [5, 3, 1]) == (0, 3)
    assert fit_calibration_line([1, 1], [2, 4]) == (0, 3)


def test_a_curve_by_hand():
    """rated 1 3 2 4 over said 0 1 2 3: the middle two pool to 2.5 at 1.5"""
    assert fit_isotonic_curve([0, 1, 2, 3], [1, 3, 2, 4]) == ((0, 1), (1.5, 2.5), (3, 4))


@pytest.mark.parametrize("seed", range(5))
def test_a_curve_is_scipys_isotonic_regression(seed):
    from scipy.optimize import isotonic_regression

    said, rated = noisy(80, 1.0, seed)
    order = np.argsort(said)
    ours = fit_isotonic_curve(said, rated)
    theirs = isotonic_regression(rated[order]).x
    assert sorted({round(y, 6) for _, y in ours}) == sorted({round(float(y), 6) for y in theirs})
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in zip(ours, ours[1:], strict=False))
