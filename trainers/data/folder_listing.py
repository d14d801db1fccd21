"""What lies in a folder: as it is now, or read again only when the folder has changed, since a page that is opened asks
for the files of every folder many times over."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

MAX_KNOWN_FOLDERS = 10_000
# A folder can change twice within one tick of the clock of its file system, which on FAT is this long. A younger
# listing is read again.
SETTLED_NS = 2 * 10**9


@dataclass(frozen=True)
class FolderListing:
    """Names of one folder, sorted. Links count as what they lead to."""

    folders: tuple[str, ...] = ()
    linked_folders: frozenset[str] = frozenset()  # those of them that are links
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by their ending, in small letters
    broken_links: tuple[str, ...] = ()  # to nowhere, or in a circle
    others: tuple[str, ...] = ()  # pipes and the like

    def files_ending_in(self, endings) -> list[str]:
        """The names of all files with one of these endings, sorted."""
        return sorted(name for ending, names in self.files.items() if ending in endings for name in names)


KNOWN_FOLDERS: dict[str, tuple[int, FolderListing]] = {}  # by path: (mtime in ns, listing)


def list_folder(folder) -> FolderListing:
    """What lies in the folder now; nothing where it cannot be read."""
    path = os.fspath(folder)
    try:
        changed = os.stat(path).st_mtime_ns
        known = KNOWN_FOLDERS.get(path)
        if known and known[0] == changed:
            return known[1]
        KNOWN_FOLDERS.pop(path, None)
        listing = read_listing(path)
    except OSError:
        KNOWN_FOLDERS.pop(path, None)
        return FolderListing()
    # what a broken link leads to may come to be at any time
    if not listing.broken_links and time.time_ns() - changed > SETTLED_NS:
        while len(KNOWN_FOLDERS) >= MAX_KNOWN_FOLDERS:
            KNOWN_FOLDERS.pop(next(iter(KNOWN_FOLDERS)), None)
        KNOWN_FOLDERS[path] = changed, listing
    return listing


def read_listing(path) -> FolderListing:
    """What lies in the folder. Raises OSError where it cannot be read."""
    folders, linked, files, broken, others = [], set(), {}, [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry_is_folder(entry):
                folders.append(entry.name)
                if entry.is_symlink():
                    linked.add(entry.name)
            elif entry_is_file(entry):
                files.setdefault(os.path.splitext(entry.name)[1].lower(), []).append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry):
                broken.append(entry.name)
            else:
                others.append(entry.name)
    by_ending = {ending: tuple(sorted(names)) for ending, names in files.items()}
    return FolderListing(
        tuple(sorted(folders)), frozenset(linked), by_ending, tuple(sorted(broken)), tuple(sorted(others))
    )


def require_listing(folder) -> FolderListing:
    """What lies in the folder now. Raises ValueError where it cannot be read."""
    try:
        return read_listing(folder)
    except OSError as error:
        raise ValueError(
            f"The folder {folder} cannot be read ({error.strerror or error}). Check its permissions."
        ) from error


def entry_is_folder(entry: os.DirEntry) -> bool:
    """As Path.is_dir: False for a circle of links, where entry.is_dir raises."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def entry_is_file(entry: os.DirEntry) -> bool:
    """The same of Path.is_file."""
    try:
        return entry.is_file()
    except OSError:
        return False
