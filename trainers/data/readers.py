"""From folders to datasets: images and videos, what sidecars and metadata files say about them, masks, kohya's
`N_name` folders, in natural order.

A broken file is reported in Dataset.skipped and left out, or raised with strict=True; it is never left out silently.

Of each fact the nearest source counts: the image's own sidecars (.txt, then .caption, then .json), then the metadata
file of its own folder, then that of the folder above, then the name of a kohya folder. An empty .txt says that there is
no caption.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import UnidentifiedImageError

from .colour_profiles import read_colour_profile
from .companions import CompanionFiles, compose_name, natural_sort_key
from .file_endings import (
    MASK_SUFFIXES,
    MASK_VIDEO_SUFFIXES,
    VIDEO_ENDINGS,
    image_extensions,
    is_mask_name,
    is_video_path,
    strip_mask_suffix,
)
from .file_facts import FileFacts
from .folder_listing import require_listing
from .folder_plan import (
    FolderImage,
    FolderPlan,
    NamedImages,
    list_unread_folders,
    plan_folders,
)
from .image_files import one_large_image_at_a_time, open_image_bytes
from .metadata import (
    METADATA_FILES,
    ImageMetadata,
    format_count,
    format_first_names,
    is_file_or_broken_link,
    list_text_extensions,
    make_printable,
    merge_metadata,
    read_file_bytes,
    read_metadata_table,
    read_sidecar_metadata,
)
from .pixel_modes import check_colour_mode, has_alpha
from .records import (
    SIDEWAYS_ORIENTATIONS,
    ControlImage,
    ImageDataset,
    ImageRecord,
    VideoInfo,
    check_mask_size,
    read_exif_orientation,
    sha1_hex,
)
from .unread_files import list_unread_files

if TYPE_CHECKING:
    from .fact_store import FactStore

ONE_CAPTION, ALTERNATIVE_CAPTIONS = "one", "alternatives"
CAPTION_LINE_MODES = (ONE_CAPTION, ALTERNATIVE_CAPTIONS)
VIDEOS_AUTO, VIDEOS_READ, VIDEOS_LEFT_OUT = VIDEO_MODES = ("auto", "read", "leave out")


@dataclass(frozen=True)
class FolderReadOptions:
    """What a folder is read with."""

    caption_extension: str
    alpha_mask: bool
    alternatives: bool
    notes: dict[Path, list[ImageMetadata]]  # from metadata files, the nearest first
    masks: dict[Path, Path]  # from the folder of masks
    controls: dict[Path, tuple[Path, ...]]  # from the folder of control images
    companions: CompanionFiles
    facts: FactStore | None


@dataclass
class SkippedFiles:
    """What is left out, or noticed, with the reason; strict raises instead."""

    strict: bool
    entries: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path, reason) -> None:
        if self.strict:
            raise reason if isinstance(reason, Exception) else ValueError(str(reason))
        self.note(path, reason)

    def note(self, path, reason) -> None:
        """What is no fault of a file that was asked for: told, also with strict."""
        self.entries.append((str(path), str(reason)))

    def put_first(self, notes: Sequence[tuple[Path, str]]) -> None:
        self.entries[:0] = [(str(path), reason) for path, reason in notes]


def read_folder(
    path,
    caption_extension: str = ".txt",
    repeats: int = 1,
    alpha_mask: bool = False,
    strict: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    caption_lines: str = ONE_CAPTION,
    masks=None,
    metadata=None,
    facts_file=None,
    controls=None,
    videos: str = VIDEOS_AUTO,
) -> ImageDataset:
    """The images, or videos, of a folder and of its `N_name` subfolders (seen N times as often; name is the caption of
    those without one).

    alpha_mask: images with transparency and no other mask use their alpha as the loss mask.
    progress(done, total, file name) is called after each file and may raise to stop.
    caption_lines: "alternatives" takes every line of a caption as a caption of its own. masks: a folder of masks of the
    same stems. controls: a folder of control images of the same stems, for edit models.
    videos: one of VIDEO_MODES, whether videos and folders of frames are read; auto: where there are no images.
    metadata: a .json, .jsonl or .csv file that is read instead of metadata.jsonl, metadata.csv and metadata.json.
    facts_file: where to keep what was found out about each image, so that none is decoded again at the next start."""
    if caption_lines not in CAPTION_LINE_MODES:
        raise ValueError(f"caption_lines is {caption_lines!r}; choose one of {', '.join(CAPTION_LINE_MODES)}.")
    if videos not in VIDEO_MODES:
        raise ValueError(f"videos is {videos!r}; choose one of {', '.join(VIDEO_MODES)}.")
    root, skipped, companions = require_folder(path), SkippedFiles(strict), CompanionFiles()
    masks, controls = (None if folder is None else require_folder(folder) for folder in (masks, controls))
    plan = plan_folders(root, tuple(folder for folder in (masks, controls) if folder), companions)
    files = [
        FolderImage(file, one.repeats, one.caption) for one in plan.read for file in companions.list_images(one.folder)
    ]
    alternatives, named = caption_lines == ALTERNATIVE_CAPTIONS, NamedImages(plan, companions, not files)
    notes = read_metadata_notes(root, [listed.file for listed in files], metadata, alternatives, skipped, named.locate)
    files += named.list_new_images(files)
    files = leave_out_videos(leave_out_controls(files, notes), videos, skipped)
    skipped.put_first(list_unread_folders(plan, {listed.file for listed in files}, companions))
    if not files:
        raise ValueError(format_no_images_found(root, skipped.entries))
    found_masks = match_masks(root, masks, files, skipped, companions)
    found_controls = {}
    if controls is not None:
        from .controls import match_control_folder

        found_controls = match_control_folder(root, controls, [one.file for one in files], skipped, companions)
    with open_fact_store(facts_file) as facts:
        layout = FolderReadOptions(
            caption_extension, alpha_mask, alternatives, notes, found_masks, found_controls, companions, facts
        )
        records = read_image_records(files, repeats, layout, skipped, progress)
    if not records:
        own = {str(listed.file) for listed in files}
        reasons = "; ".join([reason for path, reason in skipped.entries if path in own][:3])
        raise ValueError(f"None of the {len(files)} images in {root} can be used: {reasons}")
    note_unread_files(plan, layout, {listed.file for listed in files}, metadata, skipped)
    return ImageDataset(tuple(records), tuple(skipped.entries))


def leave_out_controls(files: list[FolderImage], notes: dict[Path, list[ImageMetadata]]) -> list[FolderImage]:
    """Without what a table names as a control image and says nothing else of."""
    named = {path.resolve() for found in notes.values() for note in found for path in note.controls or ()}
    return [one for one in files if one.file in notes or not named or one.file.resolve() not in named]


def leave_out_videos(files: list[FolderImage], mode: str, skipped: SkippedFiles) -> list[FolderImage]:
    """Without the videos and folders of frames, where they are not to be read: each is told."""
    found = {one.file for one in files if is_video_path(one.file)}
    if mode == VIDEOS_READ or (mode == VIDEOS_AUTO and len(found) == len(files)):
        return files
    for file in sorted(found):
        skipped.note(file, "it is a video and is left out. Set videos of Load Dataset to read, to train on it too")
    return [one for one in files if one.file not in found]


def open_fact_store(file) -> AbstractContextManager[FactStore | None]:
    """The store in this file; None without one."""
    if file is None:
        return nullcontext()
    from .fact_store import FactStore

    return FactStore(file)


def read_image_records(
    files: Sequence[FolderImage], repeats: int, layout: FolderReadOptions, skipped: SkippedFiles, progress
) -> list[ImageRecord]:
    """The records of the images that can be read; the others go to `skipped`."""
    records = []
    for done, listed in enumerate(files, 1):
        try:
            record, remark = read_image_record(listed, repeats, layout)
            records.append(record)
            if remark:
                skipped.note(listed.file, remark)
        except ValueError as error:
            skipped.add(listed.file, error)
        if progress:
            progress(done, len(files), listed.file.name)
    return records


def note_unread_files(plan: FolderPlan, layout: FolderReadOptions, images: set[Path], metadata, skipped) -> None:
    """Tells what lies in the folders beside the images and is not read."""
    told = [note for notes in layout.notes.values() for note in notes]
    used = images | {note.mask for note in told if note.mask} | {path for note in told for path in note.controls or ()}
    used |= {Path(metadata)} if metadata is not None else set()
    for one in plan.read:
        for path, reason in list_unread_files(
            one.folder, list_text_extensions(layout.caption_extension), layout.companions, used
        ):
            skipped.note(path, reason)


def hash_folder_state(path, *others) -> str:
    """A hash of every name, size and time below the folder and below others, such as that of the masks (None: there is
    none): cheap to ask whether to read them again."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in [require_folder(path), *(require_folder(other) for other in others if other is not None)]:
        for file in list_files_below(folder):
            with suppress(OSError):  # a link to nowhere, or gone in the meantime
                stat = os.stat(file)
                line = f"{file.removeprefix(os.fspath(folder))}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def list_files_below(folder: Path) -> list[str]:
    """All files, sorted; of folders that are links, those directly inside `folder` are entered, as the reader does."""
    linked = [folder / name for name in require_listing(folder).linked_folders if not name.startswith(".")]
    trees = [os.walk(folder), *(os.walk(entry) for entry in linked)]
    return sorted({os.path.join(folder, name) for tree in trees for folder, _, names in tree for name in names})


def require_captions(dataset: ImageDataset) -> None:
    """ValueError naming the first images that have no caption."""
    bare = [Path(record.path).name for record in dataset if not any(caption.strip() for caption in record.captions)]
    if bare:
        names = ", ".join(bare[:5]) + (", ..." if len(bare) > 5 else "")
        raise ValueError(
            f"Captions are asked for, and {len(bare)} of {len(dataset)} images have none: {names}. Put a text file of "
            "the same name beside each image, set a trigger word, or choose the caption mode 'empty (unconditional)'."
        )


def require_folder(path) -> Path:
    root = Path(path)
    if not root.exists():
        raise ValueError(f"The folder {root} does not exist. Check its name; paths are relative to {Path.cwd()}.")
    if not root.is_dir():
        raise ValueError(f"{root} is a file. Give the folder that holds the images.")
    return root


def format_no_images_found(root: Path, skipped) -> str:
    found = Counter(entry.suffix.lower() or "files without an ending" for entry in root.iterdir() if entry.is_file())
    holds = ", ".join(f"{count} {ending}" for ending, count in found.most_common(5)) or "no files"
    folders = (
        f" Not read: {'; '.join(f'{Path(folder).name} ({why})' for folder, why in skipped[:3])}." if skipped else ""
    )
    return (
        f"No images in {root}: it holds {holds}.{folders} Images end in {', '.join(image_extensions())}; "
        f"videos in {', '.join(sorted(VIDEO_ENDINGS))}; the frames of a clip lie in a folder such as walk.24fps."
    )


# -- what lies beside the images ---------------------------------------------------------------------------------------


def read_metadata_notes(
    root: Path, images: list[Path], metadata, alternatives: bool, skipped: SkippedFiles, locate
) -> dict[Path, list[ImageMetadata]]:
    """What metadata files say about each image, the nearest file first. locate: as `read_metadata_table` takes it."""
    notes: dict[Path, list[ImageMetadata]] = {}
    by_folder: dict[Path, list[Path]] = {}
    for image in images:
        by_folder.setdefault(image.parent, []).append(image)
    for file in [require_metadata_file(metadata)] if metadata is not None else list_metadata_files(root, images):
        below = images if metadata is not None or file.parent == root else by_folder[file.parent]
        try:
            table = read_metadata_table(file, below, alternatives, locate)
        except ValueError as error:
            if metadata is not None:
                raise
            skipped.add(file, error)
            continue
        for problem in table.problems:
            skipped.add(file, problem)
        skipped.entries.extend((str(file), note) for note in table.notes)  # also with strict: nothing is wrong
        for image, note in table.entries.items():
            notes.setdefault(image, []).append(note)
    return notes


def require_metadata_file(path) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"The metadata file {file} does not exist. Check its name; paths are relative to {Path.cwd()}."
        )
    return file


def list_metadata_files(root: Path, images: list[Path]) -> list[Path]:
    """The metadata files of the images' own folders, then those of root."""
    folders = [*dict.fromkeys(image.parent for image in images if image.parent != root), root]
    return [folder / name for folder in folders for name in METADATA_FILES if is_file_or_broken_link(folder / name)]


def list_mask_images(folder: Path, companions: CompanionFiles) -> list[Path]:
    """The images of a folder of masks, also those that are called as masks beside their images are; these come last."""
    named = sorted(filter(is_mask_name, companions.names_in(folder).files), key=natural_sort_key)
    return [*companions.list_images(folder), *(folder / name for name in named)]


def match_masks(
    root: Path, masks: Path | None, files: list[FolderImage], skipped: SkippedFiles, companions: CompanionFiles
) -> dict[Path, Path]:
    """The mask of each image: of the same subfolder and stem inside the folder of masks, or else of the same stem."""
    if masks is None:
        return {}
    if masks.resolve() == root.resolve():
        raise ValueError(
            f"{masks} is the folder of the images themselves. Give a folder of its own to the masks, or name them "
            "name.mask.png beside the images and choose no folder of masks."
        )
    known: dict[str, Path] = {}
    for folder in (masks, *companions.list_subfolders(masks)):
        for file in list_mask_images(folder, companions):
            stem = compose_name((file.relative_to(masks).parent / strip_mask_suffix(file.name)).as_posix())
            if stem in known:
                skipped.add(file, f"{known[stem].name} is the mask of the same name already; remove one of them")
            known.setdefault(stem, file)
    found = {}
    for listed in files:
        stem = compose_name(listed.file.relative_to(root).with_suffix("").as_posix())
        if mask := known.get(stem) or known.get(compose_name(listed.file.stem)):
            found[listed.file] = mask
    if not found:
        raise ValueError(
            f"No mask in {masks} has the name of an image in {root}; it holds "
            f"{format_first_names([file.name for file in known.values()]) or 'no images'}. A mask is named like its "
            "image: cat.png for cat.jpg."
        )
    used = set(found.values())
    unused = [file.name for file in known.values() if file not in used]
    if unused:
        skipped.add(masks, f"no image for {format_count(unused, 'mask')}: {format_first_names(unused)}")
    return found


# -- one file ----------------------------------------------------------------------------------------------------------


def read_image_record(listed: FolderImage, times: int, layout: FolderReadOptions) -> tuple[ImageRecord, str | None]:
    """(the record of one image file, what is to be noted on it). Its bytes are read once, for the hash and the size,
    for as long as it stays the same."""
    file = listed.file
    probed, video = probe_media(file, layout.facts)
    sidecars = read_sidecar_metadata(file, layout.caption_extension, layout.alternatives, layout.companions)
    note = merge_metadata([*sidecars, *layout.notes.get(file, ())])
    if note.error:
        raise ValueError(note.error)
    repeats = listed.repeats if note.repeats is None else note.repeats
    if not repeats:
        raise ValueError(f"{file} is left out, because its metadata asks for 0 repeats.")
    mask, mask_id = find_image_mask(file, probed.size, video, note.mask or layout.masks.get(file), layout)
    if mask is None and probed.has_alpha and layout.alpha_mask:
        mask, mask_id = str(file), probed.id
    record = ImageRecord(
        id=probed.id,
        path=str(file),
        size=probed.size,
        captions=choose_captions(note, listed.folder_caption),
        tags=note.tags or (),
        score=note.score,
        mask=mask,
        mask_id=mask_id,
        repeats=times * repeats,
        split=note.split or "train",
        pair=note.pair,
        strength=note.strength,
        icc_profile=probed.profile_name,
        controls=read_control_images(file, note, layout),
        video=video,
    )
    return record, probed.profile_problem


def probe_media(file: Path, facts: FactStore | None) -> tuple[ProbedImage, VideoInfo | None]:
    """What is known of an image, or of a video or a folder of frames. ValueError for what cannot be decoded."""
    if not is_video_path(file):
        return KNOWN_IMAGES.get(file, facts), None
    from .videos import probe_video

    found = probe_video(file, facts)
    return ProbedImage(found.id, found.size, False, None, None), found.to_info()


def read_control_images(file: Path, note: ImageMetadata, layout: FolderReadOptions) -> tuple[ControlImage, ...]:
    """The control images beside the image, else those that its metadata names, else those of the folder of them.
    ValueError for one that cannot be read."""
    paths = layout.companions.find_controls(file) or note.controls or layout.controls.get(file, ())
    probed = [(path, KNOWN_IMAGES.get(path, layout.facts)) for path in paths]
    return tuple(ControlImage(one.id, str(path), one.size, one.profile_name) for path, one in probed)


def choose_captions(note: ImageMetadata, name: str | None) -> tuple[str, ...]:
    """What was said; else the tags in one line, as kohya joins them; else the folder's name."""
    if note.captions is not None:
        return note.captions
    if note.tags:
        return (", ".join(note.tags),)
    return (make_printable(name),) if name else ()


@dataclass(frozen=True)
class ProbedImage:
    """What an image file's content says."""

    id: str  # sha1 of the bytes
    size: tuple[int, int]  # (width, height), upright
    has_alpha: bool
    profile_name: str | None  # of a colour profile from which the pixels are converted
    profile_problem: str | None  # why its colour profile cannot be used

    @classmethod
    def from_text(cls, text: str) -> ProbedImage:
        values = json.loads(text)
        return cls(**{**values, "size": tuple(values["size"])})

    def to_text(self) -> str:
        return json.dumps(vars(self))


def probe_image(file: Path, data: bytes) -> ProbedImage:
    """Decodes all of the image, because only then does a truncated file show."""
    try:
        with open_image_bytes(data) as image, one_large_image_at_a_time(image.size):
            width, height = image.size
            check_colour_mode(image.mode)
            image.draft(
                None, (max(width // 8, 1), max(height // 8, 1))
            )  # a JPEG at an eighth: all its bytes, less time
            # before the orientation is asked for, which would load a PNG and take its error for a damaged mark
            image.load()
            size = (height, width) if read_exif_orientation(image) in SIDEWAYS_ORIENTATIONS else (width, height)
            profile = read_colour_profile(image)
            return ProbedImage(sha1_hex(data), size, has_alpha(image), profile.name, profile.problem)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{file} cannot be decoded as an image (it has an unknown format). Replace or remove it."
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError, ... for broken files
        raise ValueError(
            f"{file} cannot be decoded as an image ({error or type(error).__name__}). Replace or remove it."
        ) from error


def find_image_mask(
    file: Path, size, video: VideoInfo | None, named: Path | None, layout: FolderReadOptions
) -> tuple[str | None, str | None]:
    """(path, sha1) of `name.mask.png` or `name-masklabel.png` beside the image, for a video also of `name.mask.mp4`,
    else of the one that metadata or a folder of masks names."""
    mask = layout.companions.find(file, (*MASK_SUFFIXES, *(MASK_VIDEO_SUFFIXES if video else ()))) or named
    if mask is None:
        return None, None
    probed, frames = probe_media(mask, layout.facts)
    check_mask_size(mask, probed.size, size)
    if frames is not None:
        check_mask_frames(mask, frames, video)
    return str(mask), probed.id


def check_mask_frames(mask: Path, frames: VideoInfo, video: VideoInfo | None) -> None:
    if video is None:
        raise ValueError(f"The mask {mask} is a video, and it belongs to an image. Give an image as its mask.")
    if abs(frames.frames - video.frames) > 1:
        raise ValueError(
            f"The mask {mask} has {frames.frames} frames and its video {video.frames}. Make the mask as long as the "
            "video, or give one image, which is then the mask of every frame."
        )


def examine_image(file: Path) -> ProbedImage:
    """What `probe_image` says of a file."""
    return probe_image(file, read_file_bytes(file))


KNOWN_IMAGES = FileFacts(examine_image, ProbedImage.to_text, ProbedImage.from_text)
