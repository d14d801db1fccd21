"""What bucketing did to a dataset, in words and as a page: who is trained at which size, what is cut off, and who is alone there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw

from .buckets import TIGHT, BucketSettings, Placement, cropped, own_place, placements
from .records import Dataset, Record
from .sheets import EDGE, WARN, Tile, contact_sheet

BATCHES = (2, 3, 4, 6, 8, 12, 16)
NAMED = 12  # pictures of a kind that are named; the rest is counted
CELL, TILES = 144, 60
FILL, EMPTY = "#3b6ea5", "#2b2b2b"


@dataclass(frozen=True)
class Row:
    """One bucket and what lies in it."""

    bucket: tuple[int, int]
    pictures: int
    per_epoch: int  # with their repeats
    cut: float  # mean share that is cut off
    scales: tuple[float, float]  # least and most: above 1 is enlarged


@dataclass(frozen=True)
class Bucketed:
    """A dataset whose records carry their buckets, and how it came to that."""

    dataset: Dataset
    rows: tuple[Row, ...]  # the fullest first
    merged: tuple[tuple[Record, Placement, Placement], ...]  # (record, where it would have gone, where it goes)
    alone: tuple[tuple[Record, Placement], ...]  # in buckets with fewer pictures than were asked for
    enlarged: tuple[tuple[Record, float], ...]
    settings: BucketSettings


def bucketed(dataset: Dataset, settings: BucketSettings) -> Bucketed:
    """Every record gets its bucket by these settings; what it carried before is decided anew. ValueError for those without a place."""
    if not len(dataset):
        raise ValueError("The dataset has no images. Load a folder with images first.")
    placed = placements([replace(record, bucket=None) for record in dataset], settings)
    rows = summary(placed)
    few = {row.bucket for row in rows if row.pictures < settings.merge}
    own = [own_place(record, settings) for record, _ in placed]
    merged = tuple((record, before, place) for (record, place), before in zip(placed, own, strict=True) if before != place)
    alone = tuple(pair for pair in placed if pair[1].bucket in few)
    enlarged = tuple((record, scale(record, place)) for record, place in placed if scale(record, place) > 1)
    records = tuple(replace(record, bucket=place.bucket) for record, place in placed)
    return Bucketed(replace(dataset, records=records), rows, merged, alone, enlarged, settings)


def summary(placed: Sequence[tuple[Record, Placement]]) -> tuple[Row, ...]:
    """A row for every bucket, the fullest first."""
    inside: dict[tuple[int, int], list[tuple[Record, Placement]]] = {}
    for pair in placed:
        inside.setdefault(pair[1].bucket, []).append(pair)
    return tuple(row(bucket, inside[bucket]) for bucket in sorted(inside, key=lambda b: (-len(inside[b]), b)))


def row(bucket, members) -> Row:
    scales = [scale(record, place) for record, place in members]
    cut = fmean(cropped(place) for _, place in members)
    return Row(bucket, len(members), sum(record.repeats for record, _ in members), cut, (min(scales), max(scales)))


def scale(record: Record, place: Placement) -> float:
    """How much larger than itself the picture is trained, before it is cropped."""
    return max(place.scaled[0] / record.frame[0], place.scaled[1] / record.frame[1])


def left_over(rows: Sequence[Row], batch: int) -> int:
    """How many pictures of an epoch come in batches that are not full: a batch holds one bucket only."""
    return sum(row.per_epoch % batch for row in rows)


# -- in words -------------------------------------------------------------------------------------------------------------------


def report(result: Bucketed) -> str:
    rows, settings = result.rows, result.settings
    seen = sum(row.per_epoch for row in rows)
    head = f"{counted(len(result.dataset), 'picture')} in {counted(len(rows), 'bucket')}, {seen} per epoch"
    lines = [f"{head} ({settings.rules} rules, {settings.resolution} px, step {settings.step})", *map(told, rows)]
    if result.merged:
        lines.append(f"merged: {named(f'{name(r)} {size(a)} -> {size(b)} ({cropped(b):.1%} cut off)' for r, a, b in result.merged)}")
    if result.alone:
        why = f", nothing within max_crop {settings.max_crop:g} to join" if settings.rules == TIGHT and settings.merge > 1 else ""
        lines.append(f"fewer than {settings.merge} in their bucket{why}: {named(f'{name(r)} {size(p)}' for r, p in result.alone)}")
    if result.enlarged:
        lines.append(f"enlarged: {named(f'{name(record)} {factor:.2f}x' for record, factor in result.enlarged)}")
    return "\n".join([*lines, batch_hint(rows, seen)])


def told(row: Row) -> str:
    least, most = (f"{factor:.2f}" for factor in row.scales)
    scales = least if least == most else f"{least} to {most}"
    return (f"{row.bucket[0]}x{row.bucket[1]}: {counted(row.pictures, 'picture')}, {row.per_epoch} per epoch, "
            f"{row.cut:.1%} cut off, scaled by {scales}")


def batch_hint(rows: Sequence[Row], seen: int) -> str:
    shares = [f"{batch}: {left_over(rows, batch)}" for batch in BATCHES if batch <= max(row.per_epoch for row in rows)]
    if not shares:
        return "Every bucket holds one picture: only a batch of 1 is ever full."
    return f"In batches that are not full, of {seen} pictures an epoch, by batch size: {', '.join(shares)}"


def named(texts) -> str:
    texts = list(texts)
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return "; ".join(texts[:NAMED]) + more


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def name(record: Record) -> str:
    return Path(record.path).name


def size(place: Placement) -> str:
    return f"{place.bucket[0]}x{place.bucket[1]}"


# -- as a page ------------------------------------------------------------------------------------------------------------------


def bucket_sheet(result: Bucketed) -> Image.Image:
    """Every bucket drawn to one scale, filled as high as it is full beside the fullest; those with too few pictures in orange."""
    shown = result.rows[:TILES]
    longest = max(max(row.bucket) for row in shown)
    title = f"{len(result.dataset)} pictures, {len(result.rows)} buckets" + (f", the fullest {TILES}" if len(result.rows) > TILES else "")
    return contact_sheet((tile(row, result, longest) for row in shown), cell=CELL, title=title)


def tile(row: Row, result: Bucketed, longest: int) -> Tile:
    lines = (f"{row.bucket[0]} x {row.bucket[1]}", counted(row.pictures, "picture"), f"{row.cut:.1%} cut off")
    return Tile(drawn(row, result.rows[0].pictures, longest), lines, WARN if row.pictures < result.settings.merge else EDGE)


def drawn(row: Row, fullest: int, longest: int) -> Image.Image:
    width, height = (max(4, round(side * CELL / longest)) for side in row.bucket)
    picture = Image.new("RGB", (width, height), EMPTY)
    draw = ImageDraw.Draw(picture)
    draw.rectangle([0, height - max(1, round(height * row.pictures / fullest)), width, height], fill=FILL)
    draw.rectangle([0, 0, width - 1, height - 1], outline="#e6e6e6")
    return picture
