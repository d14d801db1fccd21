"""The files beside an image that carry its name: captions, masks, ratings.

cat.txt belongs to cat.png. So do cat.TXT and cat.png.txt, and accents may be written in one character or in two (NFC
and NFD), because systems change that when files are copied. A file of exactly the image's stem and ending counts first.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .file_endings import is_image_name
from .folder_listing import entry_is_folder


def compose_name(name: str) -> str:
    """The name with each accent in one character with its letter (NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@dataclass
class FolderNames:
    """The names of the files in one folder; links to nowhere count, so that they are reported."""

    files: set[str] = field(default_factory=set)
    by_key: dict[str, list[str]] = field(default_factory=dict)  # composed and in small letters -> names
    image_stems: set[str] = field(default_factory=set)  # composed, of what is read as an image
    image_names: set[str] = field(default_factory=set)  # the same with their endings

    @classmethod
    def of_folder(cls, folder) -> FolderNames:
        found = cls()
        with os.scandir(folder) as entries:
            found.files.update(entry.name for entry in entries if not entry_is_folder(entry))
        for name in sorted(found.files):
            composed = compose_name(name)
            found.by_key.setdefault(composed.lower(), []).append(name)
            if is_image_name(name):
                found.image_stems.add(os.path.splitext(composed)[0])
                found.image_names.add(composed)
        return found

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
    """Finds the files that belong to images. Each folder is listed once, at the first question."""

    def __init__(self):
        self.folders: dict[str, FolderNames] = {}

    def names_in(self, folder) -> FolderNames:
        folder = os.fspath(folder)
        if folder not in self.folders:
            self.folders[folder] = FolderNames.of_folder(folder)
        return self.folders[folder]

    def find(self, image: Path, endings: Sequence[str], whole_name: bool = True) -> Path | None:
        """The file beside the image that is called after it and ends in the first possible of these. whole_name: also
        after its name with its ending."""
        folder, name = os.path.split(image)
        found = self.names_in(folder or ".").find_companion(name, endings, whole_name)
        return None if found is None else image.with_name(found)
