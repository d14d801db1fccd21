"""What a folder of images holds that is not read, each with the reason: nothing stays away silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .companions import CompanionFiles, compose_name
from .file_endings import (
    CONDITION_SUFFIX,
    UNREAD_IMAGE_ENDINGS,
    explain_unread_image,
    is_mask_name,
    is_media_name,
    strip_mask_suffix,
)
from .metadata import METADATA_FILES, format_count, format_first_names

MAX_TOLD_NAMES = 50
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl")
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")


@dataclass(frozen=True)
class Owners:
    """Names of the images that captions and masks of a folder may belong to, accents composed."""

    stems: set[str]
    names: set[str]  # in small letters

    def have(self, stem: str) -> bool:
        """Whether one has this stem, or this whole name."""
        return compose_name(stem) in self.stems or compose_name(stem).lower() in self.names


def list_unread_files(
    folder: Path, caption_endings: Sequence[str], companions: CompanionFiles, used: set[Path]
) -> Iterator[tuple[Path, str]]:
    """(file or folder, reason) of what lies in a folder beside its images and is not read. used: files that are."""
    names = companions.names_in(folder)
    owners = Owners(names.image_stems, {name.lower() for name in names.image_names})
    told: dict[str, list[str]] = {"mask": [], "condition": [], "caption": [], "table": [], "other": list(names.others)}
    for name in sorted(name for found in names.by_key.values() for name in found):
        file = folder / name
        if is_media_name(name) or file in used or name.startswith(".") or name.lower() in SYSTEM_FILES:
            continue
        kind = name_unread_kind(name, caption_endings, owners)
        if kind == "other" and (reason := explain_unread_image(file)):
            yield file, reason
        elif kind:
            told[kind].append(name)
    yield from ((folder, reason) for reason in explain_names(told))


def name_unread_kind(name: str, caption_endings: Sequence[str], owners: Owners) -> str | None:
    """What a file that is no image is; None for what belongs to an image, and for metadata files."""
    lower = name.lower()
    if lower.endswith(CONDITION_SUFFIX):
        return "condition"
    if is_mask_name(name):
        return None if owners.have(strip_mask_suffix(name)) else "mask"
    if name in METADATA_FILES or has_owner(name, (".score",), owners):
        return None
    if lower.endswith(".json") and compose_name(name[: -len(".json")]) in owners.stems:  # cat.png.json is not read
        return None
    if lower.endswith(tuple(caption_endings)):
        return None if has_owner(name, caption_endings, owners) else "caption"
    return "table" if lower.endswith(TABLE_ENDINGS) else "other"


def has_owner(name: str, endings: Sequence[str], owners: Owners) -> bool:
    """Whether the name is that of an image with one of these endings in place of its own, or behind it."""
    return any(name.lower().endswith(ending) and owners.have(name[: -len(ending)]) for ending in endings)


def explain_names(told: dict[str, list[str]]) -> Iterator[str]:
    """A sentence for each kind that there is."""
    shown = {kind: format_first_names(names, MAX_TOLD_NAMES) for kind, names in told.items()}
    if told["caption"]:
        yield f"no image for {format_count(told['caption'], 'text file')}: {shown['caption']}"
    if told["mask"]:
        yield f"no image for {format_count(told['mask'], 'mask')}: {shown['mask']}"
    if told["condition"]:
        yield f"not read, because -condlabel images only condition a model: {shown['condition']}"
    if told["table"]:
        yield f"not read: {shown['table']}; to read a table, give its name as metadata"
    if told["other"]:
        endings = Counter(Path(name).suffix.lower() or "without an ending" for name in told["other"])
        counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(8))
        yield f"{format_count(told['other'], 'other file')} not read: {counts}{', ...' if len(endings) > 8 else ''}"


def count_images_below(
    folder: Path, beside: Sequence[Path], used: set[Path], companions: CompanionFiles
) -> Counter[Path]:
    """The number of images in a folder and in those inside it that are not used; hidden folders, links and the folders
    of masks and control images are left out."""
    found: Counter[Path] = Counter()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            names = companions.names_in(here)
        except ValueError:  # it cannot be read
            continue
        waiting += [
            sub for sub in companions.list_subfolders(here) if not sub.is_symlink() and not is_one_of(sub, beside)
        ]
        count = sum(1 for name in names.files if looks_like_image(name) and here / name not in used)
        if count:
            found[here] = count
    return found


def looks_like_image(name: str) -> bool:
    return is_media_name(name) or (not name.startswith(".") and Path(name.lower()).suffix in UNREAD_IMAGE_ENDINGS)


def is_one_of(folder: Path, others: Sequence[Path]) -> bool:
    return any(folder.resolve() == other.resolve() for other in others)


def explain_nested_images(folder: Path, counts: Counter[Path], root: Path) -> str:
    """counts: of folders inside this one."""
    names = [place.relative_to(folder).as_posix() for place in counts]
    total = sum(counts.values())
    return (
        f"{total} image{'s'[: total != 1]} in {format_count(names, 'folder')} inside it not read "
        f"({format_first_names(sorted(names))}): only folders directly inside {root.name} are, named like 1_name"
    )
