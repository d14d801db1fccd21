"""Captions written into the text files beside their pictures. What a file said before is kept, and pictures are never
touched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ...files import write_bytes_atomically
from ..metadata import split_captions
from ..records import ImageDataset, ImageRecord

BACKUP_FOLDER = ".trainyard-replaced"  # a folder beside the captions
CAPTION_EXTENSIONS = (".txt", ".caption")  # in the order in which they are read


@dataclass(frozen=True)
class WrittenCaption:
    """One caption file, and where its former text went; None when there was no file."""

    path: Path
    backup: Path | None


def write_caption_files(
    dataset: ImageDataset,
    ids: Iterable[str],
    roots: Iterable[Path],
    closed: Iterable[Path] = (),
    now: datetime | None = None,
) -> list[WrittenCaption]:
    """Writes the captions of the pictures with these ids; files that say so already are left alone.

    ValueError, before anything is written, for a picture outside the roots (links followed) or inside a closed folder,
    and for two pictures that share a caption file and want different texts.
    """
    roots, closed = [Path(root).resolve() for root in roots], [Path(folder).resolve() for folder in closed]
    ids = set(ids)
    for record in dataset:
        if record.id in ids:
            check_caption_location(Path(record.path), roots, closed)
    stamp = f"{now or datetime.now():%Y%m%d-%H%M%S-%f}"
    wanted = collect_caption_texts(dataset, ids)
    return [
        replace_caption_file(file, text, stamp) for file, text in wanted.items() if caption_file_differs(file, text)
    ]


def format_written_captions(written: list[WrittenCaption] | None) -> list[str]:
    """Lines on what was written; none when nothing was asked for."""
    if written is None:
        return []
    lines = [f"wrote {one.path}" + (f" (before: {one.backup})" if one.backup else " (new)") for one in written]
    return [f"{len(written)} caption files written", *lines] if written else ["no caption file needed a change"]


def check_caption_location(picture: Path, roots: list[Path], closed: list[Path]) -> None:
    """ValueError unless the caption file, and what it may be a link to, lies where writing is allowed."""
    file = find_caption_file(picture)
    for real in (file.parent.resolve(), file.resolve()):
        if not any(real.is_relative_to(root) for root in roots):
            names = " or ".join(map(str, roots))
            raise ValueError(
                f"{file} lies outside {names}, so it is not written. Turn save_to_files off, or move the pictures and "
                "their captions there."
            )
    if any(file.parent.resolve().is_relative_to(folder) for folder in closed):
        raise ValueError(
            f"{picture} was made by Trainyard and may be deleted at any time, so no caption file is written beside it. "
            "Turn save_to_files off, or edit the captions before the pictures are put together."
        )


def collect_caption_texts(dataset: ImageDataset, ids: set[str]) -> dict[Path, str]:
    """Caption file -> text. Alternatives stand on lines of their own."""
    said: dict[Path, tuple[ImageRecord, str]] = {}
    wanted = {}
    for record in dataset:
        file, text = find_caption_file(Path(record.path)), format_sidecar_text(record)
        other, before = said.setdefault(file, (record, text))
        if before != text and ids & {other.id, record.id}:
            raise ValueError(
                f"{other.path} and {record.path} share the caption file {file.name} and are to have different "
                "captions. Rename one of the pictures, or give both the same caption."
            )
        if record.id in ids:
            wanted[file] = text
    return wanted


def format_sidecar_text(record: ImageRecord) -> str:
    """A single caption as it is; of several, each in one line."""
    if len(record.captions) < 2:
        return "".join(record.captions)
    return "\n".join(" ".join(caption.split()) for caption in record.captions)


def find_caption_file(picture: Path) -> Path:
    """The caption file that is read for this picture, or the one that would be."""
    files = [picture.with_name(picture.stem + ending) for ending in CAPTION_EXTENSIONS]
    return next((file for file in files if file.is_file()), files[0])


def caption_file_differs(file: Path, text: str) -> bool:
    """Whether the file says something else; a picture without caption needs no empty file."""
    if not file.exists():
        return bool(text)
    try:
        return split_captions(file.read_bytes().decode("utf-8-sig"), False) != split_captions(text, False)
    except UnicodeDecodeError:
        return True


def replace_caption_file(file: Path, text: str, stamp: str) -> WrittenCaption:
    """The former bytes are safe under a new name before the file is replaced. A link keeps being one: its target is
    written."""
    file = file.resolve()
    kept = None
    if file.exists():
        kept = file.parent / BACKUP_FOLDER / f"{file.stem}.{stamp}{file.suffix}"
        write_bytes_atomically(kept, file.read_bytes())
    write_bytes_atomically(file, (text + "\n").encode("utf-8") if text else b"")
    return WrittenCaption(file, kept)
