"""Classes of images: the folders they lie in, or a table with the columns file and label."""

from __future__ import annotations

from pathlib import Path

from .metadata import (
    FILE_KEY_ALIASES,
    FILE_KEYS,
    ImageNameIndex,
    first_given_value,
    format_count,
    format_first_names,
    read_text_file,
    shorten_value,
)
from .records import ImageDataset
from .tables import first_filled_line, read_text_table

LABEL_FILE_COLUMNS, LABEL_COLUMN = ("file", *FILE_KEYS, *FILE_KEY_ALIASES), "label"


def folder_labels(dataset: ImageDataset) -> list[str | None]:
    """The folder of each image, where there are several."""
    folders = [Path(record.path).parent.name for record in dataset]
    return list(folders) if len(set(folders)) > 1 else [None] * len(folders)


def read_labels(file, dataset: ImageDataset) -> list[str | None]:
    """The label of each image, None where the table is silent. ValueError for a table of another shape, or names that
    are not there."""
    file = Path(file)
    paths = [Path(record.path) for record in dataset]
    names, positions = ImageNameIndex(paths, file.parent), {}
    for position, path in enumerate(paths):
        positions.setdefault(path, []).append(position)
    labels: list[str | None] = [None] * len(dataset)
    unknown = []
    for name, label in read_label_rows(file):
        found = names.find(name)
        if len(found) != 1:
            unknown.append(name)
            continue
        for position in positions[found[0]]:
            labels[position] = label
    if unknown:
        raise ValueError(
            f"{file} names {format_count(sorted(set(unknown)), 'image')} that the dataset does not hold, or holds "
            f"several times: {format_first_names(sorted(set(unknown)))}. Write the file names, or paths from the "
            "folder of that file."
        )
    return labels


def read_label_rows(file: Path) -> list[tuple[str, str]]:
    text = read_text_file(file, "list of labels", 64 << 20)
    table = read_text_table(text)
    if LABEL_COLUMN not in table.columns or not set(LABEL_FILE_COLUMNS) & set(table.columns):
        raise ValueError(
            f"{file} begins with {shorten_value(repr(first_filled_line(text)))}; its first line must name the columns: "
            "file,label."
        )
    if table.error:
        raise ValueError(f"{file}, {table.error}. Mend that line.")
    named = [(first_given_value(row.cells, LABEL_FILE_COLUMNS)[1], row.cells.get(LABEL_COLUMN)) for row in table.rows]
    return [(name, label) for name, label in named if name and label]
