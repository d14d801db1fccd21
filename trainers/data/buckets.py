"""Which size each image is trained at, and the image fitted to its bucket. Sizes are (width, height) in pixels.

`tight` takes for each image the multiples of step that hold most of it, as ai-toolkit does, and merges buckets that
hold too few images. `kohya` keeps to kohya-ss/sd-scripts (make_bucket_resolutions and BucketManager), so that a
dataset that was tuned there falls into the same buckets here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..settings import Settings, choice_field, number_field, switch_field
from .records import ControlImage, ImageRecord

MIN_BUCKET_STEP = 8
TIGHT_RULES, KOHYA_RULES = BUCKET_RULES = ("tight", "kohya")


@dataclass(frozen=True, kw_only=True)
class BucketSettings(Settings):
    """The sizes that images are trained at. An image keeps its aspect ratio; what does not fit is cropped at the
    centre."""

    resolution: int = number_field(
        1024,
        16,
        8192,
        "Images are trained at about resolution x resolution pixels in total and keep their aspect ratio.",
        unit="px",
        step=8,
    )
    upscale: bool = switch_field(False, "Enlarge small images to the resolution. Off: train them at their own size.")
    step: int = number_field(
        64,
        MIN_BUCKET_STEP,
        512,
        "Sides are multiples of this. A smaller value crops less and makes more buckets.",
        unit="px",
        step=8,
        advanced=True,
    )
    min_side: int = number_field(
        256, 8, 8192, "With kohya's rules and upscale: the shortest side of a bucket.", unit="px", step=8, advanced=True
    )
    max_side: int = number_field(
        2048,
        8,
        16384,
        "With kohya's rules and upscale: the longest side of a bucket.",
        unit="px",
        step=8,
        advanced=True,
    )
    rules: str = choice_field(
        TIGHT_RULES,
        BUCKET_RULES,
        "tight: keeps each image as large as possible with the least cropped. kohya: exactly the buckets of "
        "sd-scripts.",
    )
    merge: int = number_field(
        2,
        1,
        64,
        "With tight rules: buckets with fewer images than this are merged into the nearest one. 1 never merges.",
        unit="images",
        advanced=True,
    )
    max_crop: float = number_field(
        0.12,
        0.0,
        0.9,
        "Largest share of an image that merging may crop or shrink away. Images that would lose more keep their "
        "own bucket.",
        step=0.01,
        advanced=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.resolution < self.step:
            raise ValueError(
                f"resolution is {self.resolution} and step is {self.step}; the step must not be larger than the "
                "resolution."
            )
        if self.rules == KOHYA_RULES and self.upscale and self.max_side < self.resolution:
            raise ValueError(
                f"max_side is {self.max_side} and resolution is {self.resolution}; max_side must be at least the "
                "resolution."
            )


START, UNIFORM, CHUNKS = CLIP_SAMPLING = ("start", "uniform", "chunks")
REFUSE_SHORT, LEAVE_SHORT_OUT = SHORT_VIDEOS = ("error", "leave out")


@dataclass(frozen=True, kw_only=True)
class ClipSettings(Settings):
    """Which frames of a video are trained on."""

    frames: int = number_field(
        33,
        1,
        1025,
        "Length of a clip. Wan, HunyuanVideo and CogVideoX take 4n + 1 frames (33, 49, 81), LTX 8n + 1 (33, 97). 1 "
        "makes images.",
        unit="frames",
    )
    fps: float = number_field(
        16.0,
        0.0,
        240.0,
        "Frames that are taken of a second. Wan 2.1 and 2.2: 16 (5B: 24); HunyuanVideo and LTX: 24; CogVideoX: 8. 0: "
        "the video's own rate.",
        unit="frames per second",
        step=1.0,
    )
    sampling: str = choice_field(
        START,
        CLIP_SAMPLING,
        "start: the first seconds of each video. uniform: as many clips as 'clips' says, evenly spread. chunks: the "
        "whole video in clips, one after the other.",
    )
    clips: int = number_field(1, 1, 1000, "With uniform: clips taken of each video.", unit="clips")
    short_videos: str = choice_field(
        REFUSE_SHORT,
        SHORT_VIDEOS,
        "What to do with videos that are shorter than a clip, or have fewer frames a second. leave out: they are "
        "listed.",
        advanced=True,
    )


@dataclass(frozen=True)
class BucketPlacement:
    """The image scaled to `scaled`, then `bucket` cut out of it at `crop` (left, top)."""

    bucket: tuple[int, int]
    scaled: tuple[int, int]
    crop: tuple[int, int]


@lru_cache(maxsize=16)
def make_bucket_resolutions(
    resolution: int, min_side: int = 256, max_side: int = 2048, step: int = 64
) -> tuple[tuple[int, int], ...]:
    """kohya's list of buckets: the largest multiples of step within resolution**2 pixels, sorted."""
    square = resolution // step * step
    sizes = {(square, square)}
    for width in range(min_side, max_side + 1, step):
        height = min(max_side, resolution**2 // width // step * step)
        if height >= min_side:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def place_records(
    records: Iterable[ImageRecord], settings: BucketSettings
) -> list[tuple[ImageRecord, BucketPlacement]]:
    """Every record with its placement, the same for the same records. ValueError that tells of all that have none.

    A record that carries a bucket goes there, scaled to cover it."""
    placed, misfits = [], []
    for record in records:
        try:
            placed.append((record, initial_placement(record, settings)))
        except ValueError as error:
            misfits.append(f"{Path(record.path).name}: {error}")
    if misfits:
        raise ValueError(
            f"{len(misfits)} of {len(placed) + len(misfits)} images cannot be placed. " + " ".join(misfits[:3])
        )
    return merge_small_buckets(placed, settings) if settings.rules == TIGHT_RULES and settings.merge > 1 else placed


def initial_placement(record: ImageRecord, settings: BucketSettings) -> BucketPlacement:
    """Where the record goes when no bucket is merged."""
    return (
        covering_placement(record.cropped_size, record.bucket)
        if record.bucket
        else choose_placement(record.cropped_size, settings)
    )


def choose_placement(size: tuple[int, int], settings: BucketSettings) -> BucketPlacement:
    """Where an image of this size goes. ValueError when it is too small to train on."""
    if settings.rules == TIGHT_RULES:
        return tight_placement(size, settings.resolution, settings.step, settings.upscale)
    if settings.upscale:
        return kohya_placement(
            size, make_bucket_resolutions(settings.resolution, settings.min_side, settings.max_side, settings.step)
        )
    return kohya_no_upscale_placement(size, settings.resolution, settings.step)


# -- tight: one bucket per image, then few buckets -------------------------------------------------------------------


def tight_placement(size, resolution: int, step: int, upscale: bool = False) -> BucketPlacement:
    """The sides that the image would have at resolution**2 pixels, each rounded down or up to a multiple of step: of
    the four the largest within that area that cuts off less than a step and, without upscale, enlarges nothing."""
    scale = math.sqrt(resolution**2 / (size[0] * size[1]))
    wanted = [side * (scale if upscale else min(1.0, scale)) for side in size]
    sides = [(int(side // step * step), math.ceil(side / step) * step) for side in wanted]
    buckets = [
        (w, h)
        for w in sides[0]
        for h in sides[1]
        if 0 < w * h <= resolution**2 and (upscale or (w <= size[0] and h <= size[1]))
    ]
    fitting = [bucket for bucket in buckets if bucket_overhang(size, bucket) < step]
    if not fitting:
        raise ValueError(format_too_small_image(size, step, upscale))
    return covering_placement(
        size, max(fitting, key=lambda bucket: (bucket[0] * bucket[1], -bucket_overhang(size, bucket), bucket))
    )


def bucket_overhang(size, bucket) -> float:
    """Pixels that an image scaled to cover the bucket is longer than it, on its longer side."""
    scale = covering_scale(size, bucket)
    return max(size[0] * scale - bucket[0], size[1] * scale - bucket[1])


def merge_small_buckets(
    placed: list[tuple[ImageRecord, BucketPlacement]], settings: BucketSettings
) -> list[tuple[ImageRecord, BucketPlacement]]:
    """The same records; those of buckets with fewer than settings.merge images go to the bucket that costs them
    least, the smallest buckets first. Who has none within max_crop stays, and so does who came with a bucket of its
    own."""
    result, members = list(placed), {}
    for index, (_, placement) in enumerate(placed):
        members.setdefault(placement.bucket, []).append(index)
    for bucket in sorted(members, key=lambda b: (len(members[b]), b)):
        targets = {}  # by size: images of one size stay together, as pairs must
        for index in list(members[bucket]) if len(members[bucket]) < settings.merge else ():
            record, own = placed[index]
            if record.bucket is None and record.cropped_size not in targets:
                targets[record.cropped_size] = nearest_bucket(
                    record.cropped_size, own.bucket, bucket, members, settings
                )
            if record.bucket is None and (target := targets[record.cropped_size]):
                result[index] = record, covering_placement(record.cropped_size, target)
                members[bucket].remove(index)
                members[target].append(index)
    return result


def nearest_bucket(
    size, own, left, members: dict[tuple[int, int], list[int]], settings: BucketSettings
) -> tuple[int, int] | None:
    """The inhabited bucket beside `left` that loses least of the image; of equals the fuller one."""
    others = ((bucket, len(inside)) for bucket, inside in members.items() if inside and bucket != left)
    losses = ((merge_loss(size, own, bucket, settings.upscale), -count, bucket) for bucket, count in others)
    least = min(losses, default=(math.inf, 0, left))
    return least[2] if least[0] <= settings.max_crop else None


def merge_loss(size, own, bucket, upscale: bool) -> float:
    """The share of an image that is cut off in this bucket, or the share of its own bucket's pixels that it gives up,
    whichever is more. Infinite where it would have to be enlarged."""
    scale = covering_scale(size, bucket)
    if scale > 1 and not upscale:
        return math.inf
    area = bucket[0] * bucket[1]
    return max(1 - area / (size[0] * size[1] * scale**2), 1 - area / (own[0] * own[1]))


# -- kohya -------------------------------------------------------------------------------------------------------------


def kohya_placement(size, buckets) -> BucketPlacement:
    """kohya's default: the bucket of its own size, else of the nearest aspect ratio (the first of equals), scaled to
    cover it."""
    ratio = size[0] / size[1]
    return covering_placement(
        size, tuple(size) if tuple(size) in buckets else min(buckets, key=lambda b: abs(b[0] / b[1] - ratio))
    )


def kohya_no_upscale_placement(size, resolution: int, step: int) -> BucketPlacement:
    """kohya's bucket_no_upscale: scaled down to resolution**2 pixels when larger, then cropped to multiples of step."""
    scaled = tuple(size) if size[0] * size[1] <= resolution**2 else kohya_downscaled_size(size, resolution, step)
    bucket = scaled[0] // step * step, scaled[1] // step * step
    if 0 in bucket:
        raise ValueError(format_too_small_image(size, step))
    return centred_placement(bucket, scaled)


def kohya_downscaled_size(size, resolution, step):
    """(width, height) of a too large image: one side is a multiple of step, the one that keeps the aspect ratio
    better."""
    ratio = size[0] / size[1]
    width = round_half_up(math.sqrt(resolution**2 * ratio)) // step * step
    height = round_half_up(resolution**2 / math.sqrt(resolution**2 * ratio)) // step * step
    by_width = aspect_ratio(width, round_half_up(width / ratio) // step * step)
    by_height = aspect_ratio(round_half_up(height * ratio) // step * step, height)
    if abs(by_width - ratio) < abs(by_height - ratio):
        return width, round_half_up(width / ratio)
    return round_half_up(height * ratio), height


def aspect_ratio(width, height) -> float:
    return width / height if height else math.inf


def round_half_up(value: float) -> int:
    return int(value + 0.5)


def format_too_small_image(size, step: int, upscale: bool = False) -> str:
    remedy = "Choose" if upscale else "Turn upscale on, choose"
    return (
        f"an image of {size[0]}x{size[1]} px does not fill one step of {step} px. {remedy} a smaller step, or take the "
        "image out."
    )


# -- both --------------------------------------------------------------------------------------------------------------


def covering_placement(size, bucket) -> BucketPlacement:
    """The image scaled so that it just covers the bucket, and the middle cut out."""
    scale = covering_scale(size, bucket)
    return centred_placement(
        bucket, (max(bucket[0], round_half_up(size[0] * scale)), max(bucket[1], round_half_up(size[1] * scale)))
    )


def covering_scale(size, bucket) -> float:
    return max(bucket[0] / size[0], bucket[1] / size[1])


def cropped_share(placement: BucketPlacement) -> float:
    """The share of the scaled image that is cut off."""
    (width, height), (whole_width, whole_height) = placement.bucket, placement.scaled
    return 1 - width * height / (whole_width * whole_height)


def centred_placement(bucket, scaled) -> BucketPlacement:
    return BucketPlacement(tuple(bucket), tuple(scaled), ((scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2))


def resize_and_crop(image: Image.Image, placement: BucketPlacement) -> Image.Image:
    """The image as its bucket shows it."""
    if image.size != placement.scaled:
        smaller = placement.scaled[0] <= image.width
        image = image.resize(placement.scaled, Image.Resampling.LANCZOS if smaller else Image.Resampling.BICUBIC)
    left, top = placement.crop
    return image.crop((left, top, left + placement.bucket[0], top + placement.bucket[1]))


def place_control(control: ControlImage, record: ImageRecord, placement: BucketPlacement, step: int) -> BucketPlacement:
    """How a control image is resized. One aligned with its image goes the way of its image, crop and all, so that both
    stay aligned. Another keeps its shape, at most at the area of the bucket and never enlarged, with sides that are
    multiples of `step` pixels; what is over is cut off evenly."""
    if record.is_aligned(control):
        return placement
    width, height = control.size
    scale = min(1.0, math.sqrt(placement.bucket[0] * placement.bucket[1] / (width * height)))
    wide, high = (max(step, int(side * scale + 1e-6) // step * step) for side in (width, height))
    cover = max(wide / width, high / height)
    scaled = max(wide, round(width * cover)), max(high, round(height * cover))
    return BucketPlacement((wide, high), scaled, ((scaled[0] - wide) // 2, (scaled[1] - high) // 2))
