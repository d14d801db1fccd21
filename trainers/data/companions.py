"""The files of a dataset's folders, each of which is listed once, and those beside an image that carry its name:
captions, masks, ratings.

cat.txt belongs to cat.png. So do cat.TXT and cat.png.txt, and accents may be written in one character or in two (NFC
and NFD), because systems change that when files are copied. A file of exactly the image's stem and ending counts first.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .file_endings import is_frame_folder_name, is_image_name, is_media_name
from .folder_listing import require_listing


def compose_name(name: str) -> str:
    """The name with each accent in one character with its letter (NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


CONTROL_STEM = re.compile(r"(?P<image>.+)(?:\.control|_control|_source)(?P<number>\d*)", re.IGNORECASE | re.DOTALL)


def find_control_owner(name: str, stems: set[str]) -> tuple[str, int] | None:
    """(stem of the image, number) where a file of this name is the control image of one of these; None otherwise."""
    match = CONTROL_STEM.fullmatch(compose_name(Path(name).stem))
    if match is None or match["image"] not in stems:
        return None
    return match["image"], int(match["number"] or 0)


@dataclass
class FolderNames:
    """The names in one folder. Links to nowhere count as files, so that they are reported."""

    folders: tuple[str, ...] = ()
    files: set[str] = field(default_factory=set)
    others: tuple[str, ...] = ()  # pipes and the like, which nobody opens
    images: list[str] = field(default_factory=list)  # of what is read as an image or a video, folders of frames too
    by_key: dict[str, list[str]] = field(default_factory=dict)  # files: composed and in small letters -> names
    image_stems: set[str] = field(default_factory=set)  # composed
    image_names: set[str] = field(default_factory=set)  # the same with their endings
    controls: dict[str, list[str]] = field(default_factory=dict)  # composed stem of an image -> its control images

    @classmethod
    def of_folder(cls, folder) -> FolderNames:
        listing = require_listing(folder)
        files = {name for names in (*listing.files.values(), listing.broken_links) for name in names}
        frames = [name for name in listing.folders if is_frame_folder_name(name)]
        found = cls(tuple(name for name in listing.folders if name not in frames), files, listing.others)
        for name in frames:
            found.add_image(name)
        for name in sorted(found.files):
            composed = compose_name(name)
            found.by_key.setdefault(composed.lower(), []).append(name)
            if is_media_name(name):
                found.add_image(name)
        found.set_controls_apart()
        return found

    def add_image(self, name: str) -> None:
        composed = compose_name(name)
        self.images.append(name)
        self.image_stems.add(os.path.splitext(composed)[0])
        self.image_names.add(composed)

    def set_controls_apart(self) -> None:
        """Control images that lie beside their image are no images to be learnt."""
        owners = {
            name: owner
            for name in self.images
            if is_image_name(name) and (owner := find_control_owner(name, self.image_stems))
        }
        if not owners:
            return
        for name in sorted(owners, key=lambda name: (owners[name], natural_sort_key(name))):
            self.controls.setdefault(owners[name][0], []).append(name)
            self.image_names.discard(compose_name(name))
        self.images = [name for name in self.images if name not in owners]
        self.image_stems = {os.path.splitext(compose_name(name))[0] for name in self.images}

    def find_stem_and_rest(self, stem: str, rest: str) -> str | None:
        """The file of this composed stem and whatever case of the rest."""
        candidates = self.by_key.get((stem + rest).lower(), ())
        return next((name for name in candidates if compose_name(name).startswith(stem)), None)

    def find_companion(self, image: str, endings: Sequence[str], whole_name: bool) -> str | None:
        """See `CompanionFiles.find`."""
        stem, own_ending = os.path.splitext(image)
        for ending in endings:
            if stem + ending in self.files:
                return stem + ending
        rests, stem = [*endings], compose_name(stem)
        if whole_name and compose_name(image) not in self.image_stems:  # else it is that image's own
            rests += [own_ending + ending for ending in endings]
        return next(filter(None, (self.find_stem_and_rest(stem, rest) for rest in rests)), None)


class CompanionFiles:
    """Finds the files that belong to images, and the folders and images in a folder. Each folder is listed once, at the
    first question."""

    def __init__(self):
        self.known: dict[str, FolderNames] = {}

    def names_in(self, folder) -> FolderNames:
        """Raises ValueError where the folder cannot be read."""
        folder = os.fspath(folder)
        if folder not in self.known:
            self.known[folder] = FolderNames.of_folder(folder)
        return self.known[folder]

    def list_subfolders(self, folder: Path) -> list[Path]:
        """The folders directly inside one, without hidden ones, in natural order."""
        names = [name for name in self.names_in(folder).folders if not name.startswith(".")]
        return [folder / name for name in sorted(names, key=natural_sort_key)]

    def list_images(self, folder: Path) -> list[Path]:
        """The images and videos directly inside a folder, in natural order."""
        return [folder / name for name in sorted(self.names_in(folder).images, key=natural_sort_key)]

    def find_controls(self, image: Path) -> tuple[Path, ...]:
        """The control images beside an image, in the order of their numbers."""
        names = self.names_in(image.parent).controls.get(compose_name(image.stem), ())
        return tuple(image.with_name(name) for name in names)

    def find(self, image: Path, endings: Sequence[str], whole_name: bool = True) -> Path | None:
        """The file beside the image that is called after it and ends in the first possible of these. whole_name: also
        after its name with its ending."""
        folder, name = os.path.split(image)
        found = self.names_in(folder or ".").find_companion(name, endings, whole_name)
        return None if found is None else image.with_name(found)


def natural_sort_key(name: str):
    """Sort key in which image 2 comes before image 10."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
