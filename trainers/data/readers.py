"""From folders to datasets: images, same-stem captions and masks, kohya's `N_name` folders, in natural order.

A broken file is reported in Dataset.skipped and left out, or raised with strict=True; it is never left out silently.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from .records import Dataset, Record, has_alpha, sha1

MASK = ".mask.png"
KOHYA = re.compile(r"(\d+)_(.*)", re.DOTALL)
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Layout:
    """What a folder is read with."""

    caption_extension: str
    alpha_mask: bool


def read_folder(
    path,
    caption_extension: str = ".txt",
    repeats: int = 1,
    alpha_mask: bool = False,
    strict: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Dataset:
    """The images of a folder and of its `N_name` subfolders (seen N times as often; name is the caption of images without one).

    alpha_mask: images with transparency and no `name.mask.png` beside them use their alpha as the loss mask.
    progress(done, total, file name) is called after each file and may raise to stop.
    """
    root = existing(path)
    files, skipped = listing(root, repeats)
    if not files:
        raise ValueError(nothing_found(root, skipped))
    layout = Layout(caption_extension, alpha_mask)
    records = []
    for done, (file, times, name) in enumerate(files, 1):
        try:
            records.append(read_record(file, times, name, layout))
        except (ValueError, OSError) as error:
            if strict:
                raise
            skipped.append((str(file), str(error)))
        if progress:
            progress(done, len(files), file.name)
    if not records:
        reasons = "; ".join(reason for _, reason in skipped[:3])
        raise ValueError(f"None of the {len(files)} images in {root} can be used: {reasons}")
    return Dataset(tuple(records), tuple(skipped))


def folder_state(path) -> str:
    """A hash of every name, size and time in the folder and its `N_name` subfolders: cheap to ask whether to read it again."""
    root = existing(path)
    folders = [root, *(folder for folder, _, _ in kohya_folders(root))]
    stats = [(str(file.relative_to(root)), file.stat()) for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    lines = "\n".join(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.blake2b(lines.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def require_captions(dataset: Dataset) -> None:
    """ValueError naming the first images that have no caption."""
    bare = [Path(record.path).name for record in dataset if not any(caption.strip() for caption in record.captions)]
    if bare:
        names = ", ".join(bare[:5]) + (", ..." if len(bare) > 5 else "")
        raise ValueError(f"Captions are asked for, and {len(bare)} of {len(dataset)} images have none: {names}. Put a text file of the "
                         "same name beside each image, set a trigger word, or choose the caption mode 'empty (unconditional)'.")


def existing(path) -> Path:
    root = Path(path)
    if not root.exists():
        raise ValueError(f"The folder {root} does not exist. Check its name; paths are relative to {Path.cwd()}.")
    if not root.is_dir():
        raise ValueError(f"{root} is a file. Give the folder that holds the images.")
    return root


def listing(root: Path, repeats: int):
    """[(image file, repeats, name to use as caption or None)] in natural order, and [(folder, why it is not read)]."""
    files = [(file, repeats, None) for file in images_in(root)]
    for folder, times, name in kohya_folders(root):
        files += [(file, repeats * times, name) for file in images_in(folder) if times]
    return files, [(str(folder), why) for folder, why in unread_folders(root)]


def kohya_folders(root: Path):
    """[(folder, repeats, name)] of the subfolders called like 10_name."""
    named = [(folder, KOHYA.fullmatch(folder.name)) for folder in subfolders(root)]
    return [(folder, int(match[1]), printable(match[2].strip())) for folder, match in named if match]


def printable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 become question marks."""
    return name.encode("utf-8", "replace").decode("utf-8")


def unread_folders(root: Path):
    for folder in subfolders(root):
        match = KOHYA.fullmatch(folder.name)
        if not match and images_in(folder):
            yield folder, "its name does not begin with a number of repeats; call it 1_name to include its images"
        if match and int(match[1]) == 0:
            yield folder, "its name asks for 0 repeats"


def subfolders(root: Path) -> list[Path]:
    return sorted((entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")), key=natural)


def images_in(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.iterdir() if is_image(entry)), key=natural)


def is_image(file: Path) -> bool:
    name = file.name.lower()
    return file.suffix.lower() in extensions() and not name.endswith(MASK) and not name.startswith(".") and openable(file)


def openable(file: Path) -> bool:
    """Also a link to nowhere, so that it is reported as unreadable instead of passed over."""
    return file.is_file() or (file.is_symlink() and not file.exists())


@lru_cache(maxsize=1)
def extensions() -> tuple[str, ...]:
    """The file name endings that are read; .avif where this Pillow can decode it."""
    usual = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
    return (*usual, ".avif") if ".avif" in Image.registered_extensions() else usual


def natural(file: Path):
    """Sort key in which image 2 comes before image 10."""
    parts = re.split(r"([0-9]+)", file.name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name


def nothing_found(root: Path, skipped) -> str:
    found = Counter(entry.suffix.lower() or "files without an ending" for entry in root.iterdir() if entry.is_file())
    holds = ", ".join(f"{count} {ending}" for ending, count in found.most_common(5)) or "no files"
    folders = f" Not read: {'; '.join(f'{Path(folder).name} ({why})' for folder, why in skipped[:3])}." if skipped else ""
    return f"No images in {root}: it holds {holds}.{folders} Images end in {', '.join(extensions())}."


# -- one file -----------------------------------------------------------------------------------------------------------------


def read_record(file: Path, repeats: int, name: str | None, layout: Layout) -> Record:
    """The record of one image file. Its bytes are read once for the hash and the size and are not kept."""
    data = file.read_bytes()
    size, alpha = probe(file, data)
    captions = read_captions(file, layout.caption_extension) or ((name,) if name else ())
    mask, mask_id = find_mask(file)
    if mask is None and alpha and layout.alpha_mask:
        mask, mask_id = str(file), sha1(data)
    return Record(id=sha1(data), path=str(file), size=size, captions=captions, mask=mask, mask_id=mask_id, repeats=repeats)


def probe(file: Path, data: bytes):
    """((width, height) upright, whether it has alpha). Decodes all of it, because only then does a truncated file show."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if image.getexif().get(0x0112) in SIDEWAYS:
                width, height = height, width
            image.draft(None, (max(width // 8, 1), max(height // 8, 1)))  # a JPEG at an eighth: all its bytes, less time
            image.load()
            return (width, height), has_alpha(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError, ... for broken files
        raise ValueError(f"{file} cannot be decoded as an image ({error or type(error).__name__}). Replace it or take it out.") from error


def read_captions(file: Path, extension: str) -> tuple[str, ...]:
    """(caption,) from the file of the same stem, or () when there is none or it is empty."""
    for ending in dict.fromkeys((extension, ".txt", ".caption")):
        sidecar = file.with_name(file.stem + ending)
        if sidecar.is_file():
            text = read_text(sidecar).strip()
            return (text,) if text else ()
    return ()


def read_text(file: Path) -> str:
    """UTF-8 with or without a byte order mark; UTF-16 where the mark says so."""
    data = file.read_bytes()
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The caption {file} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error


def find_mask(file: Path) -> tuple[str | None, str | None]:
    mask = file.with_name(file.stem + MASK)
    if not mask.is_file():
        return None, None
    data = mask.read_bytes()
    probe(mask, data)
    return str(mask), sha1(data)
