"""How many different images a dataset amounts to: the Vendi score (Friedman and Dieng 2023), the exponential of the
entropy of the eigenvalues of a similarity matrix. n images that have nothing in common score n, n times the same
image scores 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_VENDI_SAMPLES = 1500  # images; beyond, the eigenvalues are taken of an even sample


def vendi(kernel: np.ndarray) -> float:
    """1 to n of a similarity matrix (n, n), symmetric, with a diagonal of ones."""
    return exp_entropy(np.linalg.eigvalsh(kernel / len(kernel)))


def vendi_from_features(features: np.ndarray) -> float:
    """The same with cosine similarity, of normalised features (n, d); the smaller of the two matrices has the same
    eigenvalues."""
    features = np.asarray(features, np.float64)
    matrix = features.T @ features if len(features) > features.shape[1] else features @ features.T
    return exp_entropy(np.linalg.eigvalsh(matrix / len(features)))


def exp_entropy(eigenvalues) -> float:
    share = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(share * np.log(share)).sum()))


def sample_evenly(values: Sequence | np.ndarray, most: int = MAX_VENDI_SAMPLES) -> list:
    """At most `most` of them, evenly spread."""
    if len(values) <= most:
        return list(values)
    return [values[index] for index in np.linspace(0, len(values) - 1, most).round().astype(int)]
