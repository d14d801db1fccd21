"""Captions edited by hand in the caption grid: the edits as JSON, and the cards that the grid shows.

The JSON is {image id: caption}, or a list of captions for an image with alternatives. The id is the sha1 of the image
file's bytes, so an edit follows a renamed or moved file; two files with the same bytes share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..contact_sheet import make_thumbnail
from ..metadata import check_plain_text
from ..records import ImageDataset, ImageRecord

ManualEdits = Mapping[str, tuple[str, ...]]  # image id -> captions
THUMBNAIL_THREADS = 4
CARD_THUMBNAIL_SIDE = 256  # pixels


def parse_manual_edits(text: str) -> dict[str, tuple[str, ...]]:
    """Image id -> captions. ValueError with the position when the text is not what the grid writes."""
    if not text.strip():
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The edits are not JSON ({error}). They begin with {text.strip()[:60]!r}. Clear the field to start over."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f'The edits are {text.strip()[:60]!r}; they must be an object such as {{"picture id": "a red ball"}}.'
        )
    return {id: parse_edited_captions(id, value) for id, value in values.items()}


def parse_edited_captions(id: str, value) -> tuple[str, ...]:
    """The alternatives that were written for one image, without empty ones."""
    written = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in written):
        raise ValueError(f"The edit of image {id} is {json.dumps(value)[:60]}; it must be text, or a list of texts.")
    texts = (check_plain_text(text, f"The edit of image {id}").strip() for text in written)
    return tuple(dict.fromkeys(filter(None, texts)))


def apply_manual_edits(dataset: ImageDataset, edits: ManualEdits) -> ImageDataset:
    """The dataset with these captions in place of its own."""
    return replace(dataset, records=tuple(replace(r, captions=edits[r.id]) if r.id in edits else r for r in dataset))


def format_manual_edits(dataset: ImageDataset, after: ImageDataset, edits: ManualEdits) -> str:
    """One line on how many captions the edits change, and one on edits whose image is not in the dataset."""
    changed = sum(old.captions != new.captions for old, new in zip(dataset, after, strict=True))
    lines = [f"{changed} of {len(dataset)} captions edited by hand"]
    ids = {record.id for record in dataset}
    if unmatched := [id for id in edits if id not in ids]:
        names = ", ".join(id[:10] for id in unmatched[:3]) + (", ..." if len(unmatched) > 3 else "")
        lines.append(
            f"{len(unmatched)} edits are of images that are not in this dataset ({names}); they are kept in case "
            "those come back."
        )
    return "\n".join(lines)


# -- cards of the caption grid -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionCard:
    """One image of the grid: the file name of its thumbnail, or why there is none."""

    id: str
    name: str
    captions: tuple[str, ...]
    thumb: str | None = None
    why: str = ""
    made: bool = True  # whether the thumbnail is there; False: it is made when the page shows it


def build_caption_cards(
    dataset: ImageDataset,
    folder,
    report: Callable[[int, int, str], None] | None = None,
    check_interrupt: Callable[[], None] | None = None,
    first: int | None = None,
) -> list[CaptionCard]:
    """One card per image, with thumbnails as files in the folder; existing ones are used again.

    report(done, total, name) is called after every image. One that cannot be opened gets a card that says why.
    first: how many thumbnails are made now; None for all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    now, later = dataset[:first], dataset[len(dataset) if first is None else first :]
    cards = []
    with ThreadPoolExecutor(THUMBNAIL_THREADS) as pool:
        try:
            for done, card in enumerate(pool.map(lambda record: build_caption_card(record, folder), now), 1):
                if check_interrupt:
                    check_interrupt()
                cards.append(card)
                if report:
                    report(done, len(now), card.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return cards + [promise_caption_card(record) for record in later]


def promise_caption_card(record: ImageRecord) -> CaptionCard:
    """A card whose thumbnail is made by `build_caption_card` when it is asked for."""
    return CaptionCard(record.id, Path(record.path).name, record.captions, thumbnail_file_name(record), made=False)


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
    """Another crop of the same image gets another thumbnail."""
    crop = hashlib.blake2b(repr(record.crop).encode(), digest_size=4).hexdigest()
    return f"{record.pixels_id}_{crop}.webp"


def save_thumbnail(thumbnail, file: Path) -> None:
    """Writes the file under its name only when it is complete: the page may ask for it at any time."""
    part = file.with_name(f".{file.name}.{id(thumbnail)}.part")
    thumbnail.save(part, "WEBP", quality=80)
    part.replace(file)
