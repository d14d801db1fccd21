"""Collages made: images cropped, put into frames with their loss masks and captions, and kept on disk.

A frame's file name is a hash of everything that went into it, so an unchanged request draws nothing, and one that was
interrupted goes on where it stopped. One source image is open at a time. Sources are never touched.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ...files import read_json_object, write_bytes_atomically
from ...settings import compute_fingerprint
from ..contact_sheet import NEUTRAL_COLOUR, WARN_COLOUR, SheetTile, draw_contact_sheet, make_thumbnail
from ..quality.bars import detect_bars
from ..quality.colour import measure_contrast
from ..records import ImageDataset, ImageRecord, open_image, open_mask, sha1_hex
from .captions import combine_collage_captions, find_common_trigger
from .plan import (
    CAPTIONS_EMPTY,
    CONTRAST_DROP,
    CONTRAST_OFF,
    LAYOUT_SINGLE,
    Collage,
    CollageCell,
    CollagePlan,
    CollageSettings,
    plan_collages,
)

COLLAGE_VERSION = 1  # in every key: raise it when the same inputs would give other frames
LATENT_CELL_PX = 8  # px of a latent cell, for the feather
DECODE_ERRORS = (OSError, ValueError, SyntaxError, MemoryError)
FULL_FILL = 0.97  # a frame filled this far counts as full
SPARSE_FILL = 0.75  # a frame filled less is flagged
MAX_SHEET_COLLAGES = 24  # collages on the sheet
MAX_REPORT_LINES = 40  # images of one kind in the report
FRAME_OUTLINE_COLOUR = "#5a5a5a"  # around a frame on the sheet, whose ground is nearly that of the page
SUGGESTED_ASPECTS = (
    (1, 1),
    (9, 7),
    (7, 9),
    (3, 2),
    (2, 3),
    (7, 4),
    (4, 7),
    (12, 5),
    (5, 12),
)  # frames to suggest, of one area
CLIP_TOKEN_LIMITS, DEFAULT_TOKEN_LIMIT = (
    {"l": 75, "g": 75, "h": 75},
    512,
)  # tokens read at once by CLIP's encoders, and that T5 and its kin were trained with
MAX_MIX_REPEATS = 24  # at most this many repeats to reach the share of originals


@dataclass(frozen=True)
class CollageSource:
    """An image of the dataset as it goes into frames: bars cut off, contrast known."""

    record: ImageRecord
    dE: float | None = None
    untrimmed_size: tuple[int, int] | None = None  # its size with the bars that were cut off

    @property
    def name(self) -> str:
        return Path(self.record.path).name


@dataclass(frozen=True)
class CollageResult:
    """`dataset`: the collages, then the images that are also shown alone. `report`: what was done to every image,
    as text."""

    dataset: ImageDataset
    collages: tuple[ImageRecord, ...]
    report: str


def build_collages(
    dataset: ImageDataset,
    settings: CollageSettings,
    folder,
    report: Callable[[int, int, str], None] | None = None,
    check_interrupt: Callable[[], None] | None = None,
    tokens: Callable[[str], dict[str, int]] | None = None,
) -> CollageResult:
    """The collages of a dataset, as files below folder. Records of other splits than train go through untouched.

    report(done, total, text); check_interrupt() raises to stop, losing nothing; tokens(text) -> {encoder: count}."""
    work = CollageProgress(report or (lambda *_: None), check_interrupt or (lambda: None))
    training = [record for record in dataset if record.split == "train"]
    if not training:
        raise ValueError(
            f"The dataset has {len(dataset)} images, none of them for training. Load a folder with images first."
        )
    sources, lost = analyse_sources(training, settings, Path(folder) / "survey.json", work)
    made = plan_collages([source.record.cropped_size for source in sources], settings)
    if not made.collages:
        raise ValueError(format_nothing_fits(made, sources, lost, settings))
    target = Path(folder) / compute_fingerprint(COLLAGE_VERSION, dataset.fingerprint(), frame_pixel_settings(settings))
    frames = render_frames(made, sources, settings, target, work)
    trigger = settings.trigger.strip() or find_common_trigger([captions_or_tags(source.record) for source in sources])
    records = make_collage_records(frames, sources, settings, trigger)
    alone, often = mix_in_single_images(records, sources, made, settings)
    records = tuple(replace(record, repeats=record.repeats * often) for record in records)
    write_collages_json(target / "collages.json", frames, records, sources, made, settings)
    others = tuple(record for record in dataset if record.split != "train")
    gone = [*lost, *((sources[i].record.path, f"it {why}") for i, why in made.excluded if not alone)]
    result = ImageDataset((*records, *alone, *others), (*dataset.skipped, *gone))
    return CollageResult(
        result, records, format_collage_report(made, sources, lost, records, alone, settings, target, tokens)
    )


@dataclass(frozen=True)
class CollageProgress:
    """The counter that the screen sees, and the way out."""

    report: Callable[[int, int, str], None]
    check_interrupt: Callable[[], None]

    def track(self, things: Sequence, name: Callable):
        """Yields the things; before each one the run may be stopped, after each one the screen is told."""
        for done, thing in enumerate(things, 1):
            self.check_interrupt()
            yield thing
            self.report(done, len(things), name(thing))


def frame_pixel_settings(settings: CollageSettings) -> dict:
    """The settings that change pixels; with other captions or another mix the frames stay."""
    return {name: value for name, value in settings.to_dict().items() if name not in ("captions", "trigger", "mix")}


# -- looking at the images -------------------------------------------------------------------------------------------


def analyse_sources(
    records, settings: CollageSettings, file: Path, work: CollageProgress
) -> tuple[list[CollageSource], list[tuple[str, str]]]:
    """The images with their bars cut off and their contrast, and [(path, why)] of those that cannot be used. What was
    seen is kept."""
    if not settings.trim and settings.contrast == CONTRAST_OFF:
        return [CollageSource(record) for record in records], []
    seen = {}
    with suppress(ValueError):  # not there yet, or damaged: then all images are looked at again
        seen = read_json_object(file)
    known = len(seen)
    sources, lost = [], []
    try:
        for record in work.track(records, lambda record: f"looking at {Path(record.path).name}"):
            key = compute_fingerprint(
                COLLAGE_VERSION, record.pixels_id, record.crop, record.mask_id, settings.trim, settings.ground
            )
            if key not in seen:
                try:
                    seen[key] = analyse_image(record, settings)
                except DECODE_ERRORS as error:
                    lost.append((record.path, f"it cannot be opened: {error}"))
                    continue
            source = make_collage_source(record, **seen[key])
            if settings.contrast == CONTRAST_DROP and source.dE is not None and source.dE < settings.min_contrast:
                lost.append(
                    (
                        record.path,
                        f"its subject hardly differs from its background (dE {source.dE:.1f} < "
                        f"{settings.min_contrast:g})",
                    )
                )
            else:
                sources.append(source)
    finally:
        if len(seen) > known:
            write_bytes_atomically(file, json.dumps(seen).encode())
    return sources, lost


def analyse_image(record: ImageRecord, settings: CollageSettings) -> dict:
    """{"box": what is left without bars, or None, "dE": contrast of subject and background, or None}"""
    image, mask = open_image(record, settings.ground_rgb), open_mask(record)
    box = find_trim_box(image) if settings.trim else None
    if box:
        image, mask = image.crop(box), mask and mask.crop(box)
    found = measure_contrast(image, mask)
    return {"box": box, "dE": None if found is None else round(found.dE, 2)}


def make_collage_source(record: ImageRecord, box, dE) -> CollageSource:
    if box is None:
        return CollageSource(record, dE)
    left, top = record.crop[:2] if record.crop else (0, 0)
    crop = box[0] + left, box[1] + top, box[2] + left, box[3] + top
    return CollageSource(replace(record, crop=crop), dE, untrimmed_size=record.cropped_size)


def find_trim_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box inside plain bars at the edges, or None when there are none, or when hardly anything would be left.

    A single line is no bar. A bar's last line may be blurred into the image, and goes too."""
    rows = np.asarray(image.convert("RGB"))
    lines = rows.swapaxes(0, 1)
    sides = zip(detect_bars(rows), (lines, rows, lines[::-1], rows[::-1]), strict=True)
    left, top, right, bottom = (
        depth + is_bar_edge_blurred(inwards, depth) if depth > 1 else 0 for depth, inwards in sides
    )
    box = left, top, image.width - right, image.height - bottom
    if not any((left, top, right, bottom)) or box[2] - box[0] < image.width / 4 or box[3] - box[1] < image.height / 4:
        return None
    return box


def is_bar_edge_blurred(lines, depth: int) -> bool:
    """Whether the first line after a bar lies nearer to the bar's colour than half of the way to the line after it."""
    colour = np.median(lines[0], axis=0)
    here, after = (np.abs(lines[min(depth + i, len(lines) - 1)] - colour).mean() for i in (0, 1))
    return bool(here < after / 2)


# -- drawing the frames ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollageFrame:
    """A collage on disk. The same frame planned twice is one file that is seen twice."""

    collage: Collage
    image_path: Path
    mask_path: Path
    id: str
    mask_id: str
    repeats: int


def render_frames(
    made: CollagePlan, sources, settings: CollageSettings, target: Path, work: CollageProgress
) -> list[CollageFrame]:
    """Every frame of the plan as a PNG and its mask; what is there already is not drawn again."""
    wanted = Counter()
    collages = {}
    for collage in made.collages:
        key = frame_cache_key(collage, sources, settings)
        wanted[key] += 1
        collages[key] = collage
    return [
        write_frame_files(key, collages[key], wanted[key], sources, settings, target)
        for key in work.track(list(collages), lambda key: f"collage of {format_source_names(collages[key], sources)}")
    ]


def write_frame_files(key, collage, times, sources, settings, target: Path) -> CollageFrame:
    frame, mask = target / f"{key}.png", target / f"{key}.mask.png"
    if not (frame.is_file() and mask.is_file()):
        for file, image in zip((mask, frame), render_frame_and_mask(collage, sources, settings), strict=True):
            write_bytes_atomically(file, encode_png(image))
    return CollageFrame(collage, frame, mask, sha1_hex(frame.read_bytes()), sha1_hex(mask.read_bytes()), times)


def frame_cache_key(collage: Collage, sources, settings: CollageSettings) -> str:
    cells = []
    for cell in collage.cells:
        record = sources[cell.source].record
        cells.append(
            [record.pixels_id, record.crop, record.mask_id, record.mask == record.path, cell.box, cell.frame_box]
        )
    return compute_fingerprint(COLLAGE_VERSION, collage.frame, cells, settings.ground_rgb, settings.feather)


def render_frame_and_mask(collage: Collage, sources, settings: CollageSettings) -> tuple[Image.Image, Image.Image]:
    """(mask, image) of a frame: the mask is white where an image is learnt and black on the ground."""
    image = Image.new("RGB", collage.frame, settings.ground_rgb)
    mask = Image.new("L", collage.frame, 0)
    for cell in collage.cells:
        record = sources[cell.source].record
        part = resize_to_cell(open_image(record, settings.ground_rgb), cell, Image.Resampling.LANCZOS)
        image.paste(part, cell.frame_box[:2])
        mask.paste(
            feather_mask(load_cell_mask(record, cell), cell, collage.frame, settings.feather), cell.frame_box[:2]
        )
    return mask, image


def resize_to_cell(image: Image.Image, cell: CollageCell, how) -> Image.Image:
    return image.resize(cell.size, how, box=cell.box)


def load_cell_mask(record: ImageRecord, cell: CollageCell) -> Image.Image:
    mask = open_mask(record)
    return Image.new("L", cell.size, 255) if mask is None else resize_to_cell(mask, cell, Image.Resampling.BILINEAR)


def feather_mask(mask: Image.Image, cell: CollageCell, frame, cells: int) -> Image.Image:
    """The mask, rising in even steps over so many latent cells from each border that is not the frame's own."""
    if not cells:
        return mask
    left, top, right, bottom = cell.frame_box
    x = feather_ramp(right - left, cells, left > 0, right < frame[0])
    y = feather_ramp(bottom - top, cells, top > 0, bottom < frame[1])
    return Image.fromarray(np.rint(np.asarray(mask) * np.minimum(x[None], y[:, None])).astype(np.uint8))


def feather_ramp(length: int, cells: int, at_start: bool, at_end: bool) -> np.ndarray:
    """(length,) from 1 / (cells + 1) at a border to 1 inside."""
    steps = (np.arange(length) // LATENT_CELL_PX + 1) / (cells + 1)
    values = np.ones(length)
    if at_start:
        values = np.minimum(values, steps)
    return np.minimum(values, steps[::-1]) if at_end else values


def encode_png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=3)
    return data.getvalue()


# -- records -----------------------------------------------------------------------------------------------------------


def captions_or_tags(record: ImageRecord) -> tuple[str, ...]:
    """The captions of an image; its tags where it has no caption."""
    return record.captions or ((", ".join(record.tags),) if record.tags else ())


def make_collage_records(
    frames: list[CollageFrame], sources, settings: CollageSettings, trigger: str
) -> tuple[ImageRecord, ...]:
    records = []
    for frame in frames:
        captions = combine_collage_captions(
            frame.collage,
            [captions_or_tags(sources[cell.source].record) for cell in frame.collage.cells],
            settings.captions,
            trigger,
        )
        records.append(
            ImageRecord(
                id=frame.id,
                path=str(frame.image_path),
                size=frame.collage.frame,
                bucket=frame.collage.frame,
                captions=captions,
                mask=str(frame.mask_path),
                mask_id=frame.mask_id,
                repeats=frame.repeats,
                flags=collage_flags(frame.collage, sources, settings),
            )
        )
    return tuple(records)


def collage_flags(collage: Collage, sources, settings: CollageSettings) -> tuple[str, ...]:
    """What a person should know about this collage: little of the frame filled, images of low contrast."""
    found = [f"fill ({collage.fill:.2f} < {SPARSE_FILL})"] if collage.fill < SPARSE_FILL else []
    weak = (sources[cell.source] for cell in collage.cells if is_low_contrast(sources[cell.source], settings))
    return (*found, *(f"contrast (dE {source.dE:.1f} < {settings.min_contrast:g}, {source.name})" for source in weak))


def is_low_contrast(source: CollageSource, settings: CollageSettings) -> bool:
    return settings.contrast != CONTRAST_OFF and source.dE is not None and source.dE < settings.min_contrast


def mix_in_single_images(
    records, sources, made: CollagePlan, settings: CollageSettings
) -> tuple[tuple[ImageRecord, ...], int]:
    """(the images that are also shown alone, how often every collage is shown): whole repeats that come near the
    wanted share.

    Images that fit in no frame come on top; were they counted, a few collages would have to make up for many of
    them."""
    if not settings.mix:
        return (), 1
    framed = made.count_uses()
    alone = sum(source.record.repeats for i, source in enumerate(sources) if i in framed)
    times, often = find_mix_repeats(alone, sum(record.repeats for record in records), settings.mix)
    captions = {"captions": ("",)} if settings.captions == CAPTIONS_EMPTY else {}
    return tuple(replace(s.record, repeats=s.record.repeats * times, **captions) for s in sources), often


def find_mix_repeats(alone: int, together: int, share: float) -> tuple[int, int]:
    """(a, t), small, so that a * alone is about `share` of a * alone + t * together."""

    def off(pair):
        return abs(pair[0] * alone / (pair[0] * alone + pair[1] * together) - share)

    pairs = sorted(
        ((a, t) for a in range(1, MAX_MIX_REPEATS + 1) for t in range(1, MAX_MIX_REPEATS + 1)),
        key=lambda pair: (sum(pair), pair),
    )
    return next(
        (pair for pair in pairs if off(pair) <= 0.02), min(pairs, key=lambda pair: (round(off(pair), 3), sum(pair)))
    )


# -- what is said about it ---------------------------------------------------------------------------------------------


def write_collages_json(
    file: Path, frames: list[CollageFrame], records, sources, made: CollagePlan, settings: CollageSettings
):
    """Which image is where in which frame, beside the frames."""
    listed = []
    for frame, record in zip(frames, records, strict=True):
        cells = [
            {
                **source_provenance(sources[cell.source]),
                "box": cell.box,
                "scale": cell.scale,
                "place": cell.frame_box,
                "crop": cell.crop,
            }
            for cell in frame.collage.cells
        ]
        listed.append(
            {
                "file": frame.image_path.name,
                "mask": frame.mask_path.name,
                "id": frame.id,
                "frame": frame.collage.frame,
                "layout": frame.collage.layout,
                "fill": frame.collage.fill,
                "captions": record.captions,
                "repeats": record.repeats,
                "flags": record.flags,
                "cells": cells,
            }
        )
    left_out = [{**source_provenance(sources[i]), "why": why} for i, why in made.excluded]
    text = json.dumps(
        {"version": COLLAGE_VERSION, "settings": settings.to_dict(), "collages": listed, "left_out": left_out}, indent=1
    )
    if not file.is_file() or file.read_bytes() != text.encode():
        write_bytes_atomically(file, text.encode())


def source_provenance(source: CollageSource) -> dict:
    return {
        "id": source.record.id,
        "path": source.record.path,
        "picture_crop": source.record.crop,
        "contrast_dE": source.dE,
    }


def format_collage_report(
    made: CollagePlan, sources, lost, records, alone, settings: CollageSettings, target: Path, tokens
) -> str:
    """The report: counts first, then every image that something was done to."""
    used = len(sources) - len(made.excluded)
    together, single = sum(r.repeats for r in records), sum(r.repeats for r in alone)
    crops = made.crops
    full = sum(collage.fill >= FULL_FILL for collage in made.collages) / len(made.collages)
    lines = [
        f"{len(made.collages)} collages of {used} images, each used {format_times(settings.uses)}; "
        f"{len(sources) - used} fit in no frame, {len(lost)} cannot be used.",
        f"Frames: {', '.join(f'{count} of {name}' for name, count in count_frame_layouts(made).most_common())}.",
        f"Fill {made.fill:.2f} on average, {full:.0%} of the frames at least {FULL_FILL:.0%} full. Cut off "
        f"{sum(crops) / len(crops):.1%} on average, {crops[-1]:.1%} at most.",
        f"An epoch shows {together} collages"
        + (f" and {single} images alone ({single / (single + together):.0%})." if alone else "."),
    ]
    lines += suggest_frame_sizes(made, settings)
    where = "shown alone only" if alone else "left out"
    lines += format_limited_lines(where, [f"{sources[i].name} {why}" for i, why in made.excluded])
    lines += format_limited_lines("left out", [f"{Path(path).name}: {why}" for path, why in lost])
    lines += format_limited_lines(
        "bars cut off",
        [
            f"{s.name}, {format_dimensions(s.untrimmed_size)} to {format_dimensions(s.record.cropped_size)}"
            for s in sources
            if s.untrimmed_size
        ],
    )
    lines += format_limited_lines(
        "contrast",
        [f"{s.name} (dE {s.dE:.1f} < {settings.min_contrast:g})" for s in sources if is_low_contrast(s, settings)],
    )
    return "\n".join(
        [*lines, *format_long_caption_warnings(records, tokens), f"Files: {target} (collages.json lists every image)"]
    )


def format_limited_lines(what: str, lines: list[str]) -> list[str]:
    """The lines, each with its kind in front; of many of a kind the first ones and how many more there are."""
    more = [f"- {what}: {len(lines) - MAX_REPORT_LINES} more"] if len(lines) > MAX_REPORT_LINES else []
    return [f"- {what}: {line}" for line in lines[:MAX_REPORT_LINES]] + more


def format_dimensions(size) -> str:
    return f"{size[0]}x{size[1]}"


def format_times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def count_frame_layouts(made: CollagePlan) -> Counter:
    return Counter(f"{c.frame[0]}x{c.frame[1]} with {len(c.cells)} ({c.layout})" for c in made.collages)


def suggest_frame_sizes(made: CollagePlan, settings: CollageSettings) -> list[str]:
    """Other frames of the same area, when many images had to stay alone and would not have to in those."""
    lonely = sum(len(collage.cells) == 1 for collage in made.collages) / len(made.collages)
    if settings.frames or settings.layout == LAYOUT_SINGLE or lonely < 0.25:
        return []
    frames = ", ".join(f"{w}x{h}" for w, h in frames_of_similar_area((settings.width, settings.height), settings.step))
    sample = made.sizes[:300]
    other = plan_collages(sample, replace(settings, frames=frames))
    if not other.collages or sum(len(c.cells) == 1 for c in other.collages) / len(other.collages) > lonely - 0.1:
        return []
    return [
        f"{lonely:.0%} of the frames hold a single image, because no others fit beside it. With frames set to "
        f"{frames}, the fill would be {other.fill:.2f} with {len(sample) * settings.uses / len(other.collages):.1f} "
        "images per frame."
    ]


def frames_of_similar_area(frame, step: int) -> list[tuple[int, int]]:
    """Frames of about the same area, from square to 12:5, on the grid."""
    side, grid = (frame[0] * frame[1]) ** 0.5, max(step, 64 if min(frame) >= 512 else step)
    sizes = [
        (round(side * (a / b) ** 0.5 / grid) * grid, round(side * (b / a) ** 0.5 / grid) * grid)
        for a, b in SUGGESTED_ASPECTS
    ]
    return [size for size in dict.fromkeys(sizes) if min(size) >= 64]


def format_long_caption_warnings(records, tokens) -> list[str]:
    """Warnings for captions that are longer than a text encoder reads at once."""
    if tokens is None:
        return []
    counts: dict[str, list[int]] = {}
    for text in {caption for record in records for caption in record.captions}:
        for encoder, count in tokens(text).items():
            counts.setdefault(encoder, []).append(count)
    over = {
        encoder: [count for count in found if count > CLIP_TOKEN_LIMITS.get(encoder, DEFAULT_TOKEN_LIMIT)]
        for encoder, found in sorted(counts.items())
    }
    return [
        f"- captions: {len(found)} of {len(counts[encoder])} have more than the "
        f"{CLIP_TOKEN_LIMITS.get(encoder, DEFAULT_TOKEN_LIMIT)} tokens that {encoder} reads at once; the longest has "
        f"{max(found)}."
        for encoder, found in over.items()
        if found
    ]


def format_nothing_fits(made: CollagePlan, sources, lost, settings: CollageSettings) -> str:
    frames = ", ".join(f"{w}x{h}" for w, h in settings.frame_list)
    reasons = [f"{sources[i].name} {why}" for i, why in made.excluded[:3]] + [
        f"{Path(path).name}: {why}" for path, why in lost[:3]
    ]
    return (
        f"None of the {len(sources) + len(lost)} images can stand in a frame of {frames}: {'; '.join(reasons)}. "
        "Choose smaller frames, a larger max_crop or max_upscale, or another layout."
    )


def format_source_names(collage: Collage, sources) -> str:
    return ", ".join(sources[cell.source].name for cell in collage.cells)


def draw_collages_sheet(built: CollageResult, limit: int = MAX_SHEET_COLLAGES) -> Image.Image:
    """A contact sheet of the first collages, flagged ones first."""
    shown = sorted(built.collages, key=lambda record: not record.flags)[:limit]
    tiles = []
    for record in shown:
        size = f"{record.size[0]}x{record.size[1]}, seen {format_times(record.repeats)}"
        caption = record.captions[0] if record.captions else ""
        tiles.append(
            SheetTile(
                ImageOps.expand(make_thumbnail(record, 254), 1, FRAME_OUTLINE_COLOUR),
                (*record.flags[:1], size, caption),
                WARN_COLOUR if record.flags else NEUTRAL_COLOUR,
            )
        )
    return draw_contact_sheet(
        tiles,
        cell=256,
        title=f"{len(built.collages)} collages" + (f", {limit} shown" if len(built.collages) > limit else ""),
    )
