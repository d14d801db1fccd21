"""Datasets saved to folders that this and other trainers read: images with .txt files, kohya's `N_name`, or
metadata.jsonl.

A folder is written beside its place under another name and moved there when it is whole. What is replaced is removed
last, and only
when every file in it came from here: nothing that a person put there is lost.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..file_names import check_path_length
from ..files import new_part_path, remove_stale_parts
from ..settings import Settings, choice_field, compute_fingerprint, number_field, text_field
from .companions import compose_name, find_control_owner
from .file_endings import CONDITION_SUFFIX, FORMAT_ENDINGS, JPEG_ENDINGS, MASK_SUFFIX, MASK_SUFFIXES, image_extensions
from .metadata import format_count, format_first_names
from .pixel_modes import convert_to_rgba, has_alpha
from .readers import make_printable
from .records import (
    ControlImage,
    ImageDataset,
    ImageRecord,
    open_image,
    open_mask_at,
    open_upright_image,
    read_unchanged_bytes,
)

TXT_LAYOUT, KOHYA_LAYOUT, JSONL_LAYOUT = "folder + txt", "kohya", "metadata.jsonl"
SAVE_LAYOUTS = (TXT_LAYOUT, KOHYA_LAYOUT, JSONL_LAYOUT)
KEEP_FORMAT = "keep"
FORMAT_EXTENSIONS = {KEEP_FORMAT: image_extensions(), "png": (".png",), "webp": (".webp",), "jpg": JPEG_ENDINGS}
MANIFEST_FILE = ".trainyard.json"  # in each saved folder: the files that were put there
MAX_STEM_BYTES = 180  # bytes; file systems take 255, and endings and numbers follow
MAX_FORMAT_SIDE_PX = {".webp": 16383, ".jpg": 65500, ".png": 2**31 - 1}  # px that a format takes


@dataclass(frozen=True, kw_only=True)
class SaveSettings(Settings):
    """What a saved dataset looks like."""

    layout: str = choice_field(
        TXT_LAYOUT,
        SAVE_LAYOUTS,
        "folder + txt: a text file beside each image. kohya: the same, in folders such as 10_name. "
        "metadata.jsonl: one file for all captions, in Hugging Face's format.",
    )
    image_format: str = choice_field(
        KEEP_FORMAT,
        tuple(FORMAT_EXTENSIONS),
        "keep: images are copied byte for byte; cropped ones become PNG. png and webp: lossless. jpg: smaller, "
        "lossy, no transparency.",
    )
    quality: int = number_field(95, 1, 100, "JPEG quality; higher is better and larger.", advanced=True)
    concept: str = text_field(
        "images", "With kohya: the name after the number of repeats, as in 10_images.", advanced=True
    )


@dataclass(frozen=True)
class SavedDataset:
    """What was written where."""

    folder: Path
    image_count: int
    copied_count: int  # byte for byte
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordDestination:
    """Where a record goes: folder and names inside the saved folder."""

    record: ImageRecord
    folder: str  # "" or the name of a subfolder
    stem: str
    extension: str
    is_copied: bool

    @property
    def file_name(self) -> str:
        return "/".join(filter(None, (self.folder, self.stem + self.extension)))


def save_dataset(
    dataset: ImageDataset,
    folder,
    settings: SaveSettings,
    overwrite: bool = False,
    report: Callable[[int, int, str], None] | None = None,
    check_interrupt: Callable[[], None] | None = None,
) -> SavedDataset:
    """Write the dataset to a folder, whole or not at all; nothing is written where this very dataset lies already.

    ValueError when the folder holds anything else and overwrite is off, or holds what was not saved from here.
    report(done, total, file name); check_interrupt() raises to stop, leaving everything as it was."""
    if not len(dataset):
        raise ValueError("The dataset has no images to save.")
    target = Path(folder).resolve()
    destinations = plan_destinations(dataset, settings)
    content_id = compute_fingerprint(
        dataset.fingerprint(), settings, [destination.file_name for destination in destinations]
    )
    if not overwrite and is_already_saved(target, content_id):
        return SavedDataset(
            target, len(destinations), 0, ("It lies there already, from an earlier run; nothing was written.",)
        )
    check_save_folder(target, dataset, overwrite)
    lines = any(len(record.captions) > 1 for record in dataset)
    remove_stale_parts(target.parent)
    part = new_part_path(target.parent)
    for destination, root in itertools.product(destinations, (part, target)):
        check_path_length(root / destination.folder / (destination.stem + MASK_SUFFIX))
    try:
        part.mkdir(parents=True)
        for done, destination in enumerate(destinations, 1):
            if check_interrupt:
                check_interrupt()
            write_record_files(part, destination, settings, lines)
            if report:
                report(done, len(destinations), destination.file_name)
        write_metadata_table(part, destinations, settings)
        write_save_manifest(part, content_id)
        fsync_folder(part)  # because another folder may be removed next
        replace_saved_folder(part, target)
    except OSError as error:
        free = shutil.disk_usage(next(parent for parent in target.parents if parent.exists())).free / 2**20
        raise OSError(
            error.errno,
            f"The dataset could not be saved to {target} ({error.strerror or error}); {free:.0f} MiB are free. Nothing "
            "was changed there.",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return SavedDataset(
        target,
        len(destinations),
        sum(destination.is_copied for destination in destinations),
        tuple(list_save_notes(destinations, settings, lines)),
    )


def list_save_notes(destinations: list[RecordDestination], settings: SaveSettings, lines: bool):
    """What a person should know about the saved folder."""
    renamed = [
        destination.stem for destination in destinations if destination.stem != Path(destination.record.path).stem
    ]
    if renamed:
        yield (
            f"{format_count(renamed, 'image')} got another name, because names were taken or no file names: "
            f"{format_first_names(renamed)}"
        )
    if lines and settings.layout != JSONL_LAYOUT:
        yield "Several captions of one image are one per line: set caption_lines to alternatives when you load it."


# -- where it may go ---------------------------------------------------------------------------------------------------


def check_save_folder(target: Path, dataset: ImageDataset, overwrite: bool) -> None:
    """ValueError unless the folder may be written."""
    if videos := [Path(record.path).name for record in dataset if record.video]:
        raise ValueError(
            f"The dataset holds {format_count(videos, 'video')}, and only images can be saved: "
            f"{format_first_names(videos, 3)}. Take them out; their files stay where they are."
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file. Choose another name for the dataset.")
    own = [
        path
        for record in dataset
        for path in (record.path, record.mask, *(control.path for control in record.controls))
        if path and Path(path).resolve().is_relative_to(target)
    ]
    if own:
        raise ValueError(
            f"{target} holds images of this dataset, {format_first_names([Path(path).name for path in own], 3)}. "
            "Save it under another name."
        )
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{target} holds files already. Choose another name, or turn overwrite on to replace what was saved there "
            "before."
        )
    if strange := list_foreign_files(target):
        raise ValueError(
            f"{target} holds {format_count(strange, 'file')} that Save Dataset did not put there: "
            f"{format_first_names(strange)}. It is not replaced; choose another name, or move them away."
        )


def list_foreign_files(target: Path) -> list[str]:
    """Files in the folder that were not saved from here."""
    names = (
        Path(folder, name).relative_to(target).as_posix() for folder, _, files in os.walk(target) for name in files
    )
    return sorted(set(names) - set(read_save_manifest(target)["files"]) - {MANIFEST_FILE})


def is_already_saved(target: Path, content_id: str) -> bool:
    """Whether the folder holds this very dataset, every file of it."""
    known = read_save_manifest(target)
    return known["content"] == content_id and all((target / name).is_file() for name in known["files"])


def read_save_manifest(target: Path) -> dict:
    """What a saved folder says of itself; nothing where it is no saved folder."""
    try:
        values = json.loads((target / MANIFEST_FILE).read_text(encoding="utf-8"))
        return {"content": values["content"], "files": list(map(str, values["files"]))}
    except (OSError, ValueError, KeyError, TypeError):
        return {"content": None, "files": []}


def replace_saved_folder(part: Path, target: Path) -> None:
    """Put part in the place of target; what was there is removed afterwards."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if not target.exists():
        os.rename(part, target)
        return
    os.rename(target, old)
    try:
        os.rename(part, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


# -- names -------------------------------------------------------------------------------------------------------------


def plan_destinations(dataset: ImageDataset, settings: SaveSettings) -> list[RecordDestination]:
    """A destination for every record. Stems differ within a folder, also where case does not count, because a.png and
    a.jpg would share a.txt."""
    taken: dict[str, set[str]] = {}
    stems = {compose_name(Path(record.path).stem) for record in dataset}
    destinations = []
    for record in dataset:
        folder = (
            f"{record.repeats}_{safe_file_name(settings.concept) or 'images'}"
            if settings.layout == KOHYA_LAYOUT
            else ""
        )
        ending = Path(make_printable(record.path)).suffix
        copied = record.crop is None and ending.lower() in FORMAT_EXTENSIONS[settings.image_format]
        name = safe_file_name(Path(record.path).stem) or "picture"
        if find_control_owner(Path(record.path).name, stems):
            name += "_"  # cat_source.png would be a control image of cat
        stem = reserve_free_stem(name, taken.setdefault(folder, set()))
        ending = common_ending(ending) if copied else FORMAT_EXTENSIONS[settings.image_format][0]
        destinations.append(RecordDestination(record, folder, stem, ending, copied))
    return destinations


def common_ending(ending: str) -> str:
    """The ending that every trainer knows for a file of this one: a .jfif is a JPEG."""
    return ".jpg" if ending.lower() in JPEG_ENDINGS and ending.lower() not in FORMAT_ENDINGS["JPEG"] else ending


def reserve_free_stem(stem: str, taken: set[str]) -> str:
    """The stem, or the first of stem_2, stem_3 ... that is not taken; it is taken then."""
    name, number_ = stem, 2
    while name.casefold() in taken:
        name, number_ = f"{stem}_{number_}", number_ + 1
    taken.add(name.casefold())
    return name


def safe_file_name(name: str) -> str:
    """The name as every file system takes it."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", make_printable(name)).strip(" ").lstrip(".").rstrip(". ")
    name = name.encode("utf-8")[:MAX_STEM_BYTES].decode("utf-8", "ignore")
    no_image = tuple(Path(suffix).stem for suffix in (*MASK_SUFFIXES, CONDITION_SUFFIX))
    return name + "_" if name.lower().endswith(no_image) else name  # cat.mask.png would be the mask of cat


# -- files -------------------------------------------------------------------------------------------------------------


def write_record_files(root: Path, destination: RecordDestination, settings: SaveSettings, lines: bool) -> None:
    """The image, its mask, its control images and its text file."""
    folder, record = root / destination.folder, destination.record
    folder.mkdir(exist_ok=True)
    write_saved_file(
        folder / (destination.stem + destination.extension),
        read_unchanged_bytes(record.path, record.id)
        if destination.is_copied
        else encode_saved_image(record, destination.extension, settings),
    )
    if record.mask is not None:
        write_saved_file(folder / (destination.stem + MASK_SUFFIX), encode_saved_mask(record.mask, record))
    for number, control in enumerate(record.controls, 1):
        write_saved_file(
            folder / control_file_name(destination.stem, number, control, record),
            encode_saved_control(control, record, settings),
        )
    if settings.layout != JSONL_LAYOUT and (record.captions or record.tags or settings.layout == KOHYA_LAYOUT):
        write_saved_file(
            folder / f"{destination.stem}.txt", (format_caption_file(record, lines) or "\n").encode("utf-8")
        )


def control_file_name(stem: str, number: int, control: ControlImage, record: ImageRecord) -> str:
    """cat.control.png, then cat.control2.png ..."""
    ending = common_ending(Path(make_printable(control.path)).suffix) if is_copied_control(control, record) else ".png"
    return f"{stem}.control{number if number > 1 else ''}{ending}"


def is_copied_control(control: ControlImage, record: ImageRecord) -> bool:
    """Whether a control image is saved byte for byte: it is not cropped."""
    return record.control_record(control).crop is None


def encode_saved_control(control: ControlImage, record: ImageRecord, settings: SaveSettings) -> bytes:
    if is_copied_control(control, record):
        return read_unchanged_bytes(control.path, control.id)
    return encode_saved_image(record.control_record(control), ".png", settings)


def format_caption_file(record: ImageRecord, lines: bool) -> str:
    """The caption; with `lines` each alternative is a line of its own."""
    return "\n".join(" ".join(caption.split()) if lines else caption for caption in record.captions)


def encode_saved_image(record: ImageRecord, ending: str, settings: SaveSettings) -> bytes:
    """The image as training sees it, upright and cropped; its transparency stays where the format has any."""
    width, height = record.cropped_size
    if max(width, height) > MAX_FORMAT_SIDE_PX[ending]:
        raise ValueError(
            f"{record.path} is {width}x{height} px, and a {ending} ends at {MAX_FORMAT_SIDE_PX[ending]} px a side. "
            "Save as png."
        )
    if ending == ".jpg":
        return encode_image_bytes(open_image(record), "JPEG", quality=settings.quality, subsampling=0)
    image, profile = open_image_and_profile(record)
    if ending == ".webp":
        return encode_image_bytes(image, "WEBP", lossless=True, exact=True, icc_profile=profile or "")
    return encode_image_bytes(image, "PNG", icc_profile=profile)


def open_image_and_profile(record: ImageRecord) -> tuple[Image.Image, bytes | None]:
    """(the image in L, RGB or RGBA, its colour profile where that says sRGB)."""
    image = open_upright_image(record)
    profile = image.info.get("icc_profile")
    image = convert_to_rgba(image) if has_alpha(image) else image if image.mode == "L" else image.convert("RGB")
    return image.crop(record.crop) if record.crop else image, profile


def encode_saved_mask(path: str, record: ImageRecord) -> bytes:
    if record.crop is None and path != record.path and path.lower().endswith(".png"):
        return read_unchanged_bytes(path, record.mask_id)
    return encode_image_bytes(open_mask_at(path, record), "PNG", icc_profile=None)  # a mask has no colours


def encode_image_bytes(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def write_metadata_table(root: Path, destinations: list[RecordDestination], settings: SaveSettings) -> None:
    """metadata.jsonl, with what has no other destination."""
    rows = [make_metadata_row(destination, settings.layout) for destination in destinations]
    if settings.layout == JSONL_LAYOUT or any(len(values) > 1 for values in rows):
        kept = [values for values in rows if settings.layout == JSONL_LAYOUT or len(values) > 1]
        lines = (json.dumps(values, ensure_ascii=False, allow_nan=False) for values in kept)
        write_saved_file(root / "metadata.jsonl", ("\n".join(lines) + "\n").encode("utf-8"))


def write_save_manifest(root: Path, content_id: str) -> None:
    """What was put there, so that nothing else is ever replaced."""
    files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    write_saved_file(
        root / MANIFEST_FILE,
        json.dumps({"saved by": "Trainyard, Save Dataset", "content": content_id, "files": files}, indent=1).encode(
            "utf-8"
        ),
    )


def make_metadata_row(destination: RecordDestination, layout: str) -> dict:
    """The line of metadata.jsonl for a record; only its name where there is nothing to tell."""
    record = destination.record
    told: dict[str, Any] = {"file_name": destination.file_name}
    if layout == JSONL_LAYOUT:
        told["text"] = record.captions[0] if record.captions else ""
        if len(record.captions) > 1 or (record.tags and not record.captions):
            told["captions"] = record.captions  # an empty list says that the tags are no caption
    facts = {
        "tags": record.tags,
        "score": record.score,
        "pair": record.pair,
        "strength": record.strength,
        "split": record.split if record.split != "train" else None,
        "repeats": record.repeats if layout != KOHYA_LAYOUT and record.repeats != 1 else None,
    }
    return told | {name: value for name, value in facts.items() if value not in (None, ())}


def write_saved_file(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def fsync_folder(root: Path) -> None:
    """What was written so far survives a power cut. Once at the end: a wait for each file by itself is many times
    longer."""
    for file in root.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())


def format_save_summary(saved: SavedDataset, dataset: ImageDataset) -> str:
    """What was saved, for people."""
    repeats = Counter(record.repeats for record in dataset)
    lines = [f"{format_count(dataset, 'image')} saved to {saved.folder}"]
    if set(repeats) != {1}:
        lines.append("repeats: " + ", ".join(f"{images} x {times}" for times, images in sorted(repeats.items())))
    return "\n".join([*lines, *saved.notes])
