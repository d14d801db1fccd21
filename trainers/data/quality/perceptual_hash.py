"""What an image is recognised by without a vision model: a 64-bit perceptual hash of its coarse shapes (Zauner 2010, as
ImageHash computes it) and its coarse colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from .colour import rgb_to_lab

HASH_IMAGE_SIDE, HASH_SIDE = 32, 8  # px of the reduced image; its lowest 8 x 8 frequencies make the hash
COLOUR_GRID = 4  # coarse colours: 4 x 4 cells
COLOUR_WIDTH = 20.0  # in a*b*: colours this far apart are related by exp(-1/2)


@dataclass(frozen=True)
class ImageSignature:
    """What one image is recognised by."""

    hash: int
    mirrored: int  # the hash of the mirror image
    grey_spread: float  # grey levels; how much there is to recognise
    colours: np.ndarray  # (GRID, GRID, 2), a* and b*


def compute_image_signature(image: Image.Image) -> ImageSignature:
    small = np.asarray(
        image.convert("RGB").resize((HASH_IMAGE_SIDE, HASH_IMAGE_SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    )
    grey = small @ np.array([0.299, 0.587, 0.114])
    low = dct_matrix() @ grey @ dct_matrix().T
    colours = rgb_to_lab(
        small.reshape(COLOUR_GRID, HASH_IMAGE_SIDE // COLOUR_GRID, COLOUR_GRID, HASH_IMAGE_SIDE // COLOUR_GRID, 3)
        .mean((1, 3))
        .round()
    )[..., 1:]
    return ImageSignature(
        pack_hash_bits(low), pack_hash_bits(low * np.where(np.arange(HASH_SIDE) % 2, -1, 1)), float(grey.std()), colours
    )


@lru_cache(maxsize=1)
def dct_matrix() -> np.ndarray:
    """The lowest rows of the discrete cosine transform. Mirroring an image turns the sign of its odd columns."""
    return np.cos(np.pi / HASH_IMAGE_SIDE * np.outer(np.arange(HASH_SIDE), np.arange(HASH_IMAGE_SIDE) + 0.5))


def pack_hash_bits(low) -> int:
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def popcount(values: np.ndarray) -> np.ndarray:
    """Set bits of each uint64."""
    if hasattr(np, "bitwise_count"):  # from numpy 2
        return np.bitwise_count(values)
    return np.unpackbits(values[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.uint8)


def colour_distance(one: ImageSignature, other: ImageSignature, mirrored: bool) -> float:
    colours = other.colours[:, ::-1] if mirrored else other.colours
    return float(np.linalg.norm(one.colours - colours, axis=-1).mean())


def signature_kernel(prints: Sequence[ImageSignature]) -> np.ndarray:
    """Likeness without a vision model: the coarse shapes (bits of the hash in common) times the coarse colours."""
    hashes = np.array([p.hash for p in prints], ">u8")
    signs = np.unpackbits(hashes.view(np.uint8).reshape(len(prints), 8), axis=1) * 2.0 - 1.0
    colours = np.stack([p.colours.ravel() for p in prints]).astype(np.float64)
    square = (colours**2).sum(1)
    apart = (square[:, None] + square[None] - 2 * colours @ colours.T).clip(min=0) / (colours.shape[1] / 2)
    return (signs @ signs.T / signs.shape[1]) * np.exp(-apart / (2 * COLOUR_WIDTH**2))
