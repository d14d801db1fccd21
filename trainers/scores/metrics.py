"""Metrics of predictions against ratings with bootstrap intervals, cross-validation folds, and calibration. Plain
numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_DRAWS = 1000
MAX_PAIRWISE_IMAGES = 1500  # of a pairwise accuracy; of more a random subset is taken


@dataclass(frozen=True)
class MetricEstimate:
    """A metric with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


# -- agreement ---------------------------------------------------------------------------------------------------------


def average_ranks(values) -> np.ndarray:
    """Ranks from 1; ties share the mean of their ranks."""
    values = np.asarray(values, np.float64)
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def plcc(predictions, ratings) -> float:
    """Pearson's linear correlation; 0 where either side is constant."""
    a, b = (np.asarray(v, np.float64) - np.mean(v) for v in (predictions, ratings))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 1e-12 * max(1.0, len(a)) else 0.0


def srcc(predictions, ratings) -> float:
    """Spearman's rank correlation."""
    return plcc(average_ranks(predictions), average_ranks(ratings))


def mae(predictions, ratings) -> float:
    """Mean absolute error."""
    return float(np.abs(np.asarray(predictions, np.float64) - np.asarray(ratings, np.float64)).mean())


def pairwise_accuracy(predictions, ratings) -> float:
    """Share of the pairs of different rating whose predictions are in the same order; a tie counts half. 0.5 where
    there is no such pair."""
    right, counted = pair_order_tables(predictions, ratings)
    return float(right.sum() / counted.sum()) if counted.any() else 0.5


def pair_order_tables(predictions, ratings) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) whether row i is predicted above column j (0.5 for a tie), and (n, n) whether row i is rated higher, so
    that the pair counts."""
    predictions, ratings = np.asarray(predictions, np.float64), np.asarray(ratings, np.float64)
    better = ratings[:, None] > ratings[None]
    above = np.sign(predictions[:, None] - predictions[None])
    return np.where(better, (above + 1) / 2, 0.0), better


def auroc(predictions, label) -> float:
    """Area under the ROC curve: the probability that an image of label 1 scores above one of label 0. 0.5 where a label
    is missing."""
    label = np.asarray(label) > 0.5
    yes, no = int(label.sum()), int((~label).sum())
    if not yes or not no:
        return 0.5
    return float((average_ranks(predictions)[label].sum() - yes * (yes + 1) / 2) / (yes * no))


def f1_score(predictions, label, threshold: float = 0.0) -> float:
    """Harmonic mean of precision and recall of the predictions above the threshold (0 for logits)."""
    found, label = np.asarray(predictions) > threshold, np.asarray(label) > 0.5
    both = int((found & label).sum())
    return 2 * both / max(1, int(found.sum()) + int(label.sum()))


def accuracy(predictions, label) -> float:
    """Share of the predictions that equal their label."""
    return float((np.asarray(predictions) == np.asarray(label)).mean())


# -- bootstrap intervals -----------------------------------------------------------------------------------------------


def bootstrap_interval(
    metric: Callable,
    predictions,
    ratings,
    seed: int = 0,
    draws: int = BOOTSTRAP_DRAWS,
    groups: Sequence[Hashable] | None = None,
) -> MetricEstimate:
    """The metric with its 95 % percentile bootstrap interval (Efron 1979). Groups are resampled as a whole: copies of
    one image are no independent evidence."""
    predictions, ratings = np.asarray(predictions, np.float64), np.asarray(ratings, np.float64)
    rng = np.random.default_rng(seed)
    if metric is pairwise_accuracy:
        return bootstrap_pairwise_interval(predictions, ratings, rng, draws, groups)
    members = group_indices(len(predictions), groups)
    values = []
    for _ in range(draws):
        pick = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        values.append(metric(predictions[pick], ratings[pick]))
    return MetricEstimate(metric(predictions, ratings), *map(float, np.percentile(values, (2.5, 97.5))))


def bootstrap_hit_rate(hits, seed: int = 0, groups: Sequence[Hashable] | None = None) -> MetricEstimate:
    """The mean of `hits` (1 right, 0 wrong) with its interval."""
    return bootstrap_interval(lambda drawn, _: float(drawn.mean()), hits, hits, seed, groups=groups)


def bootstrap_pairwise_interval(predictions, ratings, rng, draws, groups) -> MetricEstimate:
    """The interval of `pairwise_accuracy`. Pairs are many, so each draw is a vector of how often every image was drawn,
    and the pairs are counted by matrix products."""
    if len(predictions) > MAX_PAIRWISE_IMAGES:
        subset = rng.choice(len(predictions), MAX_PAIRWISE_IMAGES, replace=False)
        predictions, ratings = predictions[subset], ratings[subset]
        groups = None if groups is None else [groups[i] for i in subset]
    right, counted = (table.astype(np.float32) for table in pair_order_tables(predictions, ratings))
    members = group_indices(len(predictions), groups)
    counts = np.zeros((draws, len(predictions)), np.float32)
    for row in counts:
        for group in rng.integers(len(members), size=len(members)):
            row[members[group]] += 1
    total = np.einsum("dn,dn->d", counts @ counted, counts)
    shares = np.where(total > 0, np.einsum("dn,dn->d", counts @ right, counts) / np.maximum(total, 1), 0.5)
    return MetricEstimate(pairwise_accuracy(predictions, ratings), *map(float, np.percentile(shares, (2.5, 97.5))))


def group_indices(count: int, groups) -> list[np.ndarray]:
    """The indices of each group; without groups each index is one of its own."""
    if groups is None:
        return list(np.arange(count)[:, None])
    found: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group, []).append(index)
    return [np.array(indices) for indices in found.values()]


# -- cross-validation folds --------------------------------------------------------------------------------------------


def grouped_folds(groups: Sequence[Hashable], k: int, seed: int) -> np.ndarray:
    """(n,) the fold of each image, 0 to k - 1, of about equal size; a group is never split. ValueError for fewer groups
    than folds."""
    sizes = Counter(groups)
    if len(sizes) < k:
        raise ValueError(
            f"There are {len(sizes)} groups of images that are not copies of each other, and {k} folds are asked "
            f"for. Rate more different images, or ask for at most {len(sizes)} members."
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    names = list(sizes)
    filled, fold_of = np.zeros(k, int), {}
    for index in sorted(order, key=lambda i: -sizes[names[i]]):  # the largest first, equal sizes in random order
        fold = int(filled.argmin())
        fold_of[names[index]] = fold
        filled[fold] += sizes[names[index]]
    return np.array([fold_of[group] for group in groups])


def merge_paired_groups(groups: Sequence[Hashable], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The group of each index after the groups of both sides of every pair are joined (union-find)."""
    parent = list(range(len(groups)))

    def root(index):
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[Hashable, int] = {}
    for index, group in enumerate(groups):
        parent[root(index)] = root(first.setdefault(group, index))
    for a, b in pairs:
        parent[root(a)] = root(b)
    return [root(index) for index in range(len(groups))]


# -- calibration -------------------------------------------------------------------------------------------------------


def fit_calibration_line(predictions, ratings) -> tuple[float, float]:
    """(slope, intercept) of the least squares line from predictions to ratings. The slope is never negative: inverting
    a scorer that ranks the wrong way round would hide that it does."""
    predictions, ratings = np.asarray(predictions, np.float64), np.asarray(ratings, np.float64)
    spread = ((predictions - predictions.mean()) ** 2).mean()
    slope = (
        max(0.0, float(((predictions - predictions.mean()) * (ratings - ratings.mean())).mean() / spread))
        if spread > 0
        else 0.0
    )
    return slope, float(ratings.mean() - slope * predictions.mean())


def fit_isotonic_curve(predictions, ratings) -> tuple[tuple[float, float], ...]:
    """Knots (prediction, rating) of the isotonic regression, the nearest curve that never falls (pool adjacent
    violators)."""
    order = np.argsort(predictions, kind="stable")
    blocks: list[list[float]] = []  # [sum of predictions, sum of ratings, count]
    for x, y in zip(np.asarray(predictions, np.float64)[order], np.asarray(ratings, np.float64)[order], strict=True):
        blocks.append([x, y, 1])
        while len(blocks) > 1 and blocks[-2][1] / blocks[-2][2] >= blocks[-1][1] / blocks[-1][2]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    return drop_repeated_knots((x / n, y / n) for x, y, n in blocks)


def drop_repeated_knots(knots) -> tuple[tuple[float, float], ...]:
    """The knots without those whose x equals that of the one before."""
    kept: list[tuple[float, float]] = []
    for x, y in knots:
        if not kept or x - kept[-1][0] > 1e-6:
            kept.append((float(x), float(y)))
    return tuple(kept)
