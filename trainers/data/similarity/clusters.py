"""Groups of images that look alike, from one row of features per image.

k-means on the sphere (k-means++ starts, several of them) or agglomerative clustering by average linkage; how many
groups there are is what the silhouette (Rousseeuw 1987) likes best, unless it is said.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...settings import Settings, choice_field, number_field

K_MEANS, AGGLOMERATIVE = CLUSTER_METHODS = ("k-means", "agglomerative")
MAX_CLUSTERED_IMAGES = 4000  # images: of more, the matrix of all distances grows too large to cluster or judge by
KMEANS_RESTARTS = 4
MAX_KMEANS_ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(Settings):
    """How images are put into groups."""

    method: str = choice_field(
        K_MEANS,
        CLUSTER_METHODS,
        "k-means makes round groups of similar size; agglomerative also finds small groups and outliers.",
    )
    clusters: int = number_field(0, 0, 1000, "Number of groups. 0 lets the silhouette choose.", unit="groups")
    most: int = number_field(12, 2, 200, "With clusters = 0: the largest number of groups to try.", unit="groups")
    seed: int = number_field(0, 0, 2**63 - 1, "Initialises k-means. The same seed gives the same groups.")


@dataclass(frozen=True)
class Clustering:
    """labels by image, the largest group being 0; silhouette of each image, -1 to 1; {number of groups: mean
    silhouette} of all that were tried."""

    labels: tuple[int, ...]
    silhouettes: tuple[float, ...]
    tried: dict[int, float]

    @property
    def count(self) -> int:
        return max(self.labels) + 1

    @property
    def silhouette(self) -> float:
        return float(np.mean(self.silhouettes))

    def members(self, cluster: int) -> list[int]:
        return [i for i, label in enumerate(self.labels) if label == cluster]


def cluster_features(rows: np.ndarray, settings: ClusterSettings, check_interrupt=lambda: None) -> Clustering:
    """rows (n, d) of unit length. ValueError for more groups than images, or more images than can be handled."""
    if len(rows) < 2 or settings.clusters > len(rows):
        raise ValueError(
            f"{len(rows)} images cannot make {settings.clusters or 'two or more'} groups. Give more images, or ask "
            "for fewer groups."
        )
    if len(rows) > MAX_CLUSTERED_IMAGES:
        raise ValueError(
            f"{len(rows)} images are more than {MAX_CLUSTERED_IMAGES}, whose distances no longer fit in memory. "
            "Split the dataset first."
        )
    x = torch.from_numpy(np.asarray(rows, np.float32)).double()
    apart = pairwise_distances(x)
    counts = (
        [settings.clusters]
        if settings.clusters
        else list(range(2, min(settings.most, len(rows) - 1, count_distinct(apart)) + 1)) or [1]
    )
    tree = average_linkage(apart, check_interrupt) if settings.method == AGGLOMERATIVE else None
    found = {}
    for count in counts:
        check_interrupt()
        labels = cut_dendrogram(tree, len(rows), count) if tree is not None else k_means(x, count, settings.seed)
        found[count] = labels, silhouette_samples(apart, labels)
    tried = {count: float(s.mean()) for count, (_, s) in found.items()}
    labels, scores = found[max(tried, key=lambda count: (round(tried[count], 9), -count))]
    return Clustering(tuple(relabel_by_size(labels)), tuple(scores.tolist()), tried)


def pairwise_distances(x: Tensor) -> Tensor:
    """(n, n) Euclidean distances."""
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.fill_diagonal_(0.0)


def count_distinct(apart: Tensor) -> int:
    """How many different images there are: copies cannot be told apart."""
    copies = (apart < 1e-9).triu(1).any(0)
    return int((~copies).sum())


def relabel_by_size(labels: Tensor) -> list[int]:
    """The same groups, numbered from the largest; of equal ones the first to come is first."""
    values, first = labels.tolist(), {}
    for position, label in enumerate(values):
        first.setdefault(label, position)
    counts = Counter(values)
    order = sorted(first, key=lambda label: (-counts[label], first[label]))
    numbers = {label: number for number, label in enumerate(order)}
    return [numbers[label] for label in values]


# -- k-means -----------------------------------------------------------------------------------------------------------


def k_means(x: Tensor, count: int, seed: int) -> Tensor:
    """(n,) labels of the best of several starts (Lloyd 1982, Arthur and Vassilvitskii 2007); no group is empty unless
    images are equal."""
    rng = torch.Generator().manual_seed(seed)
    runs = [lloyd_iterations(x, kmeans_plus_plus(x, count, rng)) for _ in range(KMEANS_RESTARTS)]
    return min(runs, key=lambda run: run[1])[0]


def kmeans_plus_plus(x: Tensor, count: int, rng) -> Tensor:
    """(count, d) starting points, each likely to be far from those before it."""
    centres = [x[int(torch.randint(len(x), (1,), generator=rng))]]
    while len(centres) < count:
        square = torch.cdist(x, torch.stack(centres)).amin(1).square()
        weights = square if float(square.sum()) > 0 else torch.ones(len(x), dtype=x.dtype)
        centres.append(x[int(torch.multinomial(weights, 1, generator=rng))])
    return torch.stack(centres)


def lloyd_iterations(x: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """(labels, sum of square distances)."""
    labels = torch.full((len(x),), -1, device=x.device)  # of no group yet
    for _ in range(MAX_KMEANS_ITERATIONS):
        apart = torch.cdist(x, centres)
        new = apart.argmin(1)
        if torch.equal(new, labels):
            break
        labels, centres = new, update_centroids(x, new, centres, apart)
    return labels, float(torch.cdist(x, centres).amin(1).square().sum())


def update_centroids(x, labels, centres, apart):
    """The means of the groups; an empty one moves to the image that is worst off."""
    fresh, worst = centres.clone(), apart.amin(1).argsort(descending=True).tolist()
    for label in range(len(centres)):
        own = labels == label
        fresh[label] = x[own].mean(0) if bool(own.any()) else x[worst.pop(0)]
    return fresh


# -- agglomerative -----------------------------------------------------------------------------------------------------


def average_linkage(apart: Tensor, check_interrupt=lambda: None) -> list[tuple[int, int, float]]:
    """[(one member, another, distance)] of n - 1 unions by average linkage, nearest first: chains of nearest neighbours
    (Murtagh 1983), O(n^2)."""
    d = apart.clone().fill_diagonal_(float("inf"))
    sizes, alive, chain, out = [1] * len(d), [True] * len(d), [], []
    while len(out) < len(d) - 1:
        check_interrupt()
        if not chain:
            chain = [alive.index(True)]
        here = chain[-1]
        near = int(d[here].argmin())
        if len(chain) > 1 and d[here, chain[-2]] <= d[here, near]:
            near = chain[-2]
            chain = chain[:-2]
            out.append((here, near, float(d[here, near])))
            merge_clusters(d, sizes, alive, near, here)
        else:
            chain.append(near)
    return sorted(out, key=lambda union: union[2])


def merge_clusters(d, sizes, alive, into: int, gone: int) -> None:
    """`gone` becomes a part of `into`: distances are means over all pairs."""
    mean = (d[into] * sizes[into] + d[gone] * sizes[gone]) / (sizes[into] + sizes[gone])
    d[into], d[:, into] = mean, mean
    d[gone], d[:, gone], d[into, into] = float("inf"), float("inf"), float("inf")
    sizes[into] += sizes[gone]
    alive[gone] = False


def cut_dendrogram(tree, n: int, count: int) -> Tensor:
    """(n,) labels after the first n - count unions."""
    leader = list(range(n))

    def lead(i):
        while leader[i] != i:
            i = leader[i]
        return i

    for a, b, _ in tree[: n - count]:
        leader[lead(a)] = lead(b)
    names = {name: label for label, name in enumerate(dict.fromkeys(lead(i) for i in range(n)))}
    return torch.tensor([names[lead(i)] for i in range(n)])


# -- how well it fits --------------------------------------------------------------------------------------------------


def silhouette_samples(apart: Tensor, labels: Tensor) -> Tensor:
    """(n,) how much nearer each is to its own group than to the next one, -1 to 1; 0 for those that are alone."""
    names = labels.unique()
    if len(names) < 2:
        return torch.zeros(len(labels), dtype=apart.dtype)
    member = (labels[:, None] == names[None]).to(apart.dtype)  # (n, groups)
    sizes, total = member.sum(0), apart @ member
    own = member.bool()
    size = (member * sizes).sum(1)
    inside = total[own] / (size - 1).clamp(min=1)
    outside = (total / sizes).masked_fill(own, float("inf")).amin(1)
    return torch.where(
        size > 1, (outside - inside) / torch.maximum(inside, outside).clamp(min=1e-12), torch.zeros_like(inside)
    )
