"""Contact sheets: many small images with a few words under each, on one page that a person can read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .image_files import one_large_image_at_a_time
from .metadata import format_count
from .readers import make_printable
from .records import WHITE, ImageRecord, open_image

SHEET_BACKGROUND, SHEET_TEXT_COLOUR, NEUTRAL_COLOUR = "#1e1e1e", "#e6e6e6", "#3a3a3a"
GOOD_COLOUR, WARN_COLOUR, BAD_COLOUR = "#4caf50", "#ffb300", "#e53935"
THUMBNAIL_GAP = 2.0  # what is resized with care is this much larger than the thumbnail
SHEET_GAP_PX, SHEET_LINE_PX, SHEET_FONT_PX = 10, 18, 14


@dataclass(frozen=True)
class SheetTile:
    """One image of a sheet. The colour frames it and marks its first line."""

    image: Image.Image
    lines: tuple[str, ...] = ()
    colour: str = NEUTRAL_COLOUR


def make_thumbnail(record: ImageRecord, side: int = 192, ground=WHITE) -> Image.Image:
    """The record's image, cropped as it is trained, at most side x side pixels and never enlarged."""
    scale = min(1.0, THUMBNAIL_GAP * side / max(record.cropped_size))
    with one_large_image_at_a_time(record.size):
        image = open_image(record, ground, scale)
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=THUMBNAIL_GAP)
    return image


def draw_contact_sheet(
    tiles: Iterable[SheetTile], columns: int | None = None, cell: int = 192, title: str = ""
) -> Image.Image:
    """RGB image of the tiles in reading order; about as wide as it is high when columns is not given. Each image
    keeps its shape inside a cell of cell x cell pixels; lines that are too long end in an ellipsis. ValueError without
    tiles."""
    tiles = list(tiles)
    if not tiles:
        raise ValueError("There are no images to show.")
    columns = columns or max(1, math.ceil(math.sqrt(len(tiles))))
    text = SHEET_LINE_PX * max(len(tile.lines) for tile in tiles)
    top = SHEET_LINE_PX + 2 * SHEET_GAP_PX if title else SHEET_GAP_PX
    width, height = cell + SHEET_GAP_PX, cell + text + 2 * SHEET_GAP_PX
    page = Image.new(
        "RGB", (SHEET_GAP_PX + columns * width, top + math.ceil(len(tiles) / columns) * height), SHEET_BACKGROUND
    )
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=SHEET_FONT_PX)
    draw.text(
        (SHEET_GAP_PX, SHEET_GAP_PX),
        truncate_to_width(title, page.width - 2 * SHEET_GAP_PX, draw, font),
        fill=SHEET_TEXT_COLOUR,
        font=font,
    )
    for index, tile in enumerate(tiles):
        left, upper = SHEET_GAP_PX + index % columns * width, top + index // columns * height
        image = tile.image.convert("RGB")
        image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        page.paste(image, (left + (cell - image.width) // 2, upper + (cell - image.height) // 2))
        draw.rectangle([left - 2, upper - 2, left + cell + 1, upper + cell + 1], outline=tile.colour, width=2)
        for row, line in enumerate(tile.lines):
            colour = tile.colour if row == 0 and tile.colour != NEUTRAL_COLOUR else SHEET_TEXT_COLOUR
            draw.text(
                (left, upper + cell + 4 + row * SHEET_LINE_PX),
                truncate_to_width(line, cell, draw, font),
                fill=colour,
                font=font,
            )
    return page


def truncate_to_width(line: str, width: int, draw: ImageDraw.ImageDraw, font) -> str:
    """The line itself, or its beginning and an ellipsis, at most width pixels wide."""
    line = " ".join(line.split())
    if draw.textlength(line, font=font) <= width:
        return line
    while line and draw.textlength(line + "...", font=font) > width:
        line = line[:-1]
    return line.rstrip() + "..."


def draw_dataset_sheet(
    dataset: Sequence[ImageRecord], page: int = 1, per_page: int = 24, cell: int = 192
) -> Image.Image:
    """One page of a dataset: each image with its name, size, repeats, split, caption and flags. An image that cannot
    be opened any more says so in its place. ValueError when there is no such page."""
    pages = max(1, math.ceil(len(dataset) / per_page))
    if not len(dataset) or not 1 <= page <= pages:
        raise ValueError(
            f"page is {page}, and {len(dataset)} images at {per_page} a page fill {pages if len(dataset) else 0} pages."
        )
    first = (page - 1) * per_page
    records = [dataset[index] for index in range(first, min(first + per_page, len(dataset)))]
    title = f"{first + 1} to {first + len(records)} of {len(dataset)} images, page {page} of {pages}"
    return draw_contact_sheet([make_dataset_tile(record, cell) for record in records], cell=cell, title=title)


def make_dataset_tile(record: ImageRecord, cell: int) -> SheetTile:
    name, (width, height) = make_printable(Path(record.path).name), record.cropped_size
    facts = [
        f"{width}x{height}",
        *describe_frames(record),
        *([f"x{record.repeats}"] if record.repeats != 1 else []),
        *(["mask"] if record.mask else []),
        *([format_count(record.controls, "control image")] if record.controls else []),
        *([f"score {record.score:g}"] if record.score is not None else []),
        *([record.split] if record.split != "train" else []),
    ]
    more = f" (+{len(record.captions) - 1})" if len(record.captions) > 1 else ""
    caption = (record.captions[0] if record.captions else "(no caption)") + more
    try:
        image = (
            join_controls(make_thumbnail(record, cell), record, cell)
            if record.video is None
            else draw_strip(record, cell)
        )
    except (ValueError, OSError) as error:
        return SheetTile(
            Image.new("RGB", (cell, cell), BAD_COLOUR), (name, *wrap_tile_text(str(error), cell, 4)), BAD_COLOUR
        )
    return SheetTile(
        image,
        (name, " ".join(facts), *wrap_tile_text(caption, cell, 2), *record.flags[:2]),
        WARN_COLOUR if record.flags else NEUTRAL_COLOUR,
    )


def describe_frames(record: ImageRecord) -> list[str]:
    if record.video is None:
        return []
    from .clips import describe_length

    return [describe_length(record)]


def draw_strip(record: ImageRecord, cell: int) -> Image.Image:
    """The first, the middle and the last frame of a clip, one above the other where it is wide, else side by side."""
    from .videos import open_frames_at

    frames = list(open_frames_at(record, sorted({0, record.frames // 2, record.frames - 1})))
    is_wide = frames[0].width >= frames[0].height
    room = (cell - SHEET_GAP_PX * (len(frames) - 1)) // len(frames)
    strip = Image.new("RGB", (cell, cell), SHEET_BACKGROUND)
    for number, frame in enumerate(frames):
        frame.thumbnail((cell, room) if is_wide else (room, cell), Image.Resampling.LANCZOS)
        along, across = number * (room + SHEET_GAP_PX), (cell - (frame.width if is_wide else frame.height)) // 2
        strip.paste(frame, (across, along) if is_wide else (along, across))
    return strip


def join_controls(image: Image.Image, record: ImageRecord, cell: int) -> Image.Image:
    """The image with its control images before it, side by side in a cell."""
    if not record.controls:
        return image
    shown = [make_thumbnail(record.control_record(control), cell) for control in record.controls] + [image]
    width = (cell - SHEET_GAP_PX * (len(shown) - 1)) // len(shown)
    row = Image.new("RGB", (cell, cell), SHEET_BACKGROUND)
    for number, one in enumerate(shown):
        one.thumbnail((width, cell), Image.Resampling.LANCZOS)
        row.paste(one, (number * (width + SHEET_GAP_PX) + (width - one.width) // 2, (cell - one.height) // 2))
    return row


def wrap_tile_text(text: str, width: int, lines: int) -> list[str]:
    """The beginning of the text in lines that fit roughly; contact_sheet cuts what is still too long."""
    return textwrap.wrap(make_printable(text), max(8, width // 7), max_lines=lines, placeholder=" ...")
