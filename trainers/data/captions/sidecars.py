"""Writes captions into the text files beside the images. Former texts are backed up, and image files are never
changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ...files import write_bytes_atomically
from ..companions import CompanionFiles
from ..metadata import split_captions
from ..records import ImageDataset, ImageRecord

BACKUP_FOLDER = ".trainyard-replaced"  # beside the caption files
CAPTION_EXTENSIONS = (".txt", ".caption")  # in the order in which they are read


@dataclass(frozen=True)
class WrittenCaption:
    """One caption file that was written, and the copy of its former text."""

    path: Path
    backup: Path | None  # None: the file is new


def write_caption_files(
    dataset: ImageDataset,
    ids: Iterable[str],
    roots: Iterable[Path],
    closed: Iterable[Path] = (),
    now: datetime | None = None,
) -> list[WrittenCaption]:
    """The caption files that were written for the images with these ids; files that hold the caption already are left
    alone.

    ValueError, before anything is written, for an image outside the roots (links followed) or inside a closed folder,
    and for two images that share a caption file but not the caption.
    """
    roots, closed = [Path(root).resolve() for root in roots], [Path(folder).resolve() for folder in closed]
    ids, companions = set(ids), CompanionFiles()
    for record in dataset:
        if record.id in ids:
            check_caption_location(Path(record.path), roots, closed, companions)
    stamp = f"{now or datetime.now():%Y%m%d-%H%M%S-%f}"
    texts = collect_caption_texts(dataset, ids, companions)
    return [replace_caption_file(file, text, stamp) for file, text in texts.items() if caption_file_differs(file, text)]


def format_written_captions(written: list[WrittenCaption] | None) -> list[str]:
    """Lines on what was written; none when writing was off (None)."""
    if written is None:
        return []
    lines = [f"wrote {one.path}" + (f" (before: {one.backup})" if one.backup else " (new)") for one in written]
    return [f"{len(written)} caption files written", *lines] if written else ["no caption file needed a change"]


def check_caption_location(image: Path, roots: list[Path], closed: list[Path], companions: CompanionFiles) -> None:
    """ValueError unless the caption file, and what it may be a link to, lies where writing is allowed."""
    file = find_caption_file(image, companions)
    for real in (file.parent.resolve(), file.resolve()):
        if not any(real.is_relative_to(root) for root in roots):
            names = " or ".join(map(str, roots))
            raise ValueError(
                f"{file} lies outside {names}, so it is not written. Turn save_to_files off, or move the images and "
                "their captions there."
            )
    if any(file.parent.resolve().is_relative_to(folder) for folder in closed):
        raise ValueError(
            f"{image} was made by Trainyard and may be deleted at any time, so no caption file is written beside "
            "it. Turn save_to_files off, or edit the captions before the images are put together."
        )


def collect_caption_texts(dataset: ImageDataset, ids: set[str], companions: CompanionFiles) -> dict[Path, str]:
    """Caption file -> text, for the images with these ids."""
    first_use: dict[Path, tuple[ImageRecord, str]] = {}
    texts = {}
    for record in dataset:
        file, text = find_caption_file(Path(record.path), companions), format_sidecar_text(record)
        other, other_text = first_use.setdefault(file, (record, text))
        if other_text != text and ids & {other.id, record.id}:
            raise ValueError(
                f"{other.path} and {record.path} share the caption file {file.name} and are to have different "
                "captions. Rename one of the images, or give both the same caption."
            )
        if record.id in ids:
            texts[file] = text
    return texts


def format_sidecar_text(record: ImageRecord) -> str:
    """The text of the caption file: a single caption as it is, alternatives on one line each."""
    if len(record.captions) < 2:
        return "".join(record.captions)
    return "\n".join(" ".join(caption.split()) for caption in record.captions)


def find_caption_file(image: Path, companions: CompanionFiles) -> Path:
    """The caption file of this image, or the one that would be made for it."""
    return companions.find(image, CAPTION_EXTENSIONS) or image.with_name(image.stem + CAPTION_EXTENSIONS[0])


def caption_file_differs(file: Path, text: str) -> bool:
    """Whether the file holds another caption; an image without a caption needs no empty file."""
    if not file.exists():
        return bool(text)
    try:
        return split_captions(file.read_bytes().decode("utf-8-sig"), False) != split_captions(text, False)
    except UnicodeDecodeError:
        return True


def replace_caption_file(file: Path, text: str, stamp: str) -> WrittenCaption:
    """Writes the file after its former bytes are safe under a new name. Of a link, the target is written."""
    file = file.resolve()
    backup = None
    if file.exists():
        backup = file.parent / BACKUP_FOLDER / f"{file.stem}.{stamp}{file.suffix}"
        write_bytes_atomically(backup, file.read_bytes())
    write_bytes_atomically(file, (text + "\n").encode("utf-8") if text else b"")
    return WrittenCaption(file, backup)
