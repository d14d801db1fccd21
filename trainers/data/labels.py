"""Classes of pictures: the folders they lie in, or a table with the columns file and label."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from .metadata import Names, count, read_text, short, some
from .records import Dataset

FILE, LABEL = "file", "label"


def folder_labels(dataset: Dataset) -> list[str | None]:
    """The folder of each picture, where there are several."""
    folders = [Path(record.path).parent.name for record in dataset]
    return list(folders) if len(set(folders)) > 1 else [None] * len(folders)


def read_labels(file, dataset: Dataset) -> list[str | None]:
    """The label of each picture, None where the table is silent. ValueError for a table of another shape, or names that are not there."""
    file = Path(file)
    paths = [Path(record.path) for record in dataset]
    names, places = Names(paths, file.parent), {}
    for place, path in enumerate(paths):
        places.setdefault(path, []).append(place)
    labels: list[str | None] = [None] * len(dataset)
    unknown = []
    for name, label in rows(file):
        found = names.find(name)
        if len(found) != 1:
            unknown.append(name)
            continue
        for place in places[found[0]]:
            labels[place] = label
    if unknown:
        raise ValueError(f"{file} names {count(sorted(set(unknown)), 'picture')} that the dataset does not hold, or holds several times: "
                         f"{some(sorted(set(unknown)))}. Write the file names, or paths from the folder of that file.")
    return labels


def rows(file: Path) -> list[tuple[str, str]]:
    text = read_text(file, "list of labels", 64 << 20)
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",", ";", "\t", key=header.count))
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    if not {FILE, LABEL} <= set(reader.fieldnames):
        raise ValueError(f"{file} begins with {short(repr(header))}; its first line must name the columns: file,label.")
    return [(row[FILE].strip(), row[LABEL].strip()) for row in reader if (row[FILE] or "").strip() and (row[LABEL] or "").strip()]
