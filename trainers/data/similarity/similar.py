"""Images by what is seen in them: one row of numbers each, which of them are alike, the groups they form, and sheets
to see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...settings import Settings, number_field, text_field
from ..contact_sheet import BAD_COLOUR, GOOD_COLOUR, NEUTRAL_COLOUR, SheetTile, draw_contact_sheet, make_thumbnail
from ..readers import make_printable
from ..records import ImageDataset, ImageRecord
from .clusters import Clustering
from .diversity import sample_evenly, vendi_from_features


@dataclass(frozen=True)
class ImageFeatures:
    """One row of unit length per image of a dataset, and what saw them."""

    dataset: ImageDataset
    rows: np.ndarray  # (n, d) float32
    source: str  # for the person: "CLIP_VISION"
    kind: str = ""  # changes with what saw them; rows of different kinds cannot be compared

    def __post_init__(self):
        if len(self.rows) != len(self.dataset):
            raise ValueError(f"There are {len(self.dataset)} images and {len(self.rows)} rows of features.")

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def diversity(self) -> float:
        """How many different images they amount to (Vendi score)."""
        return vendi_from_features(np.stack(sample_evenly(self.rows))) if len(self) else 0.0


def unit_rows(rows) -> np.ndarray:
    """(n, d) float32, each row of unit length."""
    rows = np.asarray(rows, np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)).astype(np.float32)


# -- which are alike ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SimilarSettings(Settings):
    """Which images are looked for."""

    most: int = number_field(12, 1, 200, "Number of matches per query.", unit="images")
    least: float = number_field(
        0.0, -1.0, 1.0, "Images below this cosine similarity are not listed. Copies have 0.95 and more.", step=0.01
    )
    name: str = text_field(
        "",
        "File name of the query, or a part of it. Empty: the first image, or all of queries.",
    )


@dataclass(frozen=True)
class SimilarityMatch:
    """An image of the set that is like one that was asked for."""

    index: int
    cosine: float


def select_query_images(features: ImageFeatures, name: str, everything: bool) -> ImageFeatures:
    """The images whose file name holds `name`; without a name the first one, or everything. ValueError where there is
    none."""
    positions = [i for i, r in enumerate(features.dataset) if name.strip().lower() in Path(r.path).name.lower()]
    positions = positions if everything or name.strip() else positions[:1]
    if not positions:
        raise ValueError(f"No file name of {len(features)} images holds {name!r}. Write a part of one, or nothing.")
    return replace(
        features, dataset=ImageDataset(tuple(features.dataset[i] for i in positions)), rows=features.rows[positions]
    )


def find_similar_images(
    queries: ImageFeatures, among: ImageFeatures, most: int, least: float = -1.0
) -> list[list[SimilarityMatch]]:
    """For each query the images that are most like it, best first, without the image itself (its own bytes)."""
    if queries.kind != among.kind or queries.rows.shape[1:] != among.rows.shape[1:]:
        raise ValueError(
            f"These features cannot be compared: one side was seen by {queries.source}, the other by {among.source}, "
            "or by another model of that kind. Extract both with the same one."
        )
    likeness = queries.rows @ among.rows.T
    return [
        top_matches(record.id, row, among, most, least) for record, row in zip(queries.dataset, likeness, strict=True)
    ]


def top_matches(id_: str, row, among: ImageFeatures, most: int, least: float) -> list[SimilarityMatch]:
    order = np.argsort(-row, kind="stable").tolist()
    return [SimilarityMatch(i, float(row[i])) for i in order if among.dataset[i].id != id_ and row[i] >= least][:most]


def collect_matched_images(among: ImageFeatures, matches: Sequence[Sequence[SimilarityMatch]]) -> ImageDataset:
    """Every image that was found, once, the likest first."""
    order = sorted((match for row in matches for match in row), key=lambda match: -match.cosine)
    return ImageDataset(tuple(among.dataset[i] for i in dict.fromkeys(match.index for match in order)))


MAX_SHEET_QUERIES = 12


def draw_similarity_sheet(
    queries: ImageFeatures, among: ImageFeatures, matches: Sequence[Sequence[SimilarityMatch]]
) -> Image.Image:
    """Each image that was asked for, framed, and after it those that are like it, with their cosines."""
    tiles = []
    for record, row in list(zip(queries.dataset, matches, strict=True))[:MAX_SHEET_QUERIES]:
        tiles += [make_similarity_tile(record, "asked for", GOOD_COLOUR)]
        tiles += [make_similarity_tile(among.dataset[match.index], f"{match.cosine:.3f}") for match in row]
    one = len(queries) == 1
    columns = None if one else 1 + max((len(row) for row in matches[:MAX_SHEET_QUERIES]), default=0)
    if not one:
        tiles = pad_tile_rows(tiles, [1 + len(row) for row in matches[:MAX_SHEET_QUERIES]], columns)
    return draw_contact_sheet(
        tiles, columns, cell=160, title=f"{sum(map(len, matches))} images like {len(queries)}, by {among.source}"
    )


def pad_tile_rows(tiles, lengths, columns) -> list[SheetTile]:
    """Rows of equal length, empty tiles at their ends."""
    blank, out = SheetTile(Image.new("RGB", (8, 8), NEUTRAL_COLOUR)), []
    for length in lengths:
        out += [*tiles[:length], *[blank] * (columns - length)]
        tiles = tiles[length:]
    return out


def make_similarity_tile(record: ImageRecord, line: str, colour: str = NEUTRAL_COLOUR) -> SheetTile:
    name = make_printable(Path(record.path).name)
    try:
        return SheetTile(make_thumbnail(record, 160), (line, name), colour)
    except (ValueError, OSError):
        return SheetTile(Image.new("RGB", (160, 160), BAD_COLOUR), (line, name, "cannot be opened"), BAD_COLOUR)


def format_similarity_report(queries: ImageFeatures, among: ImageFeatures, matches) -> str:
    lines = [f"{sum(map(len, matches))} images of {len(among)} are like {len(queries)} that were asked for."]
    for record, row in zip(queries.dataset, matches, strict=True):
        found = (
            ", ".join(f"{make_printable(Path(among.dataset[m.index].path).name)} {m.cosine:.3f}" for m in row)
            or "nothing that is alike enough"
        )
        lines.append(f"{make_printable(Path(record.path).name)}: {found}")
    return "\n".join(lines)


# -- groups ------------------------------------------------------------------------------------------------------------

MAX_SHEET_CLUSTERS, MAX_CLUSTER_TILES = 24, 6


def split_by_cluster(features: ImageFeatures, found: Clustering) -> tuple[list[ImageDataset], ImageDataset]:
    """(one dataset per group, the largest first; all images in their order). Each image's flags say its group."""
    words = f"of {found.count} (silhouette {found.silhouette:.2f})"
    marked = [
        set_cluster_flag(record, f"group {label + 1} {words}")
        for record, label in zip(features.dataset, found.labels, strict=True)
    ]
    parts = [ImageDataset(tuple(marked[i] for i in found.members(label))) for label in range(found.count)]
    return parts, ImageDataset(tuple(marked), features.dataset.skipped)


def set_cluster_flag(record: ImageRecord, flag: str) -> ImageRecord:
    return replace(record, flags=(*(f for f in record.flags if not f.startswith("group ")), flag))


def sort_by_centrality(features: ImageFeatures, members: Sequence[int]) -> list[int]:
    """The members, the most typical first."""
    middle = features.rows[list(members)].mean(0)
    return sorted(members, key=lambda i: -float(features.rows[i] @ middle))


def draw_clusters_sheet(features: ImageFeatures, found: Clustering) -> Image.Image:
    """A row for each group: its most typical images."""
    tiles: list[SheetTile] = []
    for label in range(min(found.count, MAX_SHEET_CLUSTERS)):
        members = found.members(label)
        row = [
            make_similarity_tile(
                features.dataset[i],
                f"group {label + 1}, {len(members)}",
                GOOD_COLOUR if not position else NEUTRAL_COLOUR,
            )
            for position, i in enumerate(sort_by_centrality(features, members)[:MAX_CLUSTER_TILES])
        ]
        tiles += pad_tile_rows(row, [len(row)], MAX_CLUSTER_TILES)
    return draw_contact_sheet(
        tiles,
        MAX_CLUSTER_TILES,
        cell=160,
        title=f"{found.count} groups of {len(features)} images, silhouette {found.silhouette:.2f}",
    )


def format_clusters_report(features: ImageFeatures, found: Clustering) -> str:
    lines = [
        f"{len(features)} images in {found.count} groups, silhouette {found.silhouette:.2f} (1: clear groups, 0: "
        "none).",
        f"Together they amount to {features.diversity:.1f} different images (Vendi score).",
    ]
    for label in range(found.count):
        members = found.members(label)
        part = replace(
            features, dataset=ImageDataset(tuple(features.dataset[i] for i in members)), rows=features.rows[members]
        )
        typical = make_printable(Path(features.dataset[sort_by_centrality(features, members)[0]].path).name)
        own = float(np.mean([found.silhouettes[i] for i in members]))
        lines.append(
            f"group {label + 1}: {len(members)} images, {part.diversity:.1f} different, silhouette {own:.2f}, most "
            f"typical {typical}"
        )
    if len(found.tried) > 1:
        lines.append(
            "silhouette by number of groups: "
            + ", ".join(f"{count}: {height:.2f}" for count, height in found.tried.items())
        )
    if found.count > 1 and found.silhouette < 0.1:
        lines.append("The groups run into each other: these images have no clear groups.")
    return "\n".join(lines)
