"""What bucketing did to a dataset, in words and as a page: who is trained at which size, what is cut off, and who is
alone there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw

from .buckets import TIGHT_RULES, BucketPlacement, BucketSettings, cropped_share, initial_placement, place_records
from .contact_sheet import NEUTRAL_COLOUR, WARN_COLOUR, SheetTile, draw_contact_sheet
from .records import ImageDataset, ImageRecord

REPORTED_BATCH_SIZES = (2, 3, 4, 6, 8, 12, 16)
MAX_NAMED_IMAGES = 12  # images of a kind that are named; the rest is counted
BUCKET_CELL_PX, MAX_BUCKET_TILES = 144, 60
BUCKET_FILL_COLOUR, BUCKET_EMPTY_COLOUR = "#3b6ea5", "#2b2b2b"


@dataclass(frozen=True)
class BucketStats:
    """One bucket and what lies in it."""

    bucket: tuple[int, int]
    images: int
    per_epoch: int  # with their repeats
    mean_cropped_share: float  # mean share that is cut off
    scales: tuple[float, float]  # least and most: above 1 is enlarged


@dataclass(frozen=True)
class BucketingResult:
    """A dataset whose records carry their buckets, and how it came to that."""

    dataset: ImageDataset
    bucket_stats: tuple[BucketStats, ...]  # the fullest first
    merged: tuple[
        tuple[ImageRecord, BucketPlacement, BucketPlacement], ...
    ]  # (record, where it would have gone, where it goes)
    undersized: tuple[tuple[ImageRecord, BucketPlacement], ...]  # in buckets with fewer images than were asked for
    enlarged: tuple[tuple[ImageRecord, float], ...]
    settings: BucketSettings


def assign_buckets(dataset: ImageDataset, settings: BucketSettings) -> BucketingResult:
    """Every record gets its bucket by these settings; what it carried before is decided anew. ValueError for those
    without a placement."""
    if not len(dataset):
        raise ValueError("The dataset has no images. Load a folder with images first.")
    placed = place_records([replace(record, bucket=None) for record in dataset], settings)
    rows = collect_bucket_stats(placed)
    few = {row.bucket for row in rows if row.images < settings.merge}
    own = [initial_placement(record, settings) for record, _ in placed]
    merged = tuple(
        (record, before, placement)
        for (record, placement), before in zip(placed, own, strict=True)
        if before != placement
    )
    alone = tuple(pair for pair in placed if pair[1].bucket in few)
    enlarged = tuple(
        (record, training_scale(record, placement))
        for record, placement in placed
        if training_scale(record, placement) > 1
    )
    records = tuple(replace(record, bucket=placement.bucket) for record, placement in placed)
    return BucketingResult(replace(dataset, records=records), rows, merged, alone, enlarged, settings)


def collect_bucket_stats(placed: Sequence[tuple[ImageRecord, BucketPlacement]]) -> tuple[BucketStats, ...]:
    """A row for every bucket, the fullest first."""
    inside: dict[tuple[int, int], list[tuple[ImageRecord, BucketPlacement]]] = {}
    for pair in placed:
        inside.setdefault(pair[1].bucket, []).append(pair)
    return tuple(bucket_stats(bucket, inside[bucket]) for bucket in sorted(inside, key=lambda b: (-len(inside[b]), b)))


def bucket_stats(bucket, members) -> BucketStats:
    scales = [training_scale(record, placement) for record, placement in members]
    cut = fmean(cropped_share(placement) for _, placement in members)
    return BucketStats(
        bucket, len(members), sum(record.repeats for record, _ in members), cut, (min(scales), max(scales))
    )


def training_scale(record: ImageRecord, placement: BucketPlacement) -> float:
    """How much larger than itself the image is trained, before it is cropped."""
    return max(placement.scaled[0] / record.cropped_size[0], placement.scaled[1] / record.cropped_size[1])


def count_partial_batch_images(rows: Sequence[BucketStats], batch: int) -> int:
    """How many images of an epoch come in batches that are not full: a batch holds one bucket only."""
    return sum(row.per_epoch % batch for row in rows)


# -- in words ----------------------------------------------------------------------------------------------------------


def format_bucket_report(result: BucketingResult) -> str:
    rows, settings = result.bucket_stats, result.settings
    seen = sum(row.per_epoch for row in rows)
    head = (
        f"{format_counted_noun(len(result.dataset), 'image')} in {format_counted_noun(len(rows), 'bucket')}, {seen} "
        "per epoch"
    )
    lines = [
        f"{head} ({settings.rules} rules, {settings.resolution} px, step {settings.step})",
        *map(format_bucket_stats, rows),
    ]
    if result.merged:
        merged = (
            f"{record_file_name(record)} {format_bucket_size(before)} -> {format_bucket_size(after)} "
            f"({cropped_share(after):.1%} cut off)"
            for record, before, after in result.merged
        )
        lines.append(f"merged: {format_limited_list(merged)}")
    if result.undersized:
        why = (
            f", nothing within max_crop {settings.max_crop:g} to join"
            if settings.rules == TIGHT_RULES and settings.merge > 1
            else ""
        )
        lines.append(
            f"fewer than {settings.merge} in their bucket{why}: "
            f"{format_limited_list(f'{record_file_name(r)} {format_bucket_size(p)}' for r, p in result.undersized)}"
        )
    if result.enlarged:
        lines.append(
            "enlarged: "
            f"{format_limited_list(f'{record_file_name(record)} {factor:.2f}x' for record, factor in result.enlarged)}"
        )
    return "\n".join([*lines, format_batch_hint(rows, seen)])


def format_bucket_stats(row: BucketStats) -> str:
    least, most = (f"{factor:.2f}" for factor in row.scales)
    scales = least if least == most else f"{least} to {most}"
    return (
        f"{row.bucket[0]}x{row.bucket[1]}: {format_counted_noun(row.images, 'image')}, {row.per_epoch} per epoch, "
        f"{row.mean_cropped_share:.1%} cut off, scaled by {scales}"
    )


def format_batch_hint(rows: Sequence[BucketStats], seen: int) -> str:
    shares = [
        f"{batch}: {count_partial_batch_images(rows, batch)}"
        for batch in REPORTED_BATCH_SIZES
        if batch <= max(row.per_epoch for row in rows)
    ]
    if not shares:
        return "Every bucket holds one image: only a batch of 1 is ever full."
    return f"In batches that are not full, of {seen} images an epoch, by batch size: {', '.join(shares)}"


def format_limited_list(texts) -> str:
    texts = list(texts)
    more = f" and {len(texts) - MAX_NAMED_IMAGES} more" if len(texts) > MAX_NAMED_IMAGES else ""
    return "; ".join(texts[:MAX_NAMED_IMAGES]) + more


def format_counted_noun(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def record_file_name(record: ImageRecord) -> str:
    return Path(record.path).name


def format_bucket_size(placement: BucketPlacement) -> str:
    return f"{placement.bucket[0]}x{placement.bucket[1]}"


# -- as a page ---------------------------------------------------------------------------------------------------------


def draw_buckets_sheet(result: BucketingResult) -> Image.Image:
    """Every bucket drawn to one scale, filled as high as it is full beside the fullest; those with too few images in
    orange."""
    shown = result.bucket_stats[:MAX_BUCKET_TILES]
    longest = max(max(row.bucket) for row in shown)
    title = f"{len(result.dataset)} images, {len(result.bucket_stats)} buckets" + (
        f", the fullest {MAX_BUCKET_TILES}" if len(result.bucket_stats) > MAX_BUCKET_TILES else ""
    )
    return draw_contact_sheet(
        (make_bucket_tile(row, result, longest) for row in shown), cell=BUCKET_CELL_PX, title=title
    )


def make_bucket_tile(row: BucketStats, result: BucketingResult, longest: int) -> SheetTile:
    lines = (
        f"{row.bucket[0]} x {row.bucket[1]}",
        format_counted_noun(row.images, "picture"),
        f"{row.mean_cropped_share:.1%} cut off",
    )
    return SheetTile(
        draw_bucket_fill(row, result.bucket_stats[0].images, longest),
        lines,
        WARN_COLOUR if row.images < result.settings.merge else NEUTRAL_COLOUR,
    )


def draw_bucket_fill(row: BucketStats, fullest: int, longest: int) -> Image.Image:
    width, height = (max(4, round(side * BUCKET_CELL_PX / longest)) for side in row.bucket)
    image = Image.new("RGB", (width, height), BUCKET_EMPTY_COLOUR)
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, height - max(1, round(height * row.images / fullest)), width, height], fill=BUCKET_FILL_COLOUR)
    draw.rectangle([0, 0, width - 1, height - 1], outline="#e6e6e6")
    return image
