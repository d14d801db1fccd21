"""What is known about each image of a dataset, without holding the image itself.

A record's id is the sha1 of the file's bytes, so caches, splits and counters survive renaming and moving. Pixels are
decoded when they are asked for, upright and in 8-bit sRGB, and a file that has changed since it was read is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

from PIL import Image

from .colour_profiles import convert_to_srgb
from .file_endings import is_video_path
from .file_facts import forget_file
from .image_files import open_image_bytes
from .metadata import format_count, format_first_names
from .pixel_modes import convert_to_8bit, convert_to_rgba, flatten_alpha

WHITE = (255, 255, 255)
SRGB_VERSION = "srgb2"  # in the cache keys of images whose colours are converted: raise it when that gives other pixels
SIDEWAYS_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ALIGNED_ASPECT_TOLERANCE = 0.01  # relative; 1024 x 683 and 512 x 341 are one shape
PIL_TRANSPOSE = Image.Transpose
ORIENTATION_TRANSPOSES = dict(
    zip(
        range(2, 9),
        (
            PIL_TRANSPOSE.FLIP_LEFT_RIGHT,
            PIL_TRANSPOSE.ROTATE_180,
            PIL_TRANSPOSE.FLIP_TOP_BOTTOM,
            PIL_TRANSPOSE.TRANSPOSE,
            PIL_TRANSPOSE.ROTATE_270,
            PIL_TRANSPOSE.TRANSVERSE,
            PIL_TRANSPOSE.ROTATE_90,
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class ControlImage:
    """An image that an edit model is shown, so that it learns the way from there to the image."""

    id: str  # sha1 of the file's bytes, hex
    path: str
    size: tuple[int, int]  # (width, height) in pixels, upright
    icc_profile: str | None = None

    @classmethod
    def from_dict(cls, values: dict) -> ControlImage:
        return cls(**{**values, "size": tuple(values["size"])})


@dataclass(frozen=True)
class VideoInfo:
    """What a record's video, animation or folder of frames is."""

    id: str  # sha1 of its bytes
    frames: int
    fps: float  # frames a second, in the mean; 0 where nothing tells


@dataclass(frozen=True)
class Clip:
    """The frames of a video that are trained on."""

    frames: int
    fps: float  # frames a second that are taken; 0: one after the other, of frames that have no rate
    start: float = 0.0  # seconds after the video's first frame; frames where there is no rate

    def times(self) -> list[float]:
        """Seconds of each frame after the video's first one."""
        return [self.start + number / (self.fps or 1) for number in range(self.frames)]


@dataclass(frozen=True)
class ImageRecord:
    """One image, or one video or clip. Sizes and boxes are in pixels of the upright (EXIF transposed) image."""

    id: str  # sha1 of the file's bytes, hex
    path: str
    size: tuple[int, int]  # (width, height)
    crop: tuple[int, int, int, int] | None = None  # (left, top, right, bottom)
    bucket: tuple[int, int] | None = None  # (width, height) it is trained at, when that is decided already
    captions: tuple[str, ...] = ()  # alternatives; any one of them describes the image
    tags: tuple[str, ...] = ()
    score: float | None = None
    mask: str | None = None  # path of a grey image, white = learn; the image's own path means its alpha
    mask_id: str | None = None  # sha1 of the mask's bytes
    repeats: int = 1  # how often it is seen in one epoch
    split: str = "train"
    flags: tuple[str, ...] = ()
    pair: str | None = None  # the scene that this image shows at `strength`: see pairs.py
    strength: float | None = None
    icc_profile: str | None = None  # name of the one that its pixels are converted from; None: they stay as they are
    controls: tuple[ControlImage, ...] = ()
    video: VideoInfo | None = None  # that the path leads to
    clip: Clip | None = None  # part of it that this record is; the id is then the clip's own

    @property
    def frames(self) -> int:
        """1 for an image."""
        return self.clip.frames if self.clip else self.video.frames if self.video else 1

    def require_video(self) -> VideoInfo:
        if self.video is None:
            raise ValueError(f"{self.path} is an image, and a video is needed.")
        return self.video

    @property
    def pixels_id(self) -> str:
        """For caches of what was made of the pixels. The id, as ever, where the pixels are those of the file."""
        return self.id if self.icc_profile is None else f"{self.id}-{SRGB_VERSION}"

    @property
    def cropped_size(self) -> tuple[int, int]:
        """(width, height) of what open_image returns: the crop, or all of it."""
        if self.crop is None:
            return self.size
        left, top, right, bottom = self.crop
        return right - left, bottom - top

    @classmethod
    def from_dict(cls, values: dict) -> ImageRecord:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"A record has no field {', '.join(unknown)}; it knows {', '.join(sorted(known))}.")
        found: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        for name, kind in (("video", VideoInfo), ("clip", Clip)):
            if found.get(name) is not None:
                found[name] = kind(**found[name])
        if "controls" in found:
            found["controls"] = tuple(ControlImage.from_dict(control) for control in found["controls"])
        return cls(**found)

    def is_aligned(self, control: ControlImage) -> bool:
        """Whether both have the same aspect ratio, up to rounding, so that one may be laid over the other."""
        (width, height), (own_width, own_height) = control.size, self.size
        return abs(width * own_height / (height * own_width) - 1) <= ALIGNED_ASPECT_TOLERANCE

    def control_record(self, control: ControlImage) -> ImageRecord:
        """One of the control images as a record; cropped as the image is, where both are aligned."""
        is_cropped = self.crop is not None and self.is_aligned(control)
        crop = scale_crop(self.crop, self.size, control.size) if is_cropped else None
        return ImageRecord(control.id, control.path, control.size, crop, icc_profile=control.icc_profile)


@dataclass(frozen=True)
class ImageDataset(Sequence[ImageRecord]):
    """A list of records, and the files that were left out with the reason for each."""

    records: tuple[ImageRecord, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # (path, reason)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice) -> ImageDataset: ...

    def __getitem__(self, index):
        return ImageDataset(self.records[index], self.skipped) if isinstance(index, slice) else self.records[index]

    def __iter__(self) -> Iterator[ImageRecord]:
        return iter(self.records)

    def to_json(self) -> str:
        return json.dumps({"records": [asdict(record) for record in self.records], "skipped": self.skipped})

    @classmethod
    def from_json(cls, text: str) -> ImageDataset:
        values = json.loads(text)
        skipped = tuple((path, reason) for path, reason in values.get("skipped", ()))
        return cls(tuple(ImageRecord.from_dict(record) for record in values["records"]), skipped)

    def fingerprint(self) -> str:
        """32 hex digits over everything that training can see; where the files lie does not count."""
        unseen, later = (
            ("path", "mask", "controls", "video", "clip"),  # the id tells which clip it is
            ("bucket", "pair", "strength", "icc_profile"),
        )  # later: not in the hash while they are not set
        content = [
            {k: v for k, v in asdict(r).items() if k not in unseen and not (v is None and k in later)}
            | ({"controls": [[c.id, c.icc_profile] for c in r.controls]} if r.controls else {})
            for r in self.records
        ]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def sha1_hex(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def open_image(record: ImageRecord, ground=WHITE, scale: float = 1.0) -> Image.Image:
    """The image in RGB, its colours in sRGB: upright, alpha laid over ground (red, green, blue), cropped to the
    record's crop. scale: see `open_upright_image`."""
    image = flatten_alpha(open_upright_image(record, scale), ground)
    return image.crop(scale_crop(record.crop, record.size, image.size)) if record.crop else image


def open_upright_image(record: ImageRecord, scale: float = 1.0) -> Image.Image:
    """All of the image, upright, in 8 bits and sRGB, in the mode that it is stored in. Every reader of a record's
    pixels comes through here. scale: how much of the sides is enough; formats that can be decoded at a half, a quarter
    or an eighth, as JPEG, are. Of a clip it is the frame in the middle."""
    if record.video is not None:
        from .videos import open_middle_frame

        return open_middle_frame(record)
    return open_upright_file(record.path, record.id, scale)


def open_upright_file(path: str, expected_id: str | None, scale: float = 1.0) -> Image.Image:
    """The same of an image file; ValueError when it is no longer the file that was read."""
    image = open_unchanged_image(path, expected_id)
    if scale < 1:
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    return convert_to_8bit(convert_to_srgb(apply_exif_orientation(image)))


def scale_crop(crop, size: tuple[int, int], decoded: tuple[int, int]) -> tuple[int, int, int, int]:
    """The crop of an image of `size` in the same image as it was decoded, at least one pixel of it."""
    if size == decoded:
        return crop
    left, top, right, bottom = (round(edge * decoded[i % 2] / size[i % 2]) for i, edge in enumerate(crop))
    left, top = min(left, decoded[0] - 1), min(top, decoded[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def open_mask(record: ImageRecord) -> Image.Image | None:
    """The loss mask in L, as large as open_image's image; white counts fully, black not at all. None without a
    mask."""
    return None if record.mask is None else open_mask_at(record.mask, record)


def open_mask_at(path: str, record: ImageRecord) -> Image.Image:
    """The same, of a record whose mask lies at this path."""
    if path == record.path:
        mask = convert_to_rgba(open_upright_image(record)).getchannel("A")
    else:
        mask = open_mask_file(path, record)
    return mask.crop(record.crop) if record.crop else mask


def open_mask_file(path: str, record: ImageRecord) -> Image.Image:
    if record.video is not None and is_video_path(Path(path)):
        from .videos import open_mask_frames

        frames = list(open_mask_frames(record))
        return frames[len(frames) // 2]
    mask = flatten_alpha(
        convert_to_8bit(apply_exif_orientation(open_unchanged_image(path, record.mask_id))), (0, 0, 0)
    ).convert("L")
    check_mask_size(path, mask.size, record.size)
    return mask if mask.size == tuple(record.size) else mask.resize(record.size, Image.Resampling.BOX)


def check_mask_size(mask, mask_size, size) -> None:
    """ValueError unless the mask has the shape of its image; a mask of half the size is fine."""
    if mask_size[0] * size[1] != mask_size[1] * size[0]:
        raise ValueError(
            f"The mask {mask} is {mask_size[0]}x{mask_size[1]} px and its image {size[0]}x{size[1]} px. Make the mask "
            "as large as the image, or remove it."
        )


def describe_colour_profiles(dataset: ImageDataset) -> list[str]:
    """A line on the images whose colours are converted; none where there are none."""
    names = Counter(record.icc_profile for record in dataset if record.icc_profile is not None)
    if not names:
        return []
    return [f"colours converted to sRGB: {', '.join(f'{count} from {name}' for name, count in names.most_common())}"]


def describe_controls(records: Sequence[ImageRecord]) -> list[str]:
    """A line on the control images of a dataset; none where there are none."""
    with_controls = [record for record in records if record.controls]
    if not with_controls:
        return []
    total = sum(len(record.controls) for record in with_controls)
    line = f"{format_count(range(total), 'control image')} of {format_count(with_controls, 'image')}"
    bare = [Path(record.path).name for record in records if not record.controls]
    same = [Path(r.path).name for r in with_controls if any(control.id == r.id for control in r.controls)]
    line += f"; {format_count(bare, 'image')} without: {format_first_names(bare)}" if bare else ""
    return [line + (f"; the image itself, which teaches to change nothing: {format_first_names(same)}" if same else "")]


def describe_left_out(dataset: ImageDataset) -> list[str]:
    """A line for each entry of `skipped`: what is left out, and what is noted on images that are not."""
    used = {record.path for record in dataset}
    return [f"{'note on' if path in used else 'skipped'} {path}: {reason}" for path, reason in dataset.skipped]


def open_unchanged_image(path: str, expected_id: str | None) -> Image.Image:
    """The file's first frame, undecoded mode and all; ValueError when it is gone or no longer the file that was
    read."""
    return open_image_bytes(read_unchanged_bytes(path, expected_id))


def read_unchanged_bytes(path: str, expected_id: str | None) -> bytes:
    """The file's bytes; ValueError when it is gone or no longer the file that was read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror or error}. Load the dataset again.") from error
    if expected_id is not None and sha1_hex(data) != expected_id:
        forget_file(path)
        raise ValueError(f"{path} has changed since the dataset was loaded. Load the dataset again.")
    return data


def apply_exif_orientation(image: Image.Image) -> Image.Image:
    """The image as a camera's orientation mark wants it shown. Pillow's own exif_transpose also writes the marks
    anew, which fails where others of them are damaged."""
    image.load()
    turn = ORIENTATION_TRANSPOSES.get(read_exif_orientation(image))
    return image if turn is None else image.transpose(turn)


def read_exif_orientation(image: Image.Image) -> int:
    """1 to 8; 1, the usual one, also where the marks are damaged or say nothing known."""
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # struct.error, SyntaxError, TypeError, ... for damaged marks; the pixels are whole
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
