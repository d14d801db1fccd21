"""The same image more than once: saved anew, resized, brightened, mirrored, or hardly changed.

Images are compared by a 64-bit perceptual hash of their coarse shapes (Zauner 2010, as ImageHash computes it), by
their coarse colours, and by features of a vision model where one is given. Groups are transitive: a copy of a copy
belongs to the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...settings import Settings, choice_field, number_field, switch_field
from ..contact_sheet import BAD_COLOUR, GOOD_COLOUR, WARN_COLOUR, SheetTile, make_thumbnail
from ..encoded import EncodedDataset
from ..image_scan import DEFAULT_SCAN, ScanOptions, scan_images
from ..readers import make_printable
from ..records import ImageDataset, ImageRecord
from .perceptual_hash import ImageSignature, colour_distance, compute_image_signature, popcount
from .sharpness import estimate_enlargement, tile_sharpness

MIN_GREY_SPREAD = 2.0  # grey levels of spread; below it a hash is only noise
MAX_COLOUR_DISTANCE = 15.0  # mean distance in a*b*; the same shapes in other colours are another image
COMPARISON_BLOCK = 1024
FLAG_COPIES, DROP_COPIES = "flag", "drop"
KEEP_OWN_CAPTIONS, ADD_COPY_CAPTIONS = "keep its own", "add those of the copies"


@dataclass(frozen=True, kw_only=True)
class DuplicateSettings(Settings):
    """What counts as the same image, and what happens to the copies."""

    duplicates: str = choice_field(
        DROP_COPIES,
        (DROP_COPIES, FLAG_COPIES),
        "drop: keep only the best of each group. flag: keep all and mark the copies.",
    )
    max_bits: int = number_field(
        10,
        0,
        20,
        "Images whose hashes differ in at most this many of 64 bits are duplicates. 15 also finds slight crops.",
        unit="bits",
    )
    mirrored: bool = switch_field(True, "Treat mirror images as duplicates.")
    min_cosine: float = number_field(
        0.95,
        0.5,
        1.0,
        "With clip_vision: images whose features are at least this similar are duplicates, even if one is a crop "
        "of the other.",
        step=0.005,
    )
    captions: str = choice_field(
        KEEP_OWN_CAPTIONS,
        (KEEP_OWN_CAPTIONS, ADD_COPY_CAPTIONS),
        "Whether the image that stays also receives the captions of its copies, as alternatives.",
    )


@dataclass(frozen=True)
class DuplicatePair:
    """Records first < second that are the same image."""

    first: int
    second: int
    reason: str


@dataclass(frozen=True)
class DuplicateGroup:
    """Records that are one image; `copies` are copies of `best`. Indices into the dataset."""

    best: int
    copies: tuple[int, ...]
    reasons: dict[int, str]  # of each copy: the figure that ties it to the group


# -- recognising -------------------------------------------------------------------------------------------------------


def find_hash_pairs(prints: Sequence[ImageSignature], limit: int, mirrored: bool = True) -> list[DuplicatePair]:
    """The pairs at most `limit` bits apart, plain images and other colours left out."""
    if len(prints) < 2:
        return []
    plain, flipped = (np.array([getattr(p, name) for p in prints], np.uint64) for name in ("hash", "mirrored"))
    telling = np.array([p.grey_spread >= MIN_GREY_SPREAD for p in prints])
    found = []
    for way, other in (("", plain), ("mirrored, ", flipped))[: 1 + mirrored]:
        for first, second, apart in iterate_close_hashes(plain, other, limit, telling):
            if colour_distance(prints[first], prints[second], bool(way)) < MAX_COLOUR_DISTANCE:
                found.append((apart, DuplicatePair(first, second, f"{way}{apart} bits <= {limit}")))
    best = {}
    for _, pair in sorted(found, key=lambda pair: pair[0]):
        best.setdefault((pair.first, pair.second), pair)
    return [best[key] for key in sorted(best)]


def iterate_close_hashes(hashes, others, limit, telling) -> Iterable[tuple[int, int, int]]:
    """(i, j, bits) with i < j, block by block so that memory stays flat."""
    for top in range(0, len(hashes), COMPARISON_BLOCK):
        apart = popcount(hashes[top : top + COMPARISON_BLOCK, None] ^ others[None, top:])
        rows, columns = np.nonzero(apart <= limit)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            if row < column and telling[top + row] and telling[top + column]:
                yield top + row, top + column, int(apart[row, column])


def find_feature_pairs(features: np.ndarray | None, least: float) -> list[DuplicatePair]:
    """The pairs of normalised features (n, d) with a cosine of at least `least`; rows of zeros are unknown."""
    if features is None:
        return []
    found = []
    for top in range(0, len(features), COMPARISON_BLOCK):
        cosine = features[top : top + COMPARISON_BLOCK] @ features[top:].T
        for row, column in np.argwhere(cosine >= least).tolist():
            if row < column:
                found.append(DuplicatePair(top + row, top + column, f"cosine {cosine[row, column]:.3f} >= {least:g}"))
    return found


def find_identical_files(records: Sequence[ImageRecord]) -> list[DuplicatePair]:
    """The same bytes, cut out at the same place."""
    first, found = {}, []
    for index, record in enumerate(records):
        before = first.setdefault((record.id, record.crop), index)
        if before != index:
            found.append(DuplicatePair(before, index, "the same file"))
    return found


def group_duplicates(pairs: Iterable[DuplicatePair], order) -> list[DuplicateGroup]:
    """Groups of everything that is tied together, in the order of their best members. order(index): the smallest is the
    best."""
    parent, why = {}, {}

    def root(index):
        while parent.setdefault(index, index) != index:
            parent[index] = index = parent[parent[index]]
        return index

    for pair in pairs:
        why.setdefault(pair.first, []).append(pair)
        why.setdefault(pair.second, []).append(pair)
        parent[max(root(pair.first), root(pair.second))] = min(root(pair.first), root(pair.second))
    members = {}
    for index in parent:
        members.setdefault(root(index), []).append(index)
    groups = []
    for found in members.values():
        best, *rest = sorted(found, key=order)
        groups.append(DuplicateGroup(best, tuple(rest), {index: duplicate_reason(why[index], best) for index in rest}))
    return sorted(groups, key=lambda group: group.best)


def duplicate_reason(pairs, best) -> str:
    """The figure against the best one, else against whoever ties this one to the group."""
    return next((pair.reason for pair in pairs if best in (pair.first, pair.second)), pairs[0].reason)


# -- choosing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyQuality:
    """What the choice among copies needs to know of one image."""

    signature: ImageSignature
    megapixels: float  # megapixels that are really there
    sharpness: float


def measure_copy_quality(record: ImageRecord, image: Image.Image, mask=None) -> CopyQuality:
    grey = image.convert("L")
    factor = estimate_enlargement(np.asarray(grey))
    grey.thumbnail((512, 512), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return CopyQuality(
        compute_image_signature(image),
        effective_megapixels(image.size, factor),
        tile_sharpness(np.asarray(grey, np.float32)),
    )


def effective_megapixels(size, factor) -> float:
    """Megapixels, less what an enlargement added. A factor under 1.5 is within its own error, a third; above, that
    third goes against the image, so that a blown-up copy never beats its original."""
    return size[0] * size[1] / 1e6 / ((4 / 3 * factor) ** 2 if factor >= 1.5 else 1.0)


def copy_preference_key(record: ImageRecord, detail: float, sharpness: float, index: int):
    """Sort key: the largest first, then the sharpest, then those with captions, then the earliest. Sharpness counts in
    steps of 1.4: the noise of a JPEG is no detail."""
    return -round(detail, 2), -round(2 * math.log2(1 + sharpness)), not any(record.captions), index


@dataclass(frozen=True)
class DeduplicationResult:
    dataset: ImageDataset
    groups: tuple[tuple[ImageRecord, tuple[tuple[ImageRecord, str], ...]], ...]  # (kept, ((copy, why), ...))
    broken: tuple[tuple[str, str], ...]  # (path, reason)

    def report(self) -> str:
        copies = sum(len(rest) for _, rest in self.groups)
        lines = [f"{copies} copies of {len(self.groups)} images found; {len(self.dataset)} images go on."]
        for best, rest in self.groups:
            lines.append(
                f"- {printable_file_name(best)}: "
                + "; ".join(f"{printable_file_name(copy)} ({why})" for copy, why in rest)
            )
        return "\n".join(
            lines
            + [f"- {make_printable(Path(path).name)} could not be compared: {reason}" for path, reason in self.broken]
        )


def deduplicate(
    dataset: ImageDataset, settings: DuplicateSettings, options: ScanOptions = DEFAULT_SCAN
) -> DeduplicationResult:
    """The dataset with one image of each group, the copies dropped or flagged. Images that cannot be read stay as
    they are."""
    seen, features, broken = scan_images(dataset.records, measure_copy_quality, options)
    known = [index for index, value in enumerate(seen) if value is not None]
    prints = [seen[index].signature for index in known]
    pairs = [
        replace(pair, first=known[pair.first], second=known[pair.second])
        for pair in find_hash_pairs(prints, settings.max_bits, settings.mirrored)
    ]
    groups = group_duplicates(
        [*find_identical_files(dataset.records), *pairs, *find_feature_pairs(features, settings.min_cosine)],
        lambda index: copy_preference_key(
            dataset[index], *((seen[index].megapixels, seen[index].sharpness) if seen[index] else (0.0, 0.0)), index
        ),
    )
    return DeduplicationResult(
        drop_or_flag_copies(dataset, groups, settings),
        tuple(resolve_group_records(dataset, group) for group in groups),
        tuple((dataset[index].path, why) for index, why in sorted(broken.items())),
    )


def group_near_duplicates(dataset: ImageDataset, options: ScanOptions) -> dict[str, str]:
    """Names of groups of near-duplicates, by record id: `groups` for split."""
    names = {}
    for best, copies in deduplicate(dataset, DuplicateSettings(duplicates=FLAG_COPIES), options).groups:
        ids = [best.id, *(copy.id for copy, _ in copies)]
        names |= dict.fromkeys(ids, min(ids))
    return names


def duplicate_group_names(data: EncodedDataset, options: ScanOptions) -> list[str]:
    """For each image the name of the group of near-duplicates it belongs to; what has no file is known by its content
    alone."""
    records = [ImageRecord(item.id, item.path, item.bucket or (1, 1)) for item in data.items if item.path]
    names = group_near_duplicates(ImageDataset(tuple(records)), options) if records else {}
    return [names.get(item.id, item.id) for item in data.items]


def resolve_group_records(dataset, group):
    return dataset[group.best], tuple((dataset[index], group.reasons[index]) for index in group.copies)


def drop_or_flag_copies(
    dataset: ImageDataset, groups: Sequence[DuplicateGroup], settings: DuplicateSettings
) -> ImageDataset:
    records, dropped = list(dataset.records), {}
    for group in groups:
        best = records[group.best]
        if settings.captions == ADD_COPY_CAPTIONS:
            captions = [caption for index in (group.best, *group.copies) for caption in dataset[index].captions]
            records[group.best] = replace(best, captions=tuple(dict.fromkeys(captions)))
        for index in group.copies:
            flag = f"duplicate (of {printable_file_name(best)}, {group.reasons[index]})"
            dropped[index] = flag
            records[index] = replace(records[index], flags=tuple(dict.fromkeys((*records[index].flags, flag))))
    if settings.duplicates == FLAG_COPIES:
        return replace(dataset, records=tuple(records))
    kept = tuple(record for index, record in enumerate(records) if index not in dropped)
    return ImageDataset(kept, (*dataset.skipped, *((dataset[index].path, dropped[index]) for index in sorted(dropped))))


def printable_file_name(record: ImageRecord) -> str:
    return make_printable(Path(record.path).name)


def make_duplicate_tiles(found: DeduplicationResult, limit: int = 60) -> list[SheetTile]:
    """The groups one after another: what stays in green, its copies beside it."""
    result = []
    for number_, (best, rest) in enumerate(found.groups, 1):
        result.append(make_duplicate_tile(best, f"{number_}: stays", GOOD_COLOUR))
        result += [
            make_duplicate_tile(
                copy, f"{number_}: {why}", BAD_COLOUR if copy not in found.dataset.records else WARN_COLOUR
            )
            for copy, why in rest
        ]
        if len(result) >= limit:
            break
    return result[:limit]


def make_duplicate_tile(record: ImageRecord, line: str, colour: str) -> SheetTile:
    try:
        image = make_thumbnail(record)
    except (ValueError, OSError):  # gone or broken: its group says so in words
        image = Image.new("RGB", (8, 8), "#000000")
    return SheetTile(
        image, (line, f"{record.cropped_size[0]}x{record.cropped_size[1]} {printable_file_name(record)}"), colour
    )
