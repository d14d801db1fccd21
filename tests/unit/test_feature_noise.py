"""Noise on image embeddings, so that they can stand for the embeddings of texts."""

import pytest
import torch
from trainyard.tests.unit.toy import rng
from trainyard.trainers.data.feature_noise import perturb_embedding


def test_the_embedding_keeps_its_length_and_turns_by_alpha():
    """Unit noise in many dimensions is nearly at right angles: the cosine to the image is 1 / sqrt(1 + alpha^2)."""
    embedding = 7 * torch.nn.functional.normalize(torch.randn(200, 1280, generator=rng()), dim=-1)
    for alpha in (0.25, 1.0):
        moved = perturb_embedding(embedding, alpha, rng(1))
        torch.testing.assert_close(moved.norm(dim=-1), embedding.norm(dim=-1))
        cosine = torch.nn.functional.cosine_similarity(moved, embedding, dim=-1).mean().item()
        assert cosine == pytest.approx((1 + alpha**2) ** -0.5, abs=0.01)


def test_no_alpha_is_the_picture_itself_and_the_seed_decides_the_rest():
    embedding = torch.randn(1, 64, generator=rng())
    assert torch.equal(perturb_embedding(embedding, 0.0, rng(1)), embedding)
    assert torch.equal(perturb_embedding(embedding, 0.5, rng(1)), perturb_embedding(embedding, 0.5, rng(1)))
    assert not torch.equal(perturb_embedding(embedding, 0.5, rng(1)), perturb_embedding(embedding, 0.5, rng(2)))
