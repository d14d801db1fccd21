"""Groups of images that look alike."""

import numpy as np
import pytest
import torch
from trainyard.trainers.data.similarity.clusters import (
    AGGLOMERATIVE,
    CLUSTER_METHODS,
    ClusterSettings,
    average_linkage,
    cluster_features,
    cut_dendrogram,
    pairwise_distances,
    silhouette_samples,
)


def blobs(sizes=(12, 8, 5), spread=0.05, seed=0):
    """Unit rows around as many directions as there are sizes, and the truth."""
    rng = np.random.default_rng(seed)
    centres = np.eye(6)[: len(sizes)]
    rows = np.concatenate([c + spread * rng.standard_normal((n, 6)) for c, n in zip(centres, sizes, strict=True)])
    truth = np.repeat(range(len(sizes)), sizes)
    order = rng.permutation(len(rows))
    rows = rows[order] / np.linalg.norm(rows[order], axis=1, keepdims=True)
    return rows.astype(np.float32), truth[order]


@pytest.mark.parametrize("method", CLUSTER_METHODS)
def test_groups_that_are_there_are_found_and_counted(method):
    rows, truth = blobs()
    found = cluster_features(rows, ClusterSettings(method=method))
    assert found.count == 3
    assert list(found.labels) == truth.tolist(), "numbered from the largest"
    assert found.silhouette > 0.8
    assert found.tried[3] == max(found.tried.values())


@pytest.mark.parametrize("method", CLUSTER_METHODS)
def test_the_number_of_groups_can_be_said(method):
    assert cluster_features(blobs()[0], ClusterSettings(method=method, clusters=7)).count == 7


def test_the_same_seed_gives_the_same_groups():
    rows = np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    runs = [cluster_features(rows, ClusterSettings(clusters=5, seed=3)).labels for _ in range(2)]
    assert runs[0] == runs[1]


def test_average_linkage_is_that_of_scipy():
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    rows = np.random.default_rng(2).standard_normal((30, 4))
    tree = average_linkage(pairwise_distances(torch.from_numpy(rows)))
    oracle = linkage(pdist(rows), "average")
    assert np.allclose([d for *_, d in tree], oracle[:, 2])
    for count in (2, 5, 11):
        ours, theirs = cut_dendrogram(tree, 30, count).numpy(), fcluster(oracle, count, "maxclust")
        assert len({*zip(ours, theirs, strict=True)}) == count, "the same groups under other numbers"


def test_a_silhouette_by_hand():
    """On a line 0, 1 | 10: the first is 1 from its own and 10 from the other: (10 - 1) / 10; the second (9 - 1) / 9;
    one alone is 0."""
    apart = pairwise_distances(torch.tensor([[0.0], [1.0], [10.0]]))
    assert silhouette_samples(apart, torch.tensor([0, 0, 1])).tolist() == pytest.approx([0.9, 8 / 9, 0.0])


@pytest.mark.parametrize("method", CLUSTER_METHODS)
def test_copies_of_one_picture_are_one_group(method):
    rows = np.tile(np.eye(4, dtype=np.float32)[0], (5, 1))
    found = cluster_features(rows, ClusterSettings(method=method))
    assert found.count == 1
    assert (
        cluster_features(np.concatenate([rows, np.eye(4, dtype=np.float32)[1:2]]), ClusterSettings(method=method)).count
        == 2
    )


def test_too_few_pictures_and_too_many_groups_are_refused_in_words():
    with pytest.raises(ValueError, match="1 images cannot make two or more groups"):
        cluster_features(np.ones((1, 3), np.float32), ClusterSettings())
    with pytest.raises(ValueError, match="3 images cannot make 4 groups"):
        cluster_features(np.eye(3, dtype=np.float32), ClusterSettings(clusters=4, method=AGGLOMERATIVE))
