"""What text files say about pictures: sidecars of the same stem, kohya's metadata.json, metadata.jsonl and
metadata.csv.

A `Note` holds what one source says about one picture; None means that it says nothing, so the next source is asked. A
row that cannot be understood takes its picture out, with the reason; a row that names no picture is reported.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

BYTES_PER_MIB = 2**20
MAX_CAPTION_BYTES, MAX_SIDECAR_BYTES, MAX_TABLE_BYTES = (
    1 * BYTES_PER_MIB,
    16 * BYTES_PER_MIB,
    512 * BYTES_PER_MIB,
)  # what is larger was put there by mistake
MAX_REPEATS = 10_000
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.json")  # in the order in which they are asked
FILE_KEYS = ("file_name", "file", "image", "path")
CAPTION_KEYS = ("captions", "caption", "text")
MASK_KEYS = ("mask", "mask_file")
EXTRA_CELLS_KEY = None  # key of the cells beyond the header, as Python's own csv.DictReader has it
SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class ImageMetadata:
    """What one source says about one picture."""

    captions: tuple[str, ...] | None = None  # () says that there is none, on purpose
    tags: tuple[str, ...] | None = None
    score: float | None = None
    repeats: int | None = None
    split: str | None = None
    mask: Path | None = None
    pair: str | None = None
    strength: float | None = None
    error: str | None = None  # why it cannot be used


@dataclass(frozen=True)
class MetadataTable:
    """The rows of one metadata file, matched with pictures, and what could not be matched."""

    entries: dict[Path, ImageMetadata]
    problems: tuple[str, ...] = ()


def merge_metadata(notes: Iterable[ImageMetadata]) -> ImageMetadata:
    """One note: of each fact, what the first of them says that says anything."""
    notes = list(notes)
    first = {
        f.name: next((getattr(n, f.name) for n in notes if getattr(n, f.name) is not None), None)
        for f in fields(ImageMetadata)
    }
    return ImageMetadata(**first)


# -- text --------------------------------------------------------------------------------------------------------------


def read_text_file(file: Path, what: str = "caption", limit: int = MAX_CAPTION_BYTES) -> str:
    """UTF-8 with or without a byte order mark; UTF-16 where the mark says so."""
    data = read_file_bytes(file, limit + 1)
    if len(data) > limit:
        raise ValueError(
            f"The {what} {file} is larger than {limit // BYTES_PER_MIB} MiB. Is it the right file? Mend it or take it "
            "out."
        )
    try:
        return check_plain_text(
            data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"), f"The {what} {file}"
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"The {what} {file} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error


def read_file_bytes(file: Path, most: int = -1) -> bytes:
    """What the file holds, of a large one the first bytes only."""
    try:
        with open(file, "rb") as opened:
            return opened.read(most)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}). Mend it or take it out.") from error


def check_plain_text(text: str, where: str) -> str:
    """The text itself. ValueError for characters that cannot be written as text again, which no text encoder takes."""
    if "\0" in text:
        raise ValueError(f"{where} holds NUL characters, which are no text. Save it as UTF-8.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds a broken character (at {error.start}). Save it as UTF-8.") from error
    return text


def split_captions(text: str, alternatives: bool) -> tuple[str, ...]:
    """The captions in a text: all of it, or one per line."""
    lines = text.splitlines() if alternatives else [text]
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


# -- the files of one picture ------------------------------------------------------------------------------------------


def read_sidecar_metadata(file: Path, extension: str, alternatives: bool) -> list[ImageMetadata]:
    """What the files of the picture's own stem say: the first of extension, .txt and .caption, then .json."""
    notes = []
    for ending in dict.fromkeys((extension, ".txt", ".caption")):
        sidecar = file.with_name(file.stem + ending)
        if ending != ".json" and is_file_or_broken_link(sidecar):
            notes.append(ImageMetadata(captions=split_captions(read_text_file(sidecar), alternatives)))
            break
    described = file.with_name(file.stem + ".json")
    if is_file_or_broken_link(described) and described.name not in METADATA_FILES:
        notes.append(read_json_sidecar(described, alternatives))
    return notes


def is_file_or_broken_link(file: Path) -> bool:
    """Also a link to nowhere, so that it is reported as unreadable instead of passed over."""
    return file.is_file() or (file.is_symlink() and not file.exists())


def read_json_sidecar(file: Path, alternatives: bool) -> ImageMetadata:
    values = parse_json_text(read_text_file(file, "file", MAX_SIDECAR_BYTES), f"The file {file}")
    if isinstance(values, str):
        values = {"caption": values}
    if not isinstance(values, dict):
        raise ValueError(
            f'The file {file} holds {json_type_name(values)}; write an object such as {{"caption": "a red ball"}}.'
        )
    return parse_image_metadata(values, str(file), file.parent, alternatives)


def parse_json_text(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}). Mend it or take it out.") from error


# -- one row -----------------------------------------------------------------------------------------------------------


def parse_image_metadata(values: dict, where: str, folder: Path, alternatives: bool) -> ImageMetadata:
    """The facts in a JSON object or a CSV row; other keys are left alone. ValueError where a fact has a wrong type or
    value."""
    return ImageMetadata(
        captions=parse_captions_value(values, where, alternatives),
        tags=parse_tags_value(values, where),
        score=parse_number_value("score", values, where),
        repeats=parse_repeats_value(values, where),
        split=parse_split_value(values, where),
        mask=parse_mask_value(values, where, folder),
        pair=parse_text_value("pair", values, where),
        strength=parse_number_value("strength", values, where),
    )


def first_given_value(values: dict, keys: Sequence[str]):
    """(key, value) of the first key that holds anything, or (None, None). "" and null hold nothing, an empty list
    does."""
    return next(((key, values[key]) for key in keys if values.get(key) is not None and values[key] != ""), (None, None))


def parse_captions_value(values, where, alternatives) -> tuple[str, ...] | None:
    key, value = first_given_value(values, CAPTION_KEYS)
    if key is None:
        return None
    if isinstance(value, str):
        return split_captions(check_plain_text(value, f"{where}: {key}"), alternatives) or None
    return tuple(dict.fromkeys(text.strip() for text in parse_text_list(value, f"{where}: {key}") if text.strip()))


def parse_tags_value(values, where) -> tuple[str, ...] | None:
    key, value = first_given_value(values, ("tags",))
    if key is None:
        return None
    if isinstance(value, dict):  # taggers write {tag: probability}
        value = list(value)
    parts = (
        check_plain_text(value, f"{where}: tags").split(",")
        if isinstance(value, str)
        else parse_text_list(value, f"{where}: tags")
    )
    return tuple(dict.fromkeys(tag.strip() for tag in parts if tag.strip()))


def parse_text_list(value, where) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where} is {format_raw_value(value)}; it must be text or a list of texts.")
    return [check_plain_text(item, where) for item in value]


def parse_number_value(name, values, where) -> float | None:
    key, value = first_given_value(values, (name,))
    if key is None:
        return None
    number = parse_finite_number(value)
    if number is None:
        raise ValueError(f"{where}: {name} is {format_raw_value(value)}; it must be a finite number.")
    return number


def parse_text_value(name, values, where) -> str | None:
    key, value = first_given_value(values, (name,))
    if key is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {format_raw_value(value)}; it must be text.")
    return None if key is None else check_plain_text(value, f"{where}: {name}").strip()


def parse_finite_number(value) -> float | None:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def parse_repeats_value(values, where) -> int | None:
    key, value = first_given_value(values, ("repeats",))
    if key is None:
        return None
    number = parse_finite_number(value)
    if number is None or number != int(number) or not 0 <= number <= MAX_REPEATS:
        raise ValueError(
            f"{where}: repeats is {format_raw_value(value)}; it must be a whole number from 0 to {MAX_REPEATS}."
        )
    return int(number)


def parse_split_value(values, where) -> str | None:
    key, value = first_given_value(values, ("split",))
    if key is None:
        return None
    if not isinstance(value, str) or value.strip().lower() not in SPLIT_ALIASES:
        raise ValueError(f"{where}: split is {format_raw_value(value)}; it must be train, validation or test.")
    return SPLIT_ALIASES[value.strip().lower()]


def parse_mask_value(values, where, folder: Path) -> Path | None:
    """The mask's path, which must lie inside the folder of the file that names it."""
    key, value = first_given_value(values, MASK_KEYS)
    if key is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {format_raw_value(value)}; it must be the path of a picture.")
    path = folder / check_plain_text(value, f"{where}: {key}").replace("\\", "/")
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        inside = False
    if not inside:
        raise ValueError(
            f"{where}: {key} is {format_raw_value(value)}, which leads out of {folder}. Put the mask inside that "
            "folder."
        )
    return path


def format_raw_value(value) -> str:
    """The value as a message shows it: short, and printable whatever it holds."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = json_type_name(value)
    return shorten_value(text)


def shorten_value(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def json_type_name(value) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# -- tables: one file for many pictures --------------------------------------------------------------------------------


def read_metadata_table(file: Path, pictures: Sequence[Path], alternatives: bool = False) -> MetadataTable:
    """The table's rows by picture. ValueError when the file as a whole cannot be read."""
    names, notes, unknown, twice, problems = ImageNameIndex(pictures, file.parent), {}, [], [], []
    for where, name, values in read_metadata_rows(file, problems):
        found = names.find(name)
        if len(found) != 1:
            unknown.append(f"{name} (several)" if found else name)
        elif found[0] in notes:
            twice.append(name)
        else:
            notes[found[0]] = parse_metadata_row(values, f"{file}, {where}", file.parent, alternatives)
    if unknown:
        problems.append(
            f"no single picture here for {format_count(unknown, 'row')} of {file.name}: {format_first_names(unknown)}"
        )
    if twice:
        problems.append(
            f"{format_count(twice, 'row')} of {file.name} for a picture that had one; the first counts: "
            f"{format_first_names(twice)}"
        )
    return MetadataTable(notes, tuple(problems))


def parse_metadata_row(values, where, folder, alternatives) -> ImageMetadata:
    try:
        if isinstance(values, str):
            values = {"caption": values}
        if not isinstance(values, dict):
            raise ValueError(
                f"{where} is {format_raw_value(values)}; it must be an object with caption, tags, score, ..."
            )
        if values.get(EXTRA_CELLS_KEY):
            raise ValueError(
                f'{where} has more cells than the header. Put texts that hold a comma between quotes: "a ball, red".'
            )
        return parse_image_metadata(values, where, folder, alternatives)
    except ValueError as error:
        return ImageMetadata(error=str(error))


class ImageNameIndex:
    """Pictures by the names that tables give them: path, path without ending, file name, stem."""

    def __init__(self, pictures: Sequence[Path], folder: Path):
        self.levels: list[dict[str, list[Path]]] = [{}, {}, {}, {}]
        for picture in pictures:
            path = relative_posix_path(picture, folder)
            for level, name in zip(self.levels, (path, strip_extension(path), picture.name, picture.stem), strict=True):
                level.setdefault(name, []).append(picture)

    def find(self, name: str) -> list[Path]:
        """The pictures of this name: none, one, or several where the name is not precise. Absolute paths of another
        machine are found by their last part."""
        path = name.replace("\\", "/").removeprefix("./")
        asked = (path, path, path.rsplit("/", 1)[-1], path.rsplit("/", 1)[-1])
        return next((level[key] for level, key in zip(self.levels, asked, strict=True) if key in level), [])


def relative_posix_path(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.as_posix()


def strip_extension(path: str) -> str:
    return path[: -len(Path(path).suffix)] if Path(path).suffix else path


def read_metadata_rows(file: Path, problems: list[str]):
    """(where, picture's name, values) of every row; rows that name nothing go to problems."""
    readers = {".json": parse_json_table, ".jsonl": parse_jsonl_table, ".csv": parse_csv_table, ".tsv": parse_csv_table}
    if file.suffix.lower() not in readers:
        raise ValueError(f"The metadata {file} is no .json, .jsonl, .csv or .tsv file.")
    return readers[file.suffix.lower()](file, read_text_file(file, "metadata", MAX_TABLE_BYTES), problems)


def parse_json_table(file, text, problems):
    values = parse_json_text(text, f"The metadata {file}")
    if isinstance(values, dict):
        return [(f"entry {check_plain_text(name, str(file))!r}", name, value) for name, value in values.items()]
    if isinstance(values, list):
        return attach_image_names(
            [(f"entry {number}", value) for number, value in enumerate(values, 1)], file, problems
        )
    raise ValueError(
        f"The metadata {file} holds {json_type_name(values)}; it must be an object of pictures or a list of rows."
    )


def parse_jsonl_table(file, text, problems):
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = []
    for where, line in lines:
        try:
            found.append((where, parse_json_text(line, f"{file}, {where}")))
        except ValueError as error:
            problems.append(str(error))
    return attach_image_names(found, file, problems)


def parse_csv_table(file, text, problems):
    header = text.split("\n", 1)[0]
    delimiter = max("," if file.suffix.lower() == ".csv" else "\t", ",", ";", "\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found, columns = [], None
    try:
        for cells in reader:
            if columns is None:
                columns = check_metadata_columns([cell.strip().lower() for cell in cells], file)
            elif any(cells):
                values = dict(zip(columns, map(str.strip, cells)))  # noqa: B905 - short rows end early
                found.append((f"line {reader.line_num}", values | {EXTRA_CELLS_KEY: cells[len(columns) :]}))
    except csv.Error as error:
        problems.append(
            f"{file}, line {reader.line_num} cannot be read as CSV ({error}). Mend it; the rows before it count."
        )
    if columns is None:
        raise ValueError(f"The metadata {file} is empty. Write a first line such as file_name,text, or take it out.")
    return attach_image_names(found, file, problems)


def check_metadata_columns(columns: list[str], file: Path) -> list[str]:
    if not set(columns) & set(FILE_KEYS):
        raise ValueError(
            f"The metadata {file} has no column named {', '.join(FILE_KEYS[:-1])} or {FILE_KEYS[-1]}; its first line "
            f"holds {format_first_names(columns)}."
        )
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise ValueError(f"The metadata {file} has two columns named {', '.join(twice)}. Remove or rename one.")
    return columns


def attach_image_names(found, file, problems):
    """The rows with the name of their picture; those without one go to problems."""
    good = []
    for where, values in found:
        name = first_given_value(values, FILE_KEYS)[1] if isinstance(values, dict) else None
        if isinstance(name, str):
            good.append((where, name, values))
        else:
            problems.append(
                f"{file}, {where} names no picture; it needs {', '.join(FILE_KEYS[:-1])} or {FILE_KEYS[-1]}."
            )
    return good


def format_count(things: Sequence, noun: str) -> str:
    return f"{len(things)} {noun}{'s'[: len(things) != 1]}"


def format_first_names(names: Sequence[str], most: int = 5) -> str:
    """The first few names, short and printable."""
    return ", ".join(shorten_value(repr(name)[1:-1]) for name in names[:most]) + (", ..." if len(names) > most else "")
