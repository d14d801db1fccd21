"""Pictures by what is seen in them: one row of numbers each, which of them are alike, the groups they form, and sheets to see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...settings import Settings, number, text
from ..readers import printable
from ..records import Dataset, Record
from ..sheets import BAD, EDGE, GOOD, Tile, contact_sheet, thumbnail
from .clusters import Clustering
from .diversity import sampled, vendi_of_features


@dataclass(frozen=True)
class Features:
    """One row of unit length per picture of a dataset, and what saw them."""

    dataset: Dataset
    rows: np.ndarray  # (n, d) float32
    source: str  # for the person: "CLIP_VISION"
    kind: str = ""  # changes with what saw them; rows of different kinds cannot be compared

    def __post_init__(self):
        if len(self.rows) != len(self.dataset):
            raise ValueError(f"There are {len(self.dataset)} pictures and {len(self.rows)} rows of features.")

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def diversity(self) -> float:
        """How many different pictures they amount to (Vendi score)."""
        return vendi_of_features(np.stack(sampled(self.rows))) if len(self) else 0.0


def unit_rows(rows) -> np.ndarray:
    """(n, d) float32, each row of unit length."""
    rows = np.asarray(rows, np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)).astype(np.float32)




# -- which are alike --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SimilarSettings(Settings):
    """Which pictures are looked for."""

    most: int = number(12, 1, 200, "How many pictures are shown for each that is asked for.", unit="pictures")
    least: float = number(0.0, -1.0, 1.0, "Cosine below which a picture is not alike. Copies have 0.95 and more.", step=0.01)
    name: str = text("", "File name, or a part of it, of the pictures that are asked for. Empty: the first picture, or all of queries.")


@dataclass(frozen=True)
class Match:
    """A picture of the set that is like one that was asked for."""

    index: int
    cosine: float


def asked_for(features: Features, name: str, everything: bool) -> Features:
    """The pictures whose file name holds `name`; without a name the first one, or everything. ValueError where there is none."""
    places = [i for i, r in enumerate(features.dataset) if name.strip().lower() in Path(r.path).name.lower()]
    places = places if everything or name.strip() else places[:1]
    if not places:
        raise ValueError(f"No file name of {len(features)} pictures holds {name!r}. Write a part of one, or nothing.")
    return replace(features, dataset=Dataset(tuple(features.dataset[i] for i in places)), rows=features.rows[places])


def similar(queries: Features, among: Features, most: int, least: float = -1.0) -> list[list[Match]]:
    """For each query the pictures that are most like it, best first, without the picture itself (its own bytes)."""
    if queries.kind != among.kind or queries.rows.shape[1:] != among.rows.shape[1:]:
        raise ValueError(f"These features cannot be compared: one side was seen by {queries.source}, the other by {among.source}, or by another model of "
                         "that kind. Extract both with the same one.")
    likeness = queries.rows @ among.rows.T
    return [best(record.id, row, among, most, least) for record, row in zip(queries.dataset, likeness, strict=True)]


def best(id_: str, row, among: Features, most: int, least: float) -> list[Match]:
    order = np.argsort(-row, kind="stable").tolist()
    return [Match(i, float(row[i])) for i in order if among.dataset[i].id != id_ and row[i] >= least][:most]


def found_in(among: Features, matches: Sequence[Sequence[Match]]) -> Dataset:
    """Every picture that was found, once, the likest first."""
    order = sorted((match for row in matches for match in row), key=lambda match: -match.cosine)
    return Dataset(tuple(among.dataset[i] for i in dict.fromkeys(match.index for match in order)))


SHOWN_QUERIES = 12


def similar_sheet(queries: Features, among: Features, matches: Sequence[Sequence[Match]]) -> Image.Image:
    """Each picture that was asked for, framed, and after it those that are like it, with their cosines."""
    tiles = []
    for record, row in list(zip(queries.dataset, matches, strict=True))[:SHOWN_QUERIES]:
        tiles += [tile(record, "asked for", GOOD)]
        tiles += [tile(among.dataset[match.index], f"{match.cosine:.3f}") for match in row]
    one = len(queries) == 1
    columns = None if one else 1 + max((len(row) for row in matches[:SHOWN_QUERIES]), default=0)
    if not one:
        tiles = padded(tiles, [1 + len(row) for row in matches[:SHOWN_QUERIES]], columns)
    return contact_sheet(tiles, columns, cell=160, title=f"{sum(map(len, matches))} pictures like {len(queries)}, by {among.source}")


def padded(tiles, lengths, columns) -> list[Tile]:
    """Rows of equal length, empty tiles at their ends."""
    blank, out = Tile(Image.new("RGB", (8, 8), EDGE)), []
    for length in lengths:
        out += [*tiles[:length], *[blank] * (columns - length)]
        tiles = tiles[length:]
    return out


def tile(record: Record, line: str, colour: str = EDGE) -> Tile:
    name = printable(Path(record.path).name)
    try:
        return Tile(thumbnail(record, 160), (line, name), colour)
    except (ValueError, OSError):
        return Tile(Image.new("RGB", (160, 160), BAD), (line, name, "cannot be opened"), BAD)


def similar_words(queries: Features, among: Features, matches) -> str:
    lines = [f"{sum(map(len, matches))} pictures of {len(among)} are like {len(queries)} that were asked for."]
    for record, row in zip(queries.dataset, matches, strict=True):
        found = ", ".join(f"{printable(Path(among.dataset[m.index].path).name)} {m.cosine:.3f}" for m in row) or "nothing that is alike enough"
        lines.append(f"{printable(Path(record.path).name)}: {found}")
    return "\n".join(lines)


# -- groups -------------------------------------------------------------------------------------------------------------------------------------

SHOWN_GROUPS, SHOWN_MEMBERS = 24, 6


def grouped(features: Features, found: Clustering) -> tuple[list[Dataset], Dataset]:
    """(one dataset per group, the largest first; all pictures in their order). Each picture's flags say its group."""
    words = f"of {found.count} (silhouette {found.silhouette:.2f})"
    marked = [flagged(record, f"group {label + 1} {words}") for record, label in zip(features.dataset, found.labels, strict=True)]
    parts = [Dataset(tuple(marked[i] for i in found.members(label))) for label in range(found.count)]
    return parts, Dataset(tuple(marked), features.dataset.skipped)


def flagged(record: Record, flag: str) -> Record:
    return replace(record, flags=(*(f for f in record.flags if not f.startswith("group ")), flag))


def central(features: Features, members: Sequence[int]) -> list[int]:
    """The members, the most typical first."""
    middle = features.rows[list(members)].mean(0)
    return sorted(members, key=lambda i: -float(features.rows[i] @ middle))


def group_sheet(features: Features, found: Clustering) -> Image.Image:
    """A row for each group: its most typical pictures."""
    tiles: list[Tile] = []
    for label in range(min(found.count, SHOWN_GROUPS)):
        members = found.members(label)
        row = [tile(features.dataset[i], f"group {label + 1}, {len(members)}", GOOD if not place else EDGE)
               for place, i in enumerate(central(features, members)[:SHOWN_MEMBERS])]  # fmt: skip
        tiles += padded(row, [len(row)], SHOWN_MEMBERS)
    return contact_sheet(tiles, SHOWN_MEMBERS, cell=160, title=f"{found.count} groups of {len(features)} pictures, silhouette {found.silhouette:.2f}")


def group_words(features: Features, found: Clustering) -> str:
    lines = [f"{len(features)} pictures in {found.count} groups, silhouette {found.silhouette:.2f} (1: clear groups, 0: none).",
             f"Together they amount to {features.diversity:.1f} different pictures (Vendi score)."]  # fmt: skip
    for label in range(found.count):
        members = found.members(label)
        part = replace(features, dataset=Dataset(tuple(features.dataset[i] for i in members)), rows=features.rows[members])
        typical = printable(Path(features.dataset[central(features, members)[0]].path).name)
        own = float(np.mean([found.silhouettes[i] for i in members]))
        lines.append(f"group {label + 1}: {len(members)} pictures, {part.diversity:.1f} different, silhouette {own:.2f}, most typical {typical}")
    if len(found.tried) > 1:
        lines.append("silhouette by number of groups: " + ", ".join(f"{count}: {height:.2f}" for count, height in found.tried.items()))
    if found.count > 1 and found.silhouette < 0.1:
        lines.append("The groups run into each other: these pictures have no clear groups.")
    return "\n".join(lines)
