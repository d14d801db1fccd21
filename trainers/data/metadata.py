"""What text files say about pictures: sidecars of the same stem, kohya's metadata.json, metadata.jsonl and metadata.csv.

A `Note` holds what one source says about one picture; None means that it says nothing, so the next source is asked. A row that
cannot be understood takes its picture out, with the reason; a row that names no picture is reported.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

MIB = 2**20
CAPTION_LIMIT, FILE_LIMIT, TABLE_LIMIT = 1 * MIB, 16 * MIB, 512 * MIB  # what is larger was put there by mistake
MOST_REPEATS = 10_000
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.json")  # in the order in which they are asked
FILE_KEYS = ("file_name", "file", "image", "path")
CAPTION_KEYS = ("captions", "caption", "text")
MASK_KEYS = ("mask", "mask_file")
REST = None  # key of the cells beyond the header, as Python's own csv.DictReader has it
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Note:
    """What one source says about one picture."""

    captions: tuple[str, ...] | None = None  # () says that there is none, on purpose
    tags: tuple[str, ...] | None = None
    score: float | None = None
    repeats: int | None = None
    split: str | None = None
    mask: Path | None = None
    pair: str | None = None
    strength: float | None = None
    fault: str | None = None  # why it cannot be used


@dataclass(frozen=True)
class Table:
    """The rows of one metadata file, matched with pictures, and what could not be matched."""

    notes: dict[Path, Note]
    problems: tuple[str, ...] = ()


def together(notes: Iterable[Note]) -> Note:
    """One note: of each fact, what the first of them says that says anything."""
    notes = list(notes)
    first = {f.name: next((getattr(n, f.name) for n in notes if getattr(n, f.name) is not None), None) for f in fields(Note)}
    return Note(**first)


# -- text ----------------------------------------------------------------------------------------------------------------------


def read_text(file: Path, what: str = "caption", limit: int = CAPTION_LIMIT) -> str:
    """UTF-8 with or without a byte order mark; UTF-16 where the mark says so."""
    data = bytes_of(file, limit + 1)
    if len(data) > limit:
        raise ValueError(f"The {what} {file} is larger than {limit // MIB} MiB. Is it the right file? Mend it or take it out.")
    try:
        return plain(data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"), f"The {what} {file}")
    except UnicodeDecodeError as error:
        raise ValueError(f"The {what} {file} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error


def bytes_of(file: Path, most: int = -1) -> bytes:
    """What the file holds, of a large one the first bytes only."""
    try:
        with open(file, "rb") as opened:
            return opened.read(most)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}). Mend it or take it out.") from error


def plain(text: str, where: str) -> str:
    """The text itself. ValueError for characters that cannot be written as text again, which no text encoder takes."""
    if "\0" in text:
        raise ValueError(f"{where} holds NUL characters, which are no text. Save it as UTF-8.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds a broken character (at {error.start}). Save it as UTF-8.") from error
    return text


def told(text: str, alternatives: bool) -> tuple[str, ...]:
    """The captions in a text: all of it, or one per line."""
    lines = text.splitlines() if alternatives else [text]
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


# -- the files of one picture -----------------------------------------------------------------------------------------------


def sidecar_notes(file: Path, extension: str, alternatives: bool) -> list[Note]:
    """What the files of the picture's own stem say: the first of extension, .txt and .caption, then .json."""
    notes = []
    for ending in dict.fromkeys((extension, ".txt", ".caption")):
        sidecar = file.with_name(file.stem + ending)
        if ending != ".json" and present(sidecar):
            notes.append(Note(captions=told(read_text(sidecar), alternatives)))
            break
    described = file.with_name(file.stem + ".json")
    if present(described) and described.name not in TABLES:
        notes.append(json_note(described, alternatives))
    return notes


def present(file: Path) -> bool:
    """Also a link to nowhere, so that it is reported as unreadable instead of passed over."""
    return file.is_file() or (file.is_symlink() and not file.exists())


def json_note(file: Path, alternatives: bool) -> Note:
    values = parsed(read_text(file, "file", FILE_LIMIT), f"The file {file}")
    if isinstance(values, str):
        values = {"caption": values}
    if not isinstance(values, dict):
        raise ValueError(f"The file {file} holds {kind(values)}; write an object such as {{\"caption\": \"a red ball\"}}.")
    return note(values, str(file), file.parent, alternatives)


def parsed(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}). Mend it or take it out.") from error


# -- one row ------------------------------------------------------------------------------------------------------------------


def note(values: dict, where: str, folder: Path, alternatives: bool) -> Note:
    """The facts in a JSON object or a CSV row; other keys are left alone. ValueError where a fact has a wrong type or value."""
    return Note(
        captions=captions_of(values, where, alternatives),
        tags=tags_of(values, where),
        score=number_of("score", values, where),
        repeats=repeats_of(values, where),
        split=split_of(values, where),
        mask=mask_of(values, where, folder),
        pair=text_of("pair", values, where),
        strength=number_of("strength", values, where),
    )


def given(values: dict, keys: Sequence[str]):
    """(key, value) of the first key that holds anything, or (None, None). "" and null hold nothing, an empty list does."""
    return next(((key, values[key]) for key in keys if values.get(key) is not None and values[key] != ""), (None, None))


def captions_of(values, where, alternatives) -> tuple[str, ...] | None:
    key, value = given(values, CAPTION_KEYS)
    if key is None:
        return None
    if isinstance(value, str):
        return told(plain(value, f"{where}: {key}"), alternatives) or None
    return tuple(dict.fromkeys(text.strip() for text in texts(value, f"{where}: {key}") if text.strip()))


def tags_of(values, where) -> tuple[str, ...] | None:
    key, value = given(values, ("tags",))
    if key is None:
        return None
    if isinstance(value, dict):  # taggers write {tag: probability}
        value = list(value)
    parts = plain(value, f"{where}: tags").split(",") if isinstance(value, str) else texts(value, f"{where}: tags")
    return tuple(dict.fromkeys(tag.strip() for tag in parts if tag.strip()))


def texts(value, where) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where} is {shown(value)}; it must be text or a list of texts.")
    return [plain(item, where) for item in value]


def number_of(name, values, where) -> float | None:
    key, value = given(values, (name,))
    if key is None:
        return None
    number = finite(value)
    if number is None:
        raise ValueError(f"{where}: {name} is {shown(value)}; it must be a finite number.")
    return number


def text_of(name, values, where) -> str | None:
    key, value = given(values, (name,))
    if key is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {shown(value)}; it must be text.")
    return None if key is None else plain(value, f"{where}: {name}").strip()


def finite(value) -> float | None:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def repeats_of(values, where) -> int | None:
    key, value = given(values, ("repeats",))
    if key is None:
        return None
    number = finite(value)
    if number is None or number != int(number) or not 0 <= number <= MOST_REPEATS:
        raise ValueError(f"{where}: repeats is {shown(value)}; it must be a whole number from 0 to {MOST_REPEATS}.")
    return int(number)


def split_of(values, where) -> str | None:
    key, value = given(values, ("split",))
    if key is None:
        return None
    if not isinstance(value, str) or value.strip().lower() not in SPLITS:
        raise ValueError(f"{where}: split is {shown(value)}; it must be train, validation or test.")
    return SPLITS[value.strip().lower()]


def mask_of(values, where, folder: Path) -> Path | None:
    """The mask's path, which must lie inside the folder of the file that names it."""
    key, value = given(values, MASK_KEYS)
    if key is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {shown(value)}; it must be the path of a picture.")
    path = folder / plain(value, f"{where}: {key}").replace("\\", "/")
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        inside = False
    if not inside:
        raise ValueError(f"{where}: {key} is {shown(value)}, which leads out of {folder}. Put the mask inside that folder.")
    return path


def shown(value) -> str:
    """The value as a message shows it: short, and printable whatever it holds."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = kind(value)
    return short(text)


def short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# -- tables: one file for many pictures -----------------------------------------------------------------------------------


def read_table(file: Path, pictures: Sequence[Path], alternatives: bool = False) -> Table:
    """The table's rows by picture. ValueError when the file as a whole cannot be read."""
    names, notes, unknown, twice, problems = Names(pictures, file.parent), {}, [], [], []
    for where, name, values in rows(file, problems):
        found = names.find(name)
        if len(found) != 1:
            unknown.append(f"{name} (several)" if found else name)
        elif found[0] in notes:
            twice.append(name)
        else:
            notes[found[0]] = row_note(values, f"{file}, {where}", file.parent, alternatives)
    if unknown:
        problems.append(f"no single picture here for {count(unknown, 'row')} of {file.name}: {some(unknown)}")
    if twice:
        problems.append(f"{count(twice, 'row')} of {file.name} for a picture that had one; the first counts: {some(twice)}")
    return Table(notes, tuple(problems))


def row_note(values, where, folder, alternatives) -> Note:
    try:
        if isinstance(values, str):
            values = {"caption": values}
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {shown(values)}; it must be an object with caption, tags, score, ...")
        if values.get(REST):
            raise ValueError(f"{where} has more cells than the header. Put texts that hold a comma between quotes: \"a ball, red\".")
        return note(values, where, folder, alternatives)
    except ValueError as error:
        return Note(fault=str(error))


class Names:
    """Pictures by the names that tables give them: path, path without ending, file name, stem."""

    def __init__(self, pictures: Sequence[Path], folder: Path):
        self.levels: list[dict[str, list[Path]]] = [{}, {}, {}, {}]
        for picture in pictures:
            path = relative(picture, folder)
            for level, name in zip(self.levels, (path, without_ending(path), picture.name, picture.stem), strict=True):
                level.setdefault(name, []).append(picture)

    def find(self, name: str) -> list[Path]:
        """The pictures of this name: none, one, or several where the name is not precise. Absolute paths of another machine are
        found by their last part."""
        path = name.replace("\\", "/").removeprefix("./")
        asked = (path, path, path.rsplit("/", 1)[-1], path.rsplit("/", 1)[-1])
        return next((level[key] for level, key in zip(self.levels, asked, strict=True) if key in level), [])


def relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.as_posix()


def without_ending(path: str) -> str:
    return path[: -len(Path(path).suffix)] if Path(path).suffix else path


def rows(file: Path, problems: list[str]):
    """(where, picture's name, values) of every row; rows that name nothing go to problems."""
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".tsv": csv_rows}
    if file.suffix.lower() not in readers:
        raise ValueError(f"The metadata {file} is no .json, .jsonl, .csv or .tsv file.")
    return readers[file.suffix.lower()](file, read_text(file, "metadata", TABLE_LIMIT), problems)


def json_rows(file, text, problems):
    values = parsed(text, f"The metadata {file}")
    if isinstance(values, dict):
        return [(f"entry {plain(name, str(file))!r}", name, value) for name, value in values.items()]
    if isinstance(values, list):
        return named([(f"entry {number}", value) for number, value in enumerate(values, 1)], file, problems)
    raise ValueError(f"The metadata {file} holds {kind(values)}; it must be an object of pictures or a list of rows.")


def jsonl_rows(file, text, problems):
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = []
    for where, line in lines:
        try:
            found.append((where, parsed(line, f"{file}, {where}")))
        except ValueError as error:
            problems.append(str(error))
    return named(found, file, problems)


def csv_rows(file, text, problems):
    header = text.split("\n", 1)[0]
    delimiter = max("," if file.suffix.lower() == ".csv" else "\t", ",", ";", "\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found, columns = [], None
    try:
        for cells in reader:
            if columns is None:
                columns = checked_columns([cell.strip().lower() for cell in cells], file)
            elif any(cells):
                values = dict(zip(columns, map(str.strip, cells)))  # noqa: B905 - short rows end early
                found.append((f"line {reader.line_num}", values | {REST: cells[len(columns) :]}))
    except csv.Error as error:
        problems.append(f"{file}, line {reader.line_num} cannot be read as CSV ({error}). Mend it; the rows before it count.")
    if columns is None:
        raise ValueError(f"The metadata {file} is empty. Write a first line such as file_name,text, or take it out.")
    return named(found, file, problems)


def checked_columns(columns: list[str], file: Path) -> list[str]:
    if not set(columns) & set(FILE_KEYS):
        raise ValueError(f"The metadata {file} has no column named {', '.join(FILE_KEYS[:-1])} or {FILE_KEYS[-1]}; "
                         f"its first line holds {some(columns)}.")
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise ValueError(f"The metadata {file} has two columns named {', '.join(twice)}. Remove or rename one.")
    return columns


def named(found, file, problems):
    """The rows with the name of their picture; those without one go to problems."""
    good = []
    for where, values in found:
        name = given(values, FILE_KEYS)[1] if isinstance(values, dict) else None
        if isinstance(name, str):
            good.append((where, name, values))
        else:
            problems.append(f"{file}, {where} names no picture; it needs {', '.join(FILE_KEYS[:-1])} or {FILE_KEYS[-1]}.")
    return good


def count(things: Sequence, noun: str) -> str:
    return f"{len(things)} {noun}{'s'[: len(things) != 1]}"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, short and printable."""
    return ", ".join(short(repr(name)[1:-1]) for name in names[:most]) + (", ..." if len(names) > most else "")

