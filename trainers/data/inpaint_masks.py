"""The holes that an inpainting model learns to fill: drawn at random, or an image's own mask.

Boxes and strokes as for LaMa's wide masks (Suvorov et al. 2022, "Resolution-robust Large Mask Inpainting with Fourier
Convolutions", big-lama's settings at 256 px), which Stable Diffusion's inpainting models were trained with too. A mask
has the size of its image: True is the hole.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..settings import MASK_BOXES, MASK_OF_DATASET, MASK_STROKES, InpaintSettings

# Shares of the shorter side, from pixels of 256.
BOX_SIDES = (30 / 256, 150 / 256)
STROKE_LENGTHS = (10 / 256, 200 / 256)
STROKE_WIDTHS = (8 / 256, 100 / 256)
MOST_BOXES, MOST_STROKES, MOST_SEGMENTS = 4, 5, 5
GREY = 0.5  # of the host's InpaintModelConditioning: what an image shows in its hole, 0 to 1


def list_mask_kinds(settings: InpaintSettings, rng: torch.Generator, has_mask: bool) -> list[str]:
    """The kind of each mask of one image: the kinds that were asked for take turns, from one drawn by chance. An image
    has one mask of its own, so that it is in the list at most once."""
    kinds = [kind for kind in settings.mask_kinds() if has_mask or kind != MASK_OF_DATASET]
    if kinds == [MASK_OF_DATASET]:
        return kinds
    first = int(torch.randint(len(kinds), (), generator=rng)) if kinds else 0
    turns = [kinds[(first + number) % len(kinds)] for number in range(settings.masks_per_image if kinds else 0)]
    return [kind for number, kind in enumerate(turns) if kind != MASK_OF_DATASET or kind not in turns[:number]]


def draw_mask(kind: str, size: tuple[int, int], rng: torch.Generator) -> np.ndarray:
    """(H, W) bool of a size in pixels (width, height), with at least one pixel of hole."""
    image = Image.new("1", size)
    {MASK_BOXES: draw_boxes, MASK_STROKES: draw_strokes}[kind](ImageDraw.Draw(image), size, rng)
    return np.array(image)


def draw_boxes(draw, size, rng: torch.Generator) -> None:
    """1 to 4 rectangles whose middle lies in the image, so that edges and corners are filled too."""
    for _ in range(draw_count(MOST_BOXES, rng)):
        spans = []
        for side in size:
            length = max(1, round(draw_between(*BOX_SIDES, rng) * min(size)))
            first = draw_count(side, rng) - 1 - length // 2
            spans.append((max(0, first), min(side, first + length) - 1))
        (left, right), (top, bottom) = spans
        draw.rectangle((left, top, right, bottom), fill=1)


def draw_strokes(draw, size, rng: torch.Generator) -> None:
    """1 to 5 chains of up to 5 straight brush strokes, each of a length, a width and a direction of its own."""
    for _ in range(draw_count(MOST_STROKES, rng)):
        at = [draw_between(0, side - 1, rng) for side in size]
        for _ in range(draw_count(MOST_SEGMENTS, rng)):
            angle, length = draw_between(0, 2 * math.pi, rng), draw_between(*STROKE_LENGTHS, rng) * min(size)
            width = max(1.0, draw_between(*STROKE_WIDTHS, rng) * min(size))
            steps = (math.cos(angle) * length, math.sin(angle) * length)
            end = [min(max(a + step, 0), side - 1) for a, step, side in zip(at, steps, size, strict=True)]
            draw.line((*at, *end), fill=1, width=round(width))
            for x, y in (at, end):  # round ends, so that strokes join
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)
            at = end


def draw_between(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def draw_count(most: int, rng: torch.Generator) -> int:
    """1 to most."""
    return 1 + int(torch.randint(most, (), generator=rng))


def threshold_mask(mask: Image.Image) -> np.ndarray:
    """(H, W) bool of a grey one, rounded as the host rounds it."""
    return np.asarray(mask.convert("L")) > 127


def cut_hole(image: Tensor, mask: np.ndarray) -> Tensor:
    """(1, H, W, 3) in 0..1 with grey in the hole: the sums of the host's InpaintModelConditioning, in its order, so
    that every bit is the same."""
    kept = 1.0 - torch.from_numpy(mask).float()[None, ..., None]
    return (image - GREY) * kept + GREY


def pack_mask(mask: np.ndarray) -> Tensor:
    """(H, W) bool -> (H, ceil(W / 8)) uint8: a bit for each pixel."""
    return torch.from_numpy(np.packbits(mask, axis=-1))


def unpack_mask(packed: Tensor, width: int) -> Tensor:
    """(1, 1, H, W) of 0 and 1, as a conditioning of the host holds it."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=width)).float()[None, None]
