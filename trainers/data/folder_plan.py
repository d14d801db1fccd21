"""Which folders of a dataset are read, which images lie in them, and which folders stay unread for which reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .companions import CompanionFiles, compose_name, natural_sort_key
from .file_endings import is_media_file
from .metadata import MAX_REPEATS, plain_relative_path
from .unread_files import count_images_below, explain_nested_images, is_one_of

KOHYA_FOLDER_NAME = re.compile(r"(\d+)_(.*)", re.DOTALL)
ZERO_REPEATS = "its name asks for 0 repeats"


@dataclass(frozen=True)
class ReadFolder:
    """A folder whose images are read."""

    folder: Path
    repeats: int
    caption: str | None  # of images without one


@dataclass(frozen=True)
class FolderPlan:
    """Which folders are read: the root first, then its kohya folders."""

    root: Path
    read: tuple[ReadFolder, ...]
    refused: dict[Path, str]  # the other folders directly inside the root, with the reason
    beside: tuple[Path, ...]  # folders of masks and of control images


@dataclass(frozen=True)
class FolderImage:
    """An image that is to be read."""

    file: Path
    repeats: int  # of its folder
    folder_caption: str | None  # the name of its folder, which serves as the caption of an image without one


def plan_folders(root: Path, beside: tuple[Path, ...], companions: CompanionFiles) -> FolderPlan:
    """Which folders are read, in natural order. beside: folders of masks and of control images, which are not."""
    read, refused = [ReadFolder(root, 1, None)], {}
    for folder in companions.list_subfolders(root):
        if is_one_of(folder, beside):
            continue
        try:
            read.append(parse_kohya_folder(folder, root))
        except ValueError as error:
            refused[folder] = str(error)
    return FolderPlan(root, tuple(read), refused, beside)


def parse_kohya_folder(folder: Path, root: Path) -> ReadFolder:
    """A subfolder called like 10_name. ValueError saying why it is not read."""
    match = KOHYA_FOLDER_NAME.fullmatch(folder.name)
    if not match:
        raise ValueError(
            f"its name does not begin with a number of repeats; name it 1_name to include its images, or name them in "
            f"a table in {root.name}"
        )
    if int(match[1]) == 0:
        raise ValueError(ZERO_REPEATS)
    if int(match[1]) > MAX_REPEATS:
        raise ValueError(f"its name asks for {match[1]} repeats; at most {MAX_REPEATS} are taken")
    if root.resolve().is_relative_to(folder.resolve()):
        raise ValueError("it is a link that leads back to the folder it lies in")
    return ReadFolder(folder, int(match[1]), match[2].strip())


def list_unread_folders(plan: FolderPlan, used: set[Path], companions: CompanionFiles) -> list[tuple[Path, str]]:
    """(folder, reason) of folders with images that are not read, and of numbered ones that cannot be."""
    found = []
    for folder in companions.list_subfolders(plan.root):
        if is_one_of(folder, plan.beside):
            continue
        if plan.root.resolve().is_relative_to(folder.resolve()):  # a link: what lies below it is the root again
            counts = Counter({folder: len(companions.list_images(folder))})
        else:
            counts = count_images_below(folder, plan.beside, used, companions)
        own = counts.pop(folder, 0)
        if folder in plan.refused and (own or KOHYA_FOLDER_NAME.fullmatch(folder.name)):
            found.append((folder, plan.refused[folder]))
        if counts:
            found.append((folder, explain_nested_images(folder, counts, plan.root)))
    return found


class NamedImages:
    """Images below the root that a table names, in folders that are not read otherwise."""

    def __init__(self, plan: FolderPlan, companions: CompanionFiles, by_file_name: bool):
        """by_file_name: a table of plain names may mean the images of a subfolder, because there are no others."""
        self.plan, self.companions, self.by_file_name = plan, companions, by_file_name
        self.found: dict[Path, FolderImage] = {}

    def locate(self, folder: Path, name: str) -> Path | None:
        """The image at this path from the folder of the table, with or without its ending. None for what lies outside
        the root. A plain name is of an image in the folders that are read, or in the only other one that has it."""
        path = plain_relative_path(name)
        if "/" in path:
            places = [folder]
        else:
            places = self.plan.refused if self.by_file_name else []
        try:
            found = [file for place in places if (file := self.find_image(place / path)) and self.may_read(file)]
        except (OSError, RuntimeError, ValueError):  # too long, a circle of links, a NUL
            return None
        if len(found) != 1:
            return None
        parent = self.find_read_folder(found[0])
        return self.found.setdefault(found[0], FolderImage(found[0], parent.repeats, parent.caption)).file

    def find_image(self, path: Path) -> Path | None:
        if not path.parent.is_dir():
            return None
        if is_media_file(path):
            return path
        names = self.companions.names_in(path.parent)
        same = [name for name in names.image_names if compose_name(path.name) in (name, Path(name).stem)]
        return path.with_name(names.by_key.get(same[0].lower(), same)[0]) if len(same) == 1 else None

    def may_read(self, file: Path) -> bool:
        """Whether it lies inside the root, and neither in a folder that asks for 0 repeats nor in one of masks or
        control images."""
        root = self.plan.root
        if not (file.is_relative_to(root) and file.resolve().is_relative_to(root.resolve())):
            return False
        top = root / file.relative_to(root).parts[0]
        return self.plan.refused.get(top) != ZERO_REPEATS and not any(
            is_below(file, folder) for folder in self.plan.beside
        )

    def find_read_folder(self, file: Path) -> ReadFolder:
        """The folder whose repeats and caption count for the image."""
        top = self.plan.root / file.relative_to(self.plan.root).parts[0]
        return next((one for one in self.plan.read[1:] if one.folder == top), self.plan.read[0])

    def list_new_images(self, files: Sequence[FolderImage]) -> list[FolderImage]:
        """Those that are not in the list, in natural order."""
        known = {listed.file for listed in files}
        return [self.found[file] for file in sorted(self.found, key=self.sort_key) if file not in known]

    def sort_key(self, file: Path):
        return [natural_sort_key(part) for part in file.relative_to(self.plan.root).parts]


def is_below(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())
