"""Contact sheets: many small pictures with a few words under each, on one page that a person can read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .readers import printable
from .records import WHITE, Record, open_image

PAPER, INK, EDGE = "#1e1e1e", "#e6e6e6", "#3a3a3a"
GOOD, WARN, BAD = "#4caf50", "#ffb300", "#e53935"
GAP, LINE, FONT = 10, 18, 14


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet. The colour frames it and marks its first line."""

    picture: Image.Image
    lines: tuple[str, ...] = ()
    colour: str = EDGE


def thumbnail(record: Record, side: int = 192, ground=WHITE) -> Image.Image:
    """The record's picture, cropped as it is trained, at most side x side pixels and never enlarged."""
    picture = open_image(record, ground)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return picture


def contact_sheet(tiles: Iterable[Tile], columns: int | None = None, cell: int = 192, title: str = "") -> Image.Image:
    """RGB picture of the tiles in reading order; about as wide as it is high when columns is not given. Each picture keeps its shape
    inside a cell of cell x cell pixels; lines that are too long end in an ellipsis. ValueError without tiles."""
    tiles = list(tiles)
    if not tiles:
        raise ValueError("There are no pictures to show.")
    columns = columns or max(1, math.ceil(math.sqrt(len(tiles))))
    text = LINE * max(len(tile.lines) for tile in tiles)
    top = LINE + 2 * GAP if title else GAP
    width, height = cell + GAP, cell + text + 2 * GAP
    page = Image.new("RGB", (GAP + columns * width, top + math.ceil(len(tiles) / columns) * height), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT)
    draw.text((GAP, GAP), fitted(title, page.width - 2 * GAP, draw, font), fill=INK, font=font)
    for index, tile in enumerate(tiles):
        left, upper = GAP + index % columns * width, top + index // columns * height
        picture = tile.picture.convert("RGB")
        picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        page.paste(picture, (left + (cell - picture.width) // 2, upper + (cell - picture.height) // 2))
        draw.rectangle([left - 2, upper - 2, left + cell + 1, upper + cell + 1], outline=tile.colour, width=2)
        for row, line in enumerate(tile.lines):
            colour = tile.colour if row == 0 and tile.colour != EDGE else INK
            draw.text((left, upper + cell + 4 + row * LINE), fitted(line, cell, draw, font), fill=colour, font=font)
    return page


def fitted(line: str, width: int, draw: ImageDraw.ImageDraw, font) -> str:
    """The line itself, or its beginning and an ellipsis, at most width pixels wide."""
    line = " ".join(line.split())
    if draw.textlength(line, font=font) <= width:
        return line
    while line and draw.textlength(line + "...", font=font) > width:
        line = line[:-1]
    return line.rstrip() + "..."


def overview(dataset: Sequence[Record], page: int = 1, per_page: int = 24, cell: int = 192) -> Image.Image:
    """One page of a dataset: each picture with its name, size, repeats, split, caption and flags. A picture that cannot be opened
    any more says so in its place. ValueError when there is no such page."""
    pages = max(1, math.ceil(len(dataset) / per_page))
    if not len(dataset) or not 1 <= page <= pages:
        raise ValueError(f"page is {page}, and {len(dataset)} pictures at {per_page} a page fill {pages if len(dataset) else 0} pages.")
    first = (page - 1) * per_page
    records = [dataset[index] for index in range(first, min(first + per_page, len(dataset)))]
    title = f"{first + 1} to {first + len(records)} of {len(dataset)} pictures, page {page} of {pages}"
    return contact_sheet([overview_tile(record, cell) for record in records], cell=cell, title=title)


def overview_tile(record: Record, cell: int) -> Tile:
    name, (width, height) = printable(Path(record.path).name), record.frame
    facts = [f"{width}x{height}", *([f"x{record.repeats}"] if record.repeats != 1 else []), *(["mask"] if record.mask else []),
             *([f"score {record.score:g}"] if record.score is not None else []), *([record.split] if record.split != "train" else [])]
    more = f" (+{len(record.captions) - 1})" if len(record.captions) > 1 else ""
    caption = (record.captions[0] if record.captions else "(no caption)") + more
    try:
        picture = thumbnail(record, cell)
    except (ValueError, OSError) as error:
        return Tile(Image.new("RGB", (cell, cell), BAD), (name, *wrapped(str(error), cell, 4)), BAD)
    return Tile(picture, (name, " ".join(facts), *wrapped(caption, cell, 2), *record.flags[:2]), WARN if record.flags else EDGE)


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """The beginning of the text in lines that fit roughly; contact_sheet cuts what is still too long."""
    return textwrap.wrap(printable(text), max(8, width // 7), max_lines=lines, placeholder=" ...")
