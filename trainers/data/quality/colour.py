"""Colours as eyes tell them apart: CIELAB, the CIEDE2000 difference, and how far a subject stands out from its
ground."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

WHITE_POINT = np.array([0.95047, 1.0, 1.08883], np.float32)  # D65, the white of sRGB
SRGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
    np.float32,
)
CONTRAST_SIDE = 256  # px; contrast is a matter of areas, and areas survive scaling down
BORDER_SHARE = 0.08  # share of the short side that counts as border
RIM_WIDTH = 9  # px; how wide the compared rims on either side of the outline are, at SIDE


@dataclass(frozen=True)
class Contrast:
    """What lies on either side of the subject's outline, compared."""

    dE: float  # CIEDE2000: 1 is just visible, under 12 hard to separate, from 20 on clear
    dL: float  # difference of the lightness alone, 0 to 100


def rgb_to_lab(rgb) -> np.ndarray:
    """CIELAB (D65) of 8-bit sRGB, (..., 3) in and out: L 0..100, a and b around -100..100."""
    xyz = srgb_linear_table()[np.asarray(rgb, np.uint8)] @ (SRGB_TO_XYZ / WHITE_POINT[:, None]).T
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), xyz * (24389 / 27 / 116) + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@lru_cache(maxsize=1)
def srgb_linear_table() -> np.ndarray:
    """Light of each of the 256 values of an sRGB channel, 0..1."""
    value = np.arange(256, dtype=np.float32) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def ciede2000(lab1, lab2):
    """Colour difference of two CIELAB colours (..., 3), elementwise (Sharma, Wu and Dalal 2005)."""
    (l1, a1, b1), (l2, a2, b2) = (np.moveaxis(np.asarray(lab, np.float64), -1, 0) for lab in (lab1, lab2))
    mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(mean**7 / (mean**7 + 25.0**7))  # greys count more than their a* says
    (c1, h1), (c2, h2) = (chroma_and_hue(a * stretch, b) for a, b in ((a1, b1), (a2, b2)))
    dl, dc, dh = l2 - l1, c2 - c1, hue_difference(c1, h1, c2, h2)
    l, c, h = (l1 + l2) / 2, (c1 + c2) / 2, mean_hue(c1, h1, c2, h2)
    by_hue = (
        1
        - 0.17 * cos_degrees(h - 30)
        + 0.24 * cos_degrees(2 * h)
        + 0.32 * cos_degrees(3 * h + 6)
        - 0.20 * cos_degrees(4 * h - 63)
    )
    sl = 1 + 0.015 * (l - 50) ** 2 / np.sqrt(20 + (l - 50) ** 2)
    sc, sh = 1 + 0.045 * c, 1 + 0.015 * c * by_hue
    turn = (
        -2 * np.sqrt(c**7 / (c**7 + 25.0**7)) * np.sin(np.deg2rad(60 * np.exp(-(((h - 275) / 25) ** 2))))
    )  # only matters for blues
    total = (dl / sl) ** 2 + (dc / sc) ** 2 + (dh / sh) ** 2 + turn * (dc / sc) * (dh / sh)
    return np.sqrt(np.maximum(total, 0))


def chroma_and_hue(a, b):
    """(chroma, hue in degrees 0..360)."""
    return np.hypot(a, b), np.rad2deg(np.arctan2(b, a)) % 360


def hue_difference(c1, h1, c2, h2):
    turn = (h2 - h1 + 180) % 360 - 180
    turn = np.where(h2 - h1 == 180, 180.0, turn)  # exactly opposite hues: the paper's case keeps the sign
    return 2 * np.sqrt(c1 * c2) * np.sin(np.deg2rad(turn) / 2)


def mean_hue(c1, h1, c2, h2):
    """The hue in the middle of the shorter way round; the sum where one colour is grey and has no hue."""
    total, far = h1 + h2, np.abs(h1 - h2) > 180
    middle = np.where(far, np.where(total < 360, total + 360, total - 360), total) / 2
    return np.where(c1 * c2 == 0, total, middle)


def cos_degrees(degrees):
    return np.cos(np.deg2rad(degrees))


# -- subject and ground ------------------------------------------------------------------------------------------------


def measure_contrast(image: Image.Image, mask: Image.Image | None = None) -> Contrast | None:
    """How far the subject stands out from what is right beside it. Without a mask (white = subject) the subject is what
    differs from the colours of the border and lies near the centre. None where the mask leaves no subject or no
    ground."""
    small = reduce_for_contrast(image.convert("RGB"))
    lab = rgb_to_lab(np.asarray(small))
    subject = (
        segment_subject(lab)
        if mask is None
        else np.asarray(mask.convert("L").resize(small.size, Image.Resampling.BOX)) > 127
    )
    if mask is None and not subject.any():
        return Contrast(0.0, 0.0)  # one colour all over
    inner, outer = outline_rims(subject)
    if not inner.any() or not outer.any():
        return None
    here, there = np.median(lab[inner], axis=0), np.median(lab[outer], axis=0)
    return Contrast(float(ciede2000(here, there)), float(abs(here[0] - there[0])))


def reduce_for_contrast(image: Image.Image) -> Image.Image:
    scale = CONTRAST_SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BOX, reducing_gap=2.0) if scale < 1 else image


def segment_subject(lab: np.ndarray) -> np.ndarray:
    """(H, W) bool: far from the three main colours of the border, nearer the centre counting more, split by Otsu's
    threshold."""
    colours = dominant_colours(lab[border_mask(lab.shape[:2])])
    far = np.sqrt(((lab[:, :, None] - colours) ** 2).sum(-1)).min(-1) * centre_prior(*lab.shape[:2])
    return far > otsu_threshold(far)


def border_mask(shape) -> np.ndarray:
    width = max(1, round(BORDER_SHARE * min(shape)))
    ring = np.ones(shape, bool)
    ring[width:-width, width:-width] = False
    return ring


def centre_prior(height, width) -> np.ndarray:
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    return np.exp(-(x * x + y * y)).astype(np.float32)


def dominant_colours(colours: np.ndarray, count=3, rounds=12) -> np.ndarray:
    """(count, 3) by k-means, begun from the median and then from what is farthest; the same colours give the same
    answer."""
    colours = colours[:: max(1, len(colours) // 4096)]
    centres = np.median(colours, axis=0)[None]
    while len(centres) < count:
        centres = np.vstack([centres, colours[squared_distances(colours, centres).min(1).argmax()]])
    for _ in range(rounds):
        nearest = squared_distances(colours, centres).argmin(1)
        centres = np.stack(
            [colours[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(count)]
        )
    share = np.bincount(squared_distances(colours, centres).argmin(1), minlength=count) / len(colours)
    return centres[share >= min(0.05, share.max())]  # specks on the border are no ground


def squared_distances(colours, centres) -> np.ndarray:
    return ((colours[:, None] - centres) ** 2).sum(-1)


def otsu_threshold(values: np.ndarray, bins=64) -> float:
    """The threshold between two groups of values that leaves the least spread within them (Otsu 1979)."""
    counts, edges = np.histogram(values, bins)
    below = np.cumsum(counts)
    middle = (edges[:-1] + edges[1:]) / 2
    total = np.cumsum(counts * middle)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(edges[1:][np.nan_to_num(between).argmax()])


def outline_rims(subject: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(just inside, just outside) the outline. One pixel on either side is left out: it is a mixture of both."""
    core, near = erode_and_dilate(subject, 1)
    deep, wide = erode_and_dilate(subject, RIM_WIDTH)
    inner = core & ~deep
    return (inner if inner.any() else subject), wide & ~near


def erode_and_dilate(mask: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """The mask eroded and dilated by a square. A box blur says both, in a tenth of a rank filter's time; up to a radius
    of 10 a single pixel survives its rounding."""
    mean = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(radius)))
    return mean == 255, mean > 0
