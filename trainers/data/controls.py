"""Control images: what an edit model is shown beside the noise, so that it learns the way from them to the image.

An image has any number of them, in this order: those beside it (cat.control.png, cat.control2.png, cat_source.png for
cat.png), or else those that a table names, or else those of a folder of control images (cat.png, cat_1.png).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .companions import CompanionFiles, compose_name, natural_sort_key
from .metadata import format_count, format_first_names

if TYPE_CHECKING:
    from .readers import SkippedFiles

NUMBERED_STEM = re.compile(r"(?P<image>.+)_(?P<number>\d+)", re.DOTALL)


def match_control_folder(
    root: Path, folder: Path, images: Iterable[Path], skipped: SkippedFiles, companions: CompanionFiles
) -> dict[Path, tuple[Path, ...]]:
    """Image -> its control images in a folder of them: of the same subfolder and stem, or stem_1, stem_2 ..., or else
    of the same stem alone. ValueError where none belongs to an image."""
    if folder.resolve() == root.resolve():
        raise ValueError(
            f"{folder} is the folder of the images themselves. Give a folder of its own to the control images, or name "
            "them name.control.png beside the images and choose no folder of control images."
        )
    known: dict[str, list[Path]] = {}
    files = [file for one in (folder, *companions.list_subfolders(folder)) for file in companions.list_images(one)]
    for file in sorted(files, key=lambda file: natural_sort_key(file.name)):
        known.setdefault(compose_name(file.relative_to(folder).with_suffix("").as_posix()), []).append(file)
    for stem in list(known):
        if numbered := NUMBERED_STEM.fullmatch(stem):
            known.setdefault(f"{numbered['image']}\0", []).extend(known[stem])
    found, used = {}, set()
    for image in images:
        whole = compose_name(image.relative_to(root).with_suffix("").as_posix())
        for stem in (whole, compose_name(image.stem)):
            if files_of_image := [*known.get(stem, ()), *known.get(f"{stem}\0", ())]:
                found[image] = tuple(files_of_image)
                used.update(files_of_image)
                break
    if not found:
        raise ValueError(
            f"No control image in {folder} has the name of an image in {root}; it holds "
            f"{format_first_names([file.name for file in files]) or 'no images'}. A control image is named like its "
            "image: cat.png for cat.jpg; several are cat_1.png, cat_2.png."
        )
    if unused := [file.name for file in files if file not in used]:
        skipped.add(folder, f"no image for {format_count(unused, 'control image')}: {format_first_names(unused)}")
    return found
