"""Captions edited by hand: what a person wrote into the grid, as JSON, and what the grid is drawn from.

The JSON is {picture id: caption}, or a list of captions for a picture that has alternatives. The id is the sha1 of the
picture's bytes, so an edit follows a renamed or moved file; two files with the same bytes share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..contact_sheet import make_thumbnail
from ..metadata import check_plain_text
from ..records import ImageDataset, ImageRecord

ManualEdits = Mapping[str, tuple[str, ...]]  # captions by picture id
THUMBNAIL_THREADS = 4
CARD_THUMBNAIL_SIDE = 256  # of a thumbnail, in pixels


def parse_manual_edits(text: str) -> dict[str, tuple[str, ...]]:
    """The captions by picture id. ValueError with the place when the text is not what the grid writes."""
    if not text.strip():
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The edits are no JSON ({error}). They begin with {text.strip()[:60]!r}. Clear the field to start anew."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f'The edits are {text.strip()[:60]!r}; they must be an object such as {{"picture id": "a red ball"}}.'
        )
    return {id: parse_edited_captions(id, value) for id, value in values.items()}


def parse_edited_captions(id: str, value) -> tuple[str, ...]:
    """The alternatives that were written for one picture, without empty ones."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The edit of picture {id} is {json.dumps(value)[:60]}; it must be text, or a list of texts.")
    texts = (check_plain_text(text, f"The edit of picture {id}").strip() for text in texts)
    return tuple(dict.fromkeys(filter(None, texts)))


def apply_manual_edits(dataset: ImageDataset, edits: ManualEdits) -> ImageDataset:
    """The dataset with these captions in the place of its own."""
    return replace(dataset, records=tuple(replace(r, captions=edits[r.id]) if r.id in edits else r for r in dataset))


def list_unmatched_edits(dataset: ImageDataset, edits: ManualEdits) -> list[str]:
    """Ids of edits whose picture is not in the dataset."""
    ids = {record.id for record in dataset}
    return [id for id in edits if id not in ids]


def format_manual_edits(dataset: ImageDataset, after: ImageDataset, edits: ManualEdits) -> str:
    """One line on how many captions the edits change, and one on edits without a picture."""
    changed = sum(old.captions != new.captions for old, new in zip(dataset, after, strict=True))
    lines = [f"{changed} of {len(dataset)} captions edited by hand"]
    if lost := list_unmatched_edits(dataset, edits):
        names = ", ".join(id[:10] for id in lost[:3]) + (", ..." if len(lost) > 3 else "")
        lines.append(
            f"{len(lost)} edits are of pictures that are not in this dataset ({names}); they are kept in case those "
            "come back."
        )
    return "\n".join(lines)


# -- what the grid is drawn from ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionCard:
    """One picture of the grid: its thumbnail's file name, or why there is none."""

    id: str
    name: str
    captions: tuple[str, ...]
    thumb: str | None = None
    why: str = ""


def build_caption_cards(dataset: ImageDataset, folder, report=None, check_interrupt=None) -> list[CaptionCard]:
    """A card per picture, with thumbnails as files in the folder; those that are there already are not made again.

    report(done, total, name) is told of every picture. One that cannot be opened has a card that says why.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with ThreadPoolExecutor(THUMBNAIL_THREADS) as pool:
        try:
            for done, one in enumerate(pool.map(lambda record: build_caption_card(record, folder), dataset), 1):
                if check_interrupt:
                    check_interrupt()
                made.append(one)
                if report:
                    report(done, len(dataset), one.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return made


def build_caption_card(record: ImageRecord, folder: Path) -> CaptionCard:
    name = Path(record.path).name
    file = folder / thumbnail_file_name(record)
    try:
        if not file.exists():
            save_thumbnail(make_thumbnail(record, CARD_THUMBNAIL_SIDE), file)
    except (ValueError, OSError) as error:
        return CaptionCard(record.id, name, record.captions, why=str(error))
    return CaptionCard(record.id, name, record.captions, file.name)


def thumbnail_file_name(record: ImageRecord) -> str:
    crop = hashlib.blake2b(repr(record.crop).encode(), digest_size=4).hexdigest()
    return f"{record.id}_{crop}.webp"


def save_thumbnail(picture, file: Path) -> None:
    """Under its name only when it is whole: the page may ask for it at any time."""
    part = file.with_name(f".{file.name}.{id(picture)}.part")
    picture.save(part, "WEBP", quality=80)
    part.replace(file)
