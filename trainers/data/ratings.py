"""Ratings of images: from files beside them, from folder names, from lists of better and worse; and what is kept by
them.

A rating is a number on any scale. metadata files and .json sidecars may hold one as `score`; `cat.score` beside
`cat.png` holds nothing else, and counts before them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..settings import Settings, choice_field, number_field, switch_field
from .companions import CompanionFiles
from .metadata import (
    ImageNameIndex,
    format_count,
    format_first_names,
    parse_finite_number,
    read_text_file,
    shorten_value,
)
from .readers import make_printable, read_folder, require_folder
from .records import ImageDataset
from .tables import first_filled_line, read_text_table
from .unread_files import count_images_below, explain_nested_images

RATINGS_IN_FILES, RATINGS_IN_FOLDER_NAMES = RATING_SOURCES = ("files", "folder names")
RATED_FOLDER_NAME = re.compile(r"([+-]?\d+(?:\.\d+)?)_.*|([+-]?\d+(?:\.\d+)?)", re.DOTALL)
BETTER_COLUMN, WORSE_COLUMN = "better", "worse"
MIN_RATED_IMAGES = 20


# -- reading -----------------------------------------------------------------------------------------------------------


def read_rated_folder(folder, source: str = RATINGS_IN_FILES, progress=None, facts_file=None) -> ImageDataset:
    """The images of a folder with their ratings. files: as `read_folder`, and .score files. folder names: of
    subfolders such as `7.5_name` or `7.5`; the number is the rating, and no image is repeated."""
    if source not in RATING_SOURCES:
        raise ValueError(f"The source of ratings is {source!r}; choose one of {', '.join(RATING_SOURCES)}.")
    if source == RATINGS_IN_FOLDER_NAMES:
        return read_folder_name_ratings(folder, progress, facts_file)
    return add_sidecar_scores(read_folder(folder, progress=progress, facts_file=facts_file))


def add_sidecar_scores(dataset: ImageDataset) -> ImageDataset:
    """The dataset with the ratings of .score files. A broken one takes its image out, with the reason."""
    records, skipped, companions = [], list(dataset.skipped), CompanionFiles()
    for record in dataset:
        file = companions.find(Path(record.path), (".score",))
        try:
            records.append(replace(record, score=read_score_file(file)) if file else record)
        except ValueError as error:
            skipped.append((record.path, str(error)))
    return ImageDataset(tuple(records), tuple(skipped))


def read_score_file(file: Path) -> float:
    text = read_text_file(file, "rating").strip()
    score = parse_finite_number(text)
    if score is None:
        raise ValueError(f"The rating {file} holds {shorten_value(repr(text))}; it must hold one number, such as 7.5.")
    return score


def read_folder_name_ratings(folder, progress=None, facts_file=None) -> ImageDataset:
    root, companions = require_folder(folder), CompanionFiles()
    with_images = [sub for sub in companions.list_subfolders(root) if companions.list_images(sub)]
    rated = [(sub, RATED_FOLDER_NAME.fullmatch(sub.name)) for sub in with_images]
    named = [(sub, float(match[1] or match[2])) for sub, match in rated if match]
    if not named:
        raise ValueError(
            f"No folder in {root} is named after a rating. Name them 7.5_name or 7.5, with the images inside."
        )
    read = lambda sub: read_folder(sub, progress=progress, facts_file=facts_file)
    parts = [set_uniform_score(read(sub), score) for sub, score in named]
    missed = [(str(sub), "its name does not begin with a rating such as 7.5_") for sub, match in rated if not match]
    missed += list_nested_folders(root, with_images, companions)
    loose = [(str(file), "it lies in no folder that is called after a rating") for file in companions.list_images(root)]
    return ImageDataset(
        tuple(r for part in parts for r in part), tuple([*(s for part in parts for s in part.skipped), *missed, *loose])
    )


def list_nested_folders(root: Path, rated: list[Path], companions: CompanionFiles) -> list[tuple[str, str]]:
    """(folder, reason) of folders that hold images only in folders of their own."""
    others = [sub for sub in companions.list_subfolders(root) if sub not in rated]
    counted = [(sub, count_images_below(sub, (), set(), companions)) for sub in others]
    return [(str(sub), explain_nested_images(sub, counts, root)) for sub, counts in counted if counts]


def set_uniform_score(dataset: ImageDataset, score: float) -> ImageDataset:
    return replace(dataset, records=tuple(replace(record, score=score) for record in dataset))


def read_preference_table(file, paths: Sequence[str]) -> list[tuple[int, int]]:
    """(better, worse) as indices into paths, from a table with the columns better and worse that name images.

    ValueError for names that no single image has, and for an image that is better than itself."""
    file, found, unknown = Path(file), [], []
    names = ImageNameIndex([Path(path) for path in paths], file.parent)
    positions = {Path(path): index for index, path in enumerate(paths)}
    for where, row in read_preference_rows(file):
        sides = [names.find(row[side]) for side in (BETTER_COLUMN, WORSE_COLUMN)]
        if any(len(side) != 1 for side in sides):
            unknown += [
                row[name] for name, side in zip((BETTER_COLUMN, WORSE_COLUMN), sides, strict=True) if len(side) != 1
            ]
            continue
        better, worse = (positions[side[0]] for side in sides)
        if better == worse:
            raise ValueError(f"{file}, {where} says that {row[BETTER_COLUMN]} is better than itself. Name two images.")
        found.append((better, worse))
    if unknown:
        raise ValueError(
            f"{file} names {format_count(sorted(set(unknown)), 'image')} that the dataset does not hold, or holds "
            f"several times: {format_first_names(sorted(set(unknown)))}. Write the file names, or paths from the "
            "folder of that file."
        )
    if not found:
        raise ValueError(f"{file} holds no pair. Below its first line, better,worse, each line names two images.")
    return found


def read_preference_rows(file: Path) -> list[tuple[str, dict[str, str]]]:
    text = read_text_file(file, "list of pairs", 64 << 20)
    table = read_text_table(text)
    if not {BETTER_COLUMN, WORSE_COLUMN} <= set(table.columns):
        raise ValueError(
            f"{file} begins with {shorten_value(repr(first_filled_line(text)))}; its first line must name the columns: "
            "better,worse."
        )
    if table.error:
        raise ValueError(f"{file}, {table.error}. Mend that line.")
    rows = [(row.where, {k: row.cells.get(k, "") for k in (BETTER_COLUMN, WORSE_COLUMN)}) for row in table.rows]
    if empty := [where for where, row in rows if not all(row.values())]:
        raise ValueError(f"{file}, {empty[0]} names fewer than two images.")
    return rows


# -- checking ----------------------------------------------------------------------------------------------------------


def check_ratings(names: Sequence[str], scores: Sequence[float | None], few: bool = False) -> None:
    """ValueError for no ratings, too few, or all the same."""
    rated = [score for score in scores if score is not None]
    if not rated:
        raise ValueError(
            f"None of the {len(scores)} images has a rating: "
            f"{format_first_names([make_printable(Path(n).name) for n in names])}. Write a number into cat.score "
            "beside cat.png, a column score into metadata.csv, or put images into folders such as 7.5_name; then "
            "read them with Load Rated Pictures."
        )
    check_rated_count(len(rated), few)
    if len(set(rated)) == 1:
        raise ValueError(
            f"All {len(rated)} ratings are {rated[0]:g}, so there is nothing to learn from them. Rate some images "
            "lower and some higher."
        )


def check_rated_count(rated: int, few: bool) -> None:
    if rated < 2 or (rated < MIN_RATED_IMAGES and not few):
        raise ValueError(
            f"{rated} images are rated. So few can show that a graph runs; they cannot tell a taste from chance: "
            f"with {MIN_RATED_IMAGES} the order is known to about +-0.45 in Spearman's correlation, with 100 to "
            f"+-0.2. Rate at least {MIN_RATED_IMAGES}, better 200, or switch few on to try it out."
        )


# -- keeping by score --------------------------------------------------------------------------------------------------

SELECT_SHARE, SELECT_THRESHOLD, SELECT_NUMBER = "share", "threshold", "number"


@dataclass(frozen=True, kw_only=True)
class RankSettings(Settings):
    """Which images stay."""

    by: str = choice_field(
        SELECT_SHARE,
        (SELECT_SHARE, SELECT_THRESHOLD, SELECT_NUMBER),
        "share: a fraction of the images. threshold: those with at least this score. number: a fixed number.",
    )
    share: float = number_field(0.5, 0.0, 1.0, "With by = share: the fraction of the images to keep.", step=0.05)
    threshold: float = number_field(
        5.0,
        -10_000.0,
        10_000.0,
        "With by = threshold: the lowest score to keep, on the scale of the scores.",
        step=0.1,
    )
    number: int = number_field(100, 1, 1_000_000, "With by = number: how many images to keep.", unit="images")
    lowest: bool = switch_field(False, "Keep the lowest scores instead of the highest.")
    keep_order: bool = switch_field(True, "On: keep the original order. Off: best first.")


def set_image_scores(dataset: ImageDataset, scores: Sequence[float]) -> ImageDataset:
    """The dataset with these scores, one for each image."""
    if len(scores) != len(dataset):
        raise ValueError(
            f"There are {len(dataset)} images and {len(scores)} scores. Connect the scores of these images."
        )
    return replace(dataset, records=tuple(replace(r, score=float(s)) for r, s in zip(dataset, scores, strict=True)))


def select_by_score(dataset: ImageDataset, settings: RankSettings) -> tuple[ImageDataset, ImageDataset]:
    """(what stays, what goes). Ties stay in the order they came in."""
    if unrated := [make_printable(Path(r.path).name) for r in dataset if r.score is None]:
        raise ValueError(
            f"{format_count(unrated, 'image')} of {len(dataset)} have no score: {format_first_names(unrated)}. Put "
            "Score Images before this node."
        )
    scores = [r.score for r in dataset if r.score is not None]
    sign = 1 if settings.lowest else -1
    order = sorted(range(len(dataset)), key=lambda i: sign * scores[i])
    stays = order[: count_selected_images(dataset, settings)]
    if not stays:
        reach = f"; the scores go from {min(scores):g} to {max(scores):g}" if scores else ""
        raise ValueError(
            f"No image of {len(dataset)} is kept with {settings.by} = {getattr(settings, settings.by):g}{reach}. "
            "Choose another value."
        )
    goes = order[len(stays) :]
    if settings.keep_order:
        stays, goes = sorted(stays), sorted(goes)
    kept, left = (ImageDataset(tuple(dataset[i] for i in some_), dataset.skipped) for some_ in (stays, goes))
    return kept, left


def count_selected_images(dataset: ImageDataset, settings: RankSettings) -> int:
    if settings.by == SELECT_SHARE:
        return round(settings.share * len(dataset))
    if settings.by == SELECT_NUMBER:
        return settings.number
    inside = (lambda s: s <= settings.threshold) if settings.lowest else (lambda s: s >= settings.threshold)
    return sum(inside(record.score) for record in dataset)
