"""Datasets put together and taken apart. What goes where depends on each image's content, not on its place in the
list."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from ..settings import Settings, choice_field, number_field, switch_field
from .metadata import MAX_REPEATS, format_raw_value
from .records import ImageDataset, ImageRecord

SPLIT_BY_IMAGE, SPLIT_BY_FILE_NAME, SPLIT_BY_FOLDER, SPLIT_AS_MARKED = "picture", "file name", "folder", "as marked"
COPY_SUFFIX = re.compile(r"[ _.-]*(\(\d+\)|copy|\d+)$", re.IGNORECASE)


# -- put together ------------------------------------------------------------------------------------------------------


def join_datasets(
    datasets: Sequence[ImageDataset], weights: Sequence[Fraction | float | int] | None = None
) -> ImageDataset:
    """One dataset of them all, in order. With weight w every image of a dataset is seen w times as often; fractions
    become whole repeats by the smallest common factor, so that 1 and 0.5 are 2 and 1 repeats."""
    if not datasets:
        raise ValueError("There is no dataset to join. Connect at least one.")
    factors = [Fraction(1)] * len(datasets) if weights is None else [parse_dataset_weight(weight) for weight in weights]
    if len(factors) != len(datasets):
        raise ValueError(
            f"There are {len(datasets)} datasets and {len(factors)} weights. Give one weight for each dataset, or none."
        )
    shares = [record.repeats * factor for dataset, factor in zip(datasets, factors, strict=True) for record in dataset]
    common = math.lcm(*(share.denominator for share in shares)) if shares else 1
    if max(shares, default=0) * common > max(
        MAX_REPEATS, *(record.repeats for dataset in datasets for record in dataset)
    ):
        raise ValueError(
            f"These weights ask for up to {max(shares) * common} repeats of one image, and {MAX_REPEATS} is the "
            "most. Use simpler ones, such as 1, 0.5, 2."
        )
    records = [record for dataset in datasets for record in dataset]
    seen = tuple(replace(record, repeats=int(share * common)) for record, share in zip(records, shares, strict=True))
    return ImageDataset(seen, tuple(dict.fromkeys(entry for dataset in datasets for entry in dataset.skipped)))


def parse_dataset_weight(weight) -> Fraction:
    fraction = Fraction(weight) if isinstance(weight, (int, Fraction)) else Fraction(str(weight))
    if fraction <= 0:
        raise ValueError(f"A weight is {weight}; it must be above 0. To leave a dataset out, disconnect it.")
    return fraction


def parse_dataset_weights(text: str, datasets: int) -> list[Fraction]:
    """The weights in a text such as `1, 0.5, 1/3`; no text means 1 for each."""
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    try:
        weights = [Fraction(word) for word in words]
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"The weights are {format_raw_value(text)}; write one number for each dataset, such as 1, 0.5, 2."
        ) from error
    return weights or [Fraction(1)] * datasets


def find_repeated_images(dataset: ImageDataset) -> list[tuple[str, str]]:
    """(first path, path) of every image whose bytes were there already."""
    paths: dict[str, list[str]] = {}
    for record in dataset:
        paths.setdefault(record.id, []).append(record.path)
    return [(first, path) for first, *others in paths.values() for path in others]


# -- taken apart -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SplitSettings(Settings):
    """Which images are kept away from training, to measure on."""

    share: float = number_field(0.1, 0.0, 1.0, "Share of the images for validation, at least one.", step=0.05)
    pictures: int = number_field(
        0,
        0,
        1_000_000,
        "Number of images for validation, instead of a share. 0 uses the share.",
        unit="images",
    )
    by: str = choice_field(
        SPLIT_BY_IMAGE,
        (SPLIT_BY_IMAGE, SPLIT_BY_FILE_NAME, SPLIT_BY_FOLDER, SPLIT_AS_MARKED),
        "What stays together: each image on its own; files whose names differ only in a number at the end; "
        "folders. as marked: the split in the metadata.",
    )
    seed: int = number_field(
        0, 0, 2**63 - 1, "Another seed holds out other images. The same seed always gives the same split."
    )
    similar: bool = switch_field(
        True,
        "Near-duplicates stay on one side, so that no copy of a training image is used for measurement. "
        "Opens every image once.",
    )


def split_dataset(
    dataset: ImageDataset, settings: SplitSettings, groups: Mapping[str, str] | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """(train, validation), with Record.split set. Each image's side comes from its content and the seed alone, so
    adding images to a dataset moves no other one; only a set number of `images` may give one group back for
    another.

    groups: names by record id of what must stay together, as from `similar`; pairs always do, and so do equal files."""
    chosen = (
        is_marked_for_validation(dataset)
        if settings.by == SPLIT_AS_MARKED
        else sample_validation_split(dataset, settings, groups or {})
    )
    sides = {"train": [], "validation": []}
    for record, held in zip(dataset, chosen, strict=True):
        side = "validation" if held else "train"
        sides[side].append(replace(record, split=side))
    if not all(sides.values()):
        raise ValueError(format_empty_split(dataset, settings, len(sides["validation"])))
    return ImageDataset(tuple(sides["train"]), dataset.skipped), ImageDataset(tuple(sides["validation"]))


def is_marked_for_validation(dataset: ImageDataset) -> list[bool]:
    return [record.split != "train" for record in dataset]


def sample_validation_split(dataset: ImageDataset, settings: SplitSettings, groups: Mapping[str, str]) -> list[bool]:
    """Whether each record goes to validation: the groups of the lowest draws."""
    names = name_split_groups(dataset, settings.by, groups)
    sizes = Counter(names)
    order = sorted(sizes, key=lambda name: hash_to_unit_interval(name, settings.seed))
    if settings.pictures:
        before = itertools.accumulate((sizes[name] for name in order), initial=0)
        held = {name for name, count in zip(order, before, strict=False) if count < settings.pictures}
    else:
        held = {name for name in order if hash_to_unit_interval(name, settings.seed) < settings.share} or set(
            order[: settings.share > 0]
        )
    return [name in held for name in names]


def hash_to_unit_interval(name: str, seed: int) -> float:
    """A number in [0, 1) that belongs to this name and seed."""
    digest = hashlib.blake2b(f"split/{seed}/{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def name_split_groups(dataset: ImageDataset, by: str, groups: Mapping[str, str]) -> list[str]:
    """One name per record; records of the same name stay together. Ties of several kinds are followed through: a
    image that shares its file name with a second one and its pair with a third one ties all three."""
    leader: dict[str, str] = {}

    def lead(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for record in dataset:
        first, *others = (lead(name) for name in split_group_keys(record, by, groups))
        leader.update(dict.fromkeys(others, first))
    known: dict[
        str, str
    ] = {}  # a group is called after the first of its ties in the alphabet, so that new members do not rename it
    for name in sorted(leader):
        known.setdefault(lead(name), name)
    return [known[lead(split_group_keys(record, by, groups)[0])] for record in dataset]


def split_group_keys(record: ImageRecord, by: str, groups: Mapping[str, str]) -> list[str]:
    """Names that a record shares with those it must stay with; equal bytes are always one of them."""
    found = {
        SPLIT_BY_FILE_NAME: f"file/{strip_copy_suffix(record)}",
        SPLIT_BY_FOLDER: f"folder/{Path(record.path).parent.name}",
    }
    return [
        f"picture/{record.id}",
        *([f"picture/{record.video.id}"] if record.video else []),  # clips of one video show the same things
        *([found[by]] if by in found else []),
        *([f"pair/{record.pair}"] if record.pair is not None else []),
        *([f"group/{groups[record.id]}"] if record.id in groups else []),
    ]


def strip_copy_suffix(record: ImageRecord) -> str:
    """The file's stem without a number or 'copy' at its end: cat_1, cat (2) and cat copy are cat."""
    stem = Path(record.path).stem.casefold()
    return COPY_SUFFIX.sub("", stem) or stem


def format_empty_split(dataset: ImageDataset, settings: SplitSettings, held: int) -> str:
    if settings.by == SPLIT_AS_MARKED:
        return (
            f"{held} of {len(dataset)} images are marked for validation by their metadata, so one side would be "
            "empty. Name a split in metadata.jsonl or metadata.csv, or split by picture."
        )
    asked = f"{settings.pictures} images" if settings.pictures else f"a share of {settings.share}"
    return (
        f"{asked} of {len(dataset)} images (kept together by {settings.by}) leaves {len(dataset) - held} to train on "
        f"and {held} to validate on; each side needs one. Ask for another number, or split by picture."
    )
