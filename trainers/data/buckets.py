"""Which size each picture is trained at: aspect buckets by kohya's rules, and the picture fitted to its bucket.

The rules are those of kohya-ss/sd-scripts (make_bucket_resolutions and BucketManager), so that a dataset that was tuned
there falls into the same buckets here. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from ..settings import Settings, number, switch

LEAST_STEP = 8


@dataclass(frozen=True, kw_only=True)
class BucketSettings(Settings):
    """The sizes that images are trained at. An image keeps its aspect ratio; what does not fit is cropped at the centre."""

    resolution: int = number(1024, 16, 8192, "Images are trained at about resolution x resolution pixels in all, in their own shape.",
                             unit="px", step=8)
    upscale: bool = switch(False, "Enlarge small images up to the resolution. Off: small images are trained at their own size.")
    step: int = number(64, LEAST_STEP, 512, "Sides are multiples of this. Smaller crops less and makes more buckets.",
                       unit="px", step=8, advanced=True)
    min_side: int = number(256, 8, 8192, "With upscale: the shortest side of a bucket.", unit="px", step=8, advanced=True)
    max_side: int = number(2048, 8, 16384, "With upscale: the longest side of a bucket.", unit="px", step=8, advanced=True)

    def __post_init__(self):
        super().__post_init__()
        if self.resolution < self.step:
            raise ValueError(f"resolution is {self.resolution} and step is {self.step}; the step must not be larger than the resolution.")
        if self.upscale and self.max_side < self.resolution:
            raise ValueError(f"max_side is {self.max_side} and resolution is {self.resolution}; max_side must be at least the resolution.")


@dataclass(frozen=True)
class Placement:
    """The picture scaled to `scaled`, then `bucket` cut out of it at `crop` (left, top)."""

    bucket: tuple[int, int]
    scaled: tuple[int, int]
    crop: tuple[int, int]


@lru_cache(maxsize=16)
def kohya(resolution: int, min_side: int = 256, max_side: int = 2048, step: int = 64) -> tuple[tuple[int, int], ...]:
    """kohya's list of buckets: the largest multiples of step within resolution**2 pixels, sorted."""
    square = resolution // step * step
    sizes = {(square, square)}
    for width in range(min_side, max_side + 1, step):
        height = min(max_side, resolution**2 // width // step * step)
        if height >= min_side:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def assign(size: tuple[int, int], settings: BucketSettings) -> Placement:
    """Where a picture of this size goes. ValueError when it is too small to train on."""
    if settings.upscale:
        return cover(size, kohya(settings.resolution, settings.min_side, settings.max_side, settings.step))
    return shrink(size, settings.resolution, settings.step)


def cover(size, buckets) -> Placement:
    """kohya's default: the bucket of its own size, else of the nearest aspect ratio (the first of equals), scaled to cover it."""
    width, height = size
    ratio = width / height
    bucket = tuple(size) if tuple(size) in buckets else min(buckets, key=lambda b: abs(b[0] / b[1] - ratio))
    scale = bucket[1] / height if ratio > bucket[0] / bucket[1] else bucket[0] / width
    return centred(bucket, (half_up(width * scale), half_up(height * scale)))


def shrink(size, resolution: int, step: int) -> Placement:
    """kohya's bucket_no_upscale: scaled down to resolution**2 pixels when larger, then cropped to multiples of step."""
    scaled = tuple(size) if size[0] * size[1] <= resolution**2 else shrunk(size, resolution, step)
    bucket = scaled[0] // step * step, scaled[1] // step * step
    if 0 in bucket:
        raise ValueError(f"an image of {size[0]}x{size[1]} px does not fill one step of {step} px. "
                         "Turn upscale on, choose a smaller step, or take the image out.")
    return centred(bucket, scaled)


def shrunk(size, resolution, step):
    """(width, height) of a too large picture: one side is a multiple of step, the one that keeps the aspect ratio better."""
    ratio = size[0] / size[1]
    width = half_up(math.sqrt(resolution**2 * ratio)) // step * step
    height = half_up(resolution**2 / math.sqrt(resolution**2 * ratio)) // step * step
    by_width = aspect(width, half_up(width / ratio) // step * step)
    by_height = aspect(half_up(height * ratio) // step * step, height)
    if abs(by_width - ratio) < abs(by_height - ratio):
        return width, half_up(width / ratio)
    return half_up(height * ratio), height


def aspect(width, height) -> float:
    return width / height if height else math.inf


def half_up(value: float) -> int:
    return int(value + 0.5)


def centred(bucket, scaled) -> Placement:
    return Placement(tuple(bucket), tuple(scaled), ((scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2))


def fit(image: Image.Image, placement: Placement) -> Image.Image:
    """The picture as its bucket shows it."""
    if image.size != placement.scaled:
        smaller = placement.scaled[0] <= image.width
        image = image.resize(placement.scaled, Image.Resampling.LANCZOS if smaller else Image.Resampling.BICUBIC)
    left, top = placement.crop
    return image.crop((left, top, left + placement.bucket[0], top + placement.bucket[1]))
