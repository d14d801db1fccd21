"""Reads image metadata from text files: sidecars of the same stem, kohya's metadata.json, metadata.jsonl and
metadata.csv.

ImageMetadata holds what one source gives for one image; a field of None is taken from the next source. A row that
cannot be understood excludes its image, with the reason; a row that names no image is reported.
"""

from __future__ import annotations

import difflib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .companions import CompanionFiles

from .tables import parse_decimal, read_text_table

BYTES_PER_MIB = 2**20
# A larger file was put there by mistake.
MAX_CAPTION_BYTES, MAX_SIDECAR_BYTES, MAX_TABLE_BYTES = 1 * BYTES_PER_MIB, 16 * BYTES_PER_MIB, 512 * BYTES_PER_MIB
MAX_JSON_TABLE_BYTES = 64 * BYTES_PER_MIB  # which is parsed before its entries can be counted
MAX_TABLE_ROWS = 500_000  # several seconds and half a GB
MAX_TOLD_PROBLEMS = 20  # of the rows of one table
MAX_REPEATS = 10_000
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.json")  # in order of precedence
FILE_KEYS = ("file_name", "file", "image", "path")
FILE_KEY_ALIASES = ("filename", "filepath", "file_path", "image_path", "image_file", "image_name", "image_file_name")
CAPTION_KEYS = ("captions", "caption", "text")
PROMPT_KEY, DESCRIPTION_KEY = "prompt", "description"  # captions too, where they are text and nothing above is there
TAGS_KEY, TAG_STRING_KEY = "tags", "tag_string"  # the latter as boorus write it: spaces between the tags
MASK_KEYS = ("mask", "mask_file")
CONTROL_KEYS = ("control", "controls", "source")
CONTROL_KEY_ALIASES = ("control_image", "control_images", "source_image", "edit_image", "conditioning_image")
OTHER_KEYS = ("score", "repeats", "split", "pair", "strength")
IGNORED_KEYS = ("train_resolution",)  # kohya's; the sizes are set when images are encoded
IMAGE_KEYS = (
    *(*CAPTION_KEYS, PROMPT_KEY, DESCRIPTION_KEY, TAGS_KEY, TAG_STRING_KEY),
    *(*OTHER_KEYS, *MASK_KEYS, CONTROL_KEYS[0]),
)
EXTRA_CELLS_KEY = None  # key of a row's cells beyond the header, as in Python's csv.DictReader
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
    """What one source gives for one image; None: nothing, so that the next source is used."""

    captions: tuple[str, ...] | None = None  # (): no caption, on purpose
    tags: tuple[str, ...] | None = None
    score: float | None = None
    repeats: int | None = None
    split: str | None = None
    mask: Path | None = None
    controls: tuple[Path, ...] | None = None
    pair: str | None = None
    strength: float | None = None
    error: str | None = None  # why the image cannot be used


@dataclass(frozen=True)
class MetadataTable:
    """The rows of one metadata file by image, messages on rows that could not be matched, and notes on what is not
    read."""

    entries: dict[Path, ImageMetadata]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def merge_metadata(sources: Iterable[ImageMetadata]) -> ImageMetadata:
    """The metadata of an image from several sources: each field from the first source that gives it."""
    sources = list(sources)
    first = {
        f.name: next((getattr(s, f.name) for s in sources if getattr(s, f.name) is not None), None)
        for f in fields(ImageMetadata)
    }
    return ImageMetadata(**first)


# -- text --------------------------------------------------------------------------------------------------------------


def read_text_file(
    file: Path,
    what: str = "caption",
    limit: int = MAX_CAPTION_BYTES,
    advice: str = "Is it the right file? Repair or remove it.",
) -> str:
    """The file's text: UTF-8 with or without a byte order mark, or UTF-16 where the mark says so. ValueError for a file
    that is too large, with advice on it, unreadable or no text."""
    data = read_file_bytes(file, limit + 1)
    if len(data) > limit:
        raise ValueError(f"The {what} {file} is larger than {limit // BYTES_PER_MIB} MiB. {advice}")
    try:
        return check_plain_text(
            data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"), f"The {what} {file}"
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"The {what} {file} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error


def read_file_bytes(file: Path, most: int = -1) -> bytes:
    """The file's bytes, at most `most` of them."""
    try:
        with open(file, "rb") as opened:
            return opened.read(most)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}). Repair or remove it.") from error


def check_plain_text(text: str, where: str) -> str:
    """The text itself. ValueError for NUL and broken characters, which cannot be saved or encoded."""
    if "\0" in text:
        raise ValueError(f"{where} holds NUL characters, which are not text. Save it as UTF-8.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds a broken character (at {error.start}). Save it as UTF-8.") from error
    return text


def split_captions(text: str, alternatives: bool) -> tuple[str, ...]:
    """The captions in a text: all of it as one, or with `alternatives` one per line."""
    lines = text.splitlines() if alternatives else [text]
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


# -- the files of one image --------------------------------------------------------------------------------------------


def read_sidecar_metadata(
    file: Path, extension: str, alternatives: bool, companions: CompanionFiles
) -> list[ImageMetadata]:
    """The metadata in files that belong to the image: the first of extension, .txt and .caption, then .json."""
    found = []
    if sidecar := companions.find(file, list_text_extensions(extension)):
        found.append(ImageMetadata(captions=split_captions(read_text_file(sidecar), alternatives)))
    # of the stem alone: downloaders write other things into cat.png.json
    json_file = companions.find(file, (".json",), whole_name=False)
    if json_file and json_file.name not in METADATA_FILES:
        found.append(read_json_sidecar(json_file, alternatives))
    return found


def list_text_extensions(extension: str) -> tuple[str, ...]:
    """The endings of caption files, in the order in which they are looked for."""
    return tuple(ending for ending in dict.fromkeys((extension, ".txt", ".caption")) if ending != ".json")


def is_file_or_broken_link(file: Path) -> bool:
    """Whether this is a file, or a link to nowhere, which is reported as unreadable instead of ignored."""
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
        raise ValueError(f"{where} is not JSON ({error}). Repair or remove it.") from error


# -- one row -----------------------------------------------------------------------------------------------------------


def parse_image_metadata(values: dict, where: str, folder: Path, alternatives: bool) -> ImageMetadata:
    """The metadata in a JSON object or a CSV row; other keys are ignored. ValueError for a value of the wrong type or
    out of range."""
    values = lowercase_keys(values)
    return ImageMetadata(
        captions=parse_captions_value(values, where, alternatives),
        tags=parse_tags_value(values, where),
        score=parse_number_value("score", values, where),
        repeats=parse_repeats_value(values, where),
        split=parse_split_value(values, where),
        mask=parse_mask_value(values, where, folder),
        controls=parse_controls_value(values, where, folder),
        pair=parse_text_value("pair", values, where),
        strength=parse_number_value("strength", values, where),
    )


def lowercase_keys(values: dict) -> dict:
    """The same values; a key in capitals serves where there is none in small letters."""
    plain = {key.strip().lower(): value for key, value in values.items() if isinstance(key, str)}
    return {**plain, **values}


def first_given_value(values: dict, keys: Sequence[str]) -> tuple[str | None, Any]:
    """(key, value) of the first key with a value, or (None, None). "" and null are no value, an empty list is one."""
    return next(((key, values[key]) for key in keys if values.get(key) is not None and values[key] != ""), (None, None))


def parse_captions_value(values, where, alternatives) -> tuple[str, ...] | None:
    key, value = first_given_value(values, CAPTION_KEYS)
    if key is None:
        key, value = find_prompt_value(values)
    if key is None:
        return None
    if isinstance(value, str):
        return split_captions(check_plain_text(value, f"{where}: {key}"), alternatives) or None
    return tuple(dict.fromkeys(text.strip() for text in parse_text_list(value, f"{where}: {key}") if text.strip()))


def find_prompt_value(values) -> tuple[str | None, Any]:
    """(key, value) of a prompt, or of a description where there are no tags either. A prompt that is no text is
    something else, such as the graph that made the image."""
    keys = (PROMPT_KEY,) if values.get(TAGS_KEY) or values.get(TAG_STRING_KEY) else (PROMPT_KEY, DESCRIPTION_KEY)
    key, value = first_given_value(values, keys)
    is_text = isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))
    return (key, value) if is_text else (None, None)


def parse_tags_value(values, where) -> tuple[str, ...] | None:
    key, value = first_given_value(values, (TAGS_KEY, TAG_STRING_KEY))
    if key is None:
        return None
    if isinstance(value, dict):
        value = parse_tag_categories(value, f"{where}: {key}")
    if isinstance(value, str):
        separator = None if key == TAG_STRING_KEY and "," not in value else ","
        parts = check_plain_text(value, f"{where}: {key}").split(separator)
    else:
        parts = parse_text_list(value, f"{where}: {key}")
    return tuple(dict.fromkeys(tag.strip() for tag in parts if tag.strip()))


def parse_tag_categories(value: dict, where: str) -> list[str]:
    """The tags of {tag: probability}, as taggers write it, or of {category: [tag, ...]}, in their order."""
    if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value.values()):
        return list(value)
    if all(isinstance(item, list) and all(isinstance(tag, str) for tag in item) for item in value.values()):
        return [tag for tags in value.values() for tag in tags]
    raise ValueError(
        f"{where} is {format_raw_value(value)}; an object of tags must hold a number for each tag, or a list of tags "
        "for each category."
    )


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
    if key is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {format_raw_value(value)}; it must be text.")
    return check_plain_text(value, f"{where}: {name}").strip()


def parse_finite_number(value) -> float | None:
    try:
        if isinstance(value, str):
            number = parse_decimal(value)
        else:
            number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
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
    """The path of the mask, which must lie inside the folder of the file that names it."""
    key, value = first_given_value(values, MASK_KEYS)
    return None if key is None else parse_path_value(value, f"{where}: {key}", folder, "mask")


def parse_controls_value(values, where, folder: Path) -> tuple[Path, ...] | None:
    """The paths of the control images: a path, or a list of them."""
    key, value = first_given_value(values, (*CONTROL_KEYS, *CONTROL_KEY_ALIASES))
    if key is None:
        return None
    paths = value if isinstance(value, list) else [value]
    return tuple(parse_path_value(path, f"{where}: {key}", folder, "control image") for path in paths)


def parse_path_value(value, where, folder: Path, what: str) -> Path:
    """The path of an image inside the folder of the file that names it."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {format_raw_value(value)}; it must be the path of an image.")
    path = folder / check_plain_text(value, where).replace("\\", "/")
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        inside = False
    if not inside:
        raise ValueError(
            f"{where} is {format_raw_value(value)}, which leads out of {folder}. Put the {what} inside that folder."
        )
    return path


def format_raw_value(value) -> str:
    """The value for a message: short and printable, whatever it is."""
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


# -- tables: one file for many images ----------------------------------------------------------------------------------


def read_metadata_table(
    file: Path,
    images: Sequence[Path],
    alternatives: bool = False,
    locate: Callable[[Path, str], Path | None] = lambda folder, name: None,
) -> MetadataTable:
    """The table's rows by image. ValueError when the file as a whole cannot be read. locate(folder of the table, name)
    finds an image that is not among these."""
    index, entries, unknown, repeated, problems = ImageNameIndex(images, file.parent), {}, [], [], []
    rows = read_metadata_rows(file, problems)
    if len(problems) > MAX_TOLD_PROBLEMS:
        problems[MAX_TOLD_PROBLEMS:] = [
            f"{len(problems) - MAX_TOLD_PROBLEMS} more rows of {file.name} have such faults"
        ]
    for where, name, values in rows:
        found = index.find_path(name) or list(filter(None, [locate(file.parent, name)])) or index.find(name)
        if len(found) != 1:
            unknown.append(f"{name} (several)" if found else name)
        elif found[0] in entries:
            repeated.append(name)
        else:
            entries[found[0]] = parse_metadata_row(values, f"{file}, {where}", file.parent, alternatives)
    if unknown:
        problems.append(
            f"no single image here for {format_count(unknown, 'row')} of {file.name}: {format_first_names(unknown)}"
        )
    if repeated:
        problems.append(
            f"{format_count(repeated, 'row')} of {file.name} for an image that had one; the first counts: "
            f"{format_first_names(repeated)}"
        )
    return MetadataTable(entries, tuple(problems), tuple(note_unread_columns(row for _, _, row in rows)))


def note_unread_columns(rows: Iterable[Any]) -> list[str]:
    """One line on the columns that say something and are not understood, none where there are no such columns."""
    known = {*FILE_KEYS, *FILE_KEY_ALIASES, *IMAGE_KEYS, *CONTROL_KEYS, *CONTROL_KEY_ALIASES, *IGNORED_KEYS}
    unread: dict[str, None] = {}
    for row in rows:
        if isinstance(row, dict):
            filled = [key for key, value in row.items() if isinstance(key, str) and value not in (None, "")]
            unread |= dict.fromkeys(key for key in filled if key.strip().lower() not in known)
    if not unread:
        return []
    near = [(key, difflib.get_close_matches(key.strip().lower(), IMAGE_KEYS, 1, 0.75)) for key in unread]
    shown = [f"{make_printable(key)} ({match[0]}?)" if match else make_printable(key) for key, match in near]
    return [
        f"{format_count(shown, 'column')} not read: {format_first_names(shown, 12)}. Read are the image's name and "
        f"{', '.join(IMAGE_KEYS)}"
    ]


def make_printable(text: str) -> str:
    """A text, such as a file name, as it can be shown and saved: bytes that are no UTF-8 become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def parse_metadata_row(values, where, folder, alternatives) -> ImageMetadata:
    try:
        if isinstance(values, str):
            return parse_image_metadata({"caption": values}, where, folder, alternatives)
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
    """Finds images by the names that tables give them: path, path without extension, file name, stem."""

    def __init__(self, images: Sequence[Path], folder: Path):
        self.levels: list[dict[str, list[Path]]] = [{}, {}, {}, {}]  # the most precise name first
        # the same with every accent in one character with its letter, which systems change when files are copied
        self.composed: list[dict[str, list[Path]]] = [{}, {}, {}, {}]
        for image in images:
            path = (image.relative_to(folder) if image.is_relative_to(folder) else image).as_posix()
            names = path, strip_extension(path), image.name, image.stem
            for level, composed, name in zip(self.levels, self.composed, names, strict=True):
                level.setdefault(name, []).append(image)
                if not name.isascii():
                    composed.setdefault(unicodedata.normalize("NFC", name), []).append(image)

    def find(self, name: str) -> list[Path]:
        """The images of this name: none, one, or several where the name is ambiguous. Absolute paths of another machine
        are found by their last part."""
        path = plain_relative_path(name)
        return self.find_in(self.levels, path) or self.find_in(self.composed, unicodedata.normalize("NFC", path))

    def find_path(self, name: str) -> list[Path]:
        """The images at this very path, with or without its extension."""
        path = plain_relative_path(name)
        return self.levels[0].get(path) or self.levels[1].get(path) or []

    def find_in(self, levels: list[dict[str, list[Path]]], path: str) -> list[Path]:
        last = path.rsplit("/", 1)[-1]
        keys = (path, path, last, last)
        return next((level[key] for level, key in zip(levels, keys, strict=True) if key in level), [])


def plain_relative_path(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def strip_extension(path: str) -> str:
    return path[: -len(Path(path).suffix)] if Path(path).suffix else path


def read_metadata_rows(file: Path, problems: list[str]):
    """(where, image name, values) of every row; rows that name no image go to problems."""
    readers = {".json": parse_json_table, ".jsonl": parse_jsonl_table, ".csv": parse_csv_table, ".tsv": parse_csv_table}
    if file.suffix.lower() not in readers:
        raise ValueError(f"The metadata {file} is not a .json, .jsonl, .csv or .tsv file.")
    return readers[file.suffix.lower()](file, read_table_text(file), problems)


def read_table_text(file: Path) -> str:
    if file.suffix.lower() != ".json":
        return read_text_file(file, "metadata", MAX_TABLE_BYTES)
    advice = "Write it as metadata.jsonl, a row in each line, or with the images of this folder alone."
    return read_text_file(file, "metadata", MAX_JSON_TABLE_BYTES, advice)


def check_row_count(count: int, file: Path) -> None:
    """ValueError for a table that would take minutes."""
    if count > MAX_TABLE_ROWS:
        raise ValueError(
            f"The metadata {file} has {count} rows, and at most {MAX_TABLE_ROWS} are read. Write a table that holds "
            "the rows of these images alone, or divide the dataset."
        )


def parse_json_table(file, text, problems):
    values = parse_json_text(text, f"The metadata {file}")
    check_row_count(len(values) if isinstance(values, (dict, list)) else 0, file)
    if isinstance(values, dict):
        return [(f"entry {check_plain_text(name, str(file))!r}", name, value) for name, value in values.items()]
    if isinstance(values, list):
        return attach_image_names(
            [(f"entry {number}", value) for number, value in enumerate(values, 1)], file, problems
        )
    raise ValueError(
        f"The metadata {file} holds {json_type_name(values)}; it must be an object of images or a list of rows."
    )


def parse_jsonl_table(file, text, problems):
    check_row_count(text.count("\n"), file)
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for where, line in lines:
        try:
            rows.append((where, parse_json_text(line, f"{file}, {where}")))
        except ValueError as error:
            problems.append(str(error))
    return attach_image_names(rows, file, problems)


def parse_csv_table(file, text, problems):
    check_row_count(text.count("\n"), file)
    table = read_text_table(text, "," if file.suffix.lower() == ".csv" else "\t")
    if table.columns:
        check_metadata_columns(list(table.columns), file)
    if table.error:
        problems.append(f"{file}, {table.error}. Mend it; the rows before it count.")
    elif not table.columns:
        raise ValueError(f"The metadata {file} is empty. Write a first line such as file_name,text, or remove it.")
    rows = [(row.where, {**row.cells, EXTRA_CELLS_KEY: row.extra}) for row in table.rows]
    return attach_image_names(rows, file, problems)


def check_metadata_columns(columns: list[str], file: Path) -> list[str]:
    if not set(columns) & {*FILE_KEYS, *FILE_KEY_ALIASES}:
        raise ValueError(
            f"The metadata {file} has no column named {', '.join(FILE_KEYS[:-1])} or {FILE_KEYS[-1]}; its first line "
            f"holds {format_first_names(columns)}."
        )
    repeated = sorted(name for name, count in Counter(columns).items() if name and count > 1)
    if repeated:
        raise ValueError(f"The metadata {file} has two columns named {', '.join(repeated)}. Remove or rename one.")
    return columns


def attach_image_names(rows, file, problems):
    """(where, image name, values) of every row; those without a name go to problems."""
    named = []
    for where, values in rows:
        name = (
            first_given_value(lowercase_keys(values), (*FILE_KEYS, *FILE_KEY_ALIASES))[1]
            if isinstance(values, dict)
            else None
        )
        if isinstance(name, str):
            named.append((where, name, values))
        else:
            problems.append(f"{file}, {where} names no image; it needs {', '.join(FILE_KEYS[:-1])} or {FILE_KEYS[-1]}.")
    return named


def format_count(things: Sequence, noun: str) -> str:
    return f"{len(things)} {noun}{'s'[: len(things) != 1]}"


def format_first_names(names: Sequence[str], most: int = 5) -> str:
    """The first few names for a message, short and printable."""
    return ", ".join(shorten_value(repr(name)[1:-1]) for name in names[:most]) + (", ..." if len(names) > most else "")
