"""Images in the place of captions: an image embedding with noise stands for the text embedding that a caption of it
would have.

Trained so, a model needs no captions, and afterwards follows texts, because CLIP puts both near each other and the
noise covers what lies between (LAFITE, Zhou et al. 2022, its fixed perturbation; CLIP-VQDiffusion).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory.transfer import copy_like
from ..settings import Settings, number_field


@dataclass(frozen=True, kw_only=True)
class LafiteSettings(Settings):
    """How far an image embedding is moved, and how often it is left out."""

    alpha: float = number_field(
        0.25,
        0.0,
        2.0,
        "Noise relative to the length of the embedding. 0: the exact image; 0.25 suits most; near 1 only the "
        "rough content remains.",
        step=0.05,
    )
    drop: float = number_field(
        0.1, 0.0, 1.0, "Share of the steps trained on the empty caption instead, for guidance.", step=0.05
    )
    variants: int = number_field(64, 1, 10_000, "Noise samples per image to draw from during training.")
    seed: int = number_field(0, 0, 2**63 - 1, "The same seed gives the same noise.")


def perturb_embedding(embedding: Tensor, alpha: float, rng: torch.Generator) -> Tensor:
    """(..., D) as long as before: unit embedding + alpha * unit noise, renormalised."""
    if not alpha:
        return embedding
    noise = copy_like(torch.randn(embedding.shape, generator=rng), embedding)
    mixed = F.normalize(embedding, dim=-1) + alpha * F.normalize(noise, dim=-1)
    return F.normalize(mixed, dim=-1) * embedding.norm(dim=-1, keepdim=True)
