"""How well predictions agree with ratings, and how sure that figure is. Plain numpy; no figure comes without its
interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_DRAWS = 1000
MAX_PAIRWISE_IMAGES = 1500  # pictures that a pairwise figure looks at; more are drawn from by chance


@dataclass(frozen=True)
class MetricEstimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


# -- agreement ---------------------------------------------------------------------------------------------------------


def average_ranks(values) -> np.ndarray:
    """Ranks from 1, ties sharing the mean of theirs."""
    values = np.asarray(values, np.float64)
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def plcc(said, rated) -> float:
    """Pearson's correlation; 0 where one of the two never changes."""
    a, b = (np.asarray(v, np.float64) - np.mean(v) for v in (said, rated))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 1e-12 * max(1.0, len(a)) else 0.0


def srcc(said, rated) -> float:
    """Spearman's correlation: how well the order agrees, 1 exactly, 0 not at all."""
    return plcc(average_ranks(said), average_ranks(rated))


def mae(said, rated) -> float:
    return float(np.abs(np.asarray(said, np.float64) - np.asarray(rated, np.float64)).mean())


def pairwise_accuracy(said, rated) -> float:
    """Share of the pairs with different ratings that are put in order; a tie counts half. .5 where there are none."""
    right, there = pair_order_tables(said, rated)
    return float(right.sum() / there.sum()) if there.any() else 0.5


def pair_order_tables(said, rated) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) how right each pair is, 0 to 1, and whether it counts."""
    said, rated = np.asarray(said, np.float64), np.asarray(rated, np.float64)
    better = rated[:, None] > rated[None]
    above = np.sign(said[:, None] - said[None])
    return np.where(better, (above + 1) / 2, 0.0), better


def auroc(said, label) -> float:
    """The chance that a picture of label 1 scores above one of label 0; .5 where one of the labels is missing."""
    label = np.asarray(label) > 0.5
    yes, no = int(label.sum()), int((~label).sum())
    if not yes or not no:
        return 0.5
    return float((average_ranks(said)[label].sum() - yes * (yes + 1) / 2) / (yes * no))


def f1_score(said, label, threshold: float = 0.0) -> float:
    """Harmonic mean of precision and recall of what lies above the threshold (of a logit: 0)."""
    found, label = np.asarray(said) > threshold, np.asarray(label) > 0.5
    both = int((found & label).sum())
    return 2 * both / max(1, int(found.sum()) + int(label.sum()))


def accuracy(said, label) -> float:
    return float((np.asarray(said) == np.asarray(label)).mean())


# -- how sure ----------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    metric: Callable, said, rated, seed: int = 0, draws: int = BOOTSTRAP_DRAWS, groups: Sequence[Hashable] | None = None
) -> MetricEstimate:
    """The metric with its 95 % percentile bootstrap interval (Efron 1979). Groups are drawn as a whole: copies of one
    picture are no independent evidence."""
    said, rated = np.asarray(said, np.float64), np.asarray(rated, np.float64)
    rng = np.random.default_rng(seed)
    if metric is pairwise_accuracy:
        return bootstrap_pairwise_interval(said, rated, rng, draws, groups)
    members = group_indices(len(said), groups)
    values = []
    for _ in range(draws):
        pick = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        values.append(metric(said[pick], rated[pick]))
    return MetricEstimate(metric(said, rated), *map(float, np.percentile(values, (2.5, 97.5))))


def bootstrap_pairwise_interval(said, rated, rng, draws, groups) -> MetricEstimate:
    """The same for pairs, which are many: each draw is a vector of how often every picture was drawn."""
    if len(said) > MAX_PAIRWISE_IMAGES:
        some = rng.choice(len(said), MAX_PAIRWISE_IMAGES, replace=False)
        said, rated, groups = said[some], rated[some], None if groups is None else [groups[i] for i in some]
    right, there = (table.astype(np.float32) for table in pair_order_tables(said, rated))
    members = group_indices(len(said), groups)
    counts = np.zeros((draws, len(said)), np.float32)
    for row in counts:
        for group in rng.integers(len(members), size=len(members)):
            row[members[group]] += 1
    total = np.einsum("dn,dn->d", counts @ there, counts)
    shares = np.where(total > 0, np.einsum("dn,dn->d", counts @ right, counts) / np.maximum(total, 1), 0.5)
    return MetricEstimate(pairwise_accuracy(said, rated), *map(float, np.percentile(shares, (2.5, 97.5))))


def group_indices(count: int, groups) -> list[np.ndarray]:
    """Indices by group; each picture its own where nothing is given."""
    if groups is None:
        return list(np.arange(count)[:, None])
    found: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group, []).append(index)
    return [np.array(indices) for indices in found.values()]


# -- folds -------------------------------------------------------------------------------------------------------------


def grouped_folds(groups: Sequence[Hashable], k: int, seed: int) -> np.ndarray:
    """(n,) the fold of each picture, 0 to k - 1, of about equal size; a group is never divided. ValueError for fewer
    groups than folds."""
    sizes = Counter(groups)
    if len(sizes) < k:
        raise ValueError(
            f"There are {len(sizes)} groups of pictures that are not copies of each other, and {k} folds are asked "
            f"for. Rate more different pictures, or ask for at most {len(sizes)} members."
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    names = list(sizes)
    filled, fold_of = np.zeros(k, int), {}
    for index in sorted(
        order, key=lambda i: -sizes[names[i]]
    ):  # the largest first; sorted keeps the order of chance among equals
        fold = int(filled.argmin())
        fold_of[names[index]] = fold
        filled[fold] += sizes[names[index]]
    return np.array([fold_of[group] for group in groups])


def merge_paired_groups(groups: Sequence[Hashable], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Groups in which both sides of every pair are together."""
    leader = list(range(len(groups)))

    def lead(index):
        while leader[index] != index:
            leader[index] = index = leader[leader[index]]
        return index

    first: dict[Hashable, int] = {}
    for index, group in enumerate(groups):
        leader[lead(index)] = lead(first.setdefault(group, index))
    for a, b in pairs:
        leader[lead(a)] = lead(b)
    return [lead(index) for index in range(len(groups))]


# -- calibration -------------------------------------------------------------------------------------------------------


def fit_calibration_line(said, rated) -> tuple[float, float]:
    """(slope, shift) of the least squares line from what was said to what was rated. Never falling: a scorer that says
    the opposite is no scorer, and turning it around would hide that."""
    said, rated = np.asarray(said, np.float64), np.asarray(rated, np.float64)
    spread = ((said - said.mean()) ** 2).mean()
    slope = max(0.0, float(((said - said.mean()) * (rated - rated.mean())).mean() / spread)) if spread > 0 else 0.0
    return slope, float(rated.mean() - slope * said.mean())


def fit_isotonic_curve(said, rated) -> tuple[tuple[float, float], ...]:
    """Knots (said, rating) of the isotonic regression: the nearest curve that never falls (pool adjacent violators)."""
    order = np.argsort(said, kind="stable")
    blocks: list[list[float]] = []  # [sum of said, sum of rated, count]
    for x, y in zip(np.asarray(said, np.float64)[order], np.asarray(rated, np.float64)[order], strict=True):
        blocks.append([x, y, 1])
        while len(blocks) > 1 and blocks[-2][1] / blocks[-2][2] >= blocks[-1][1] / blocks[-1][2]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    return drop_repeated_knots((x / n, y / n) for x, y, n in blocks)


def drop_repeated_knots(knots) -> tuple[tuple[float, float], ...]:
    """Without knots at the same place as the one before."""
    kept: list[tuple[float, float]] = []
    for x, y in knots:
        if not kept or x - kept[-1][0] > 1e-6:
            kept.append((float(x), float(y)))
    return tuple(kept)
