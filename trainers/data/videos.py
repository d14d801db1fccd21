"""Videos: what a file or a folder of frames says of itself, and those of its frames that are asked for.

Frames are asked for by their time in seconds from the first one, and the nearest is taken, so that a video of variable
rate plays at the right speed. A file is decoded from the key frame before the first time up to the last time, one frame
after the other; no more than two are in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .companions import natural_sort_key
from .file_endings import is_image_name, is_video_path
from .file_facts import FileFacts, forget_file
from .folder_listing import require_listing
from .pixel_modes import flatten_alpha
from .records import (
    WHITE,
    Clip,
    ImageRecord,
    VideoInfo,
    check_mask_size,
    open_unchanged_image,
    open_upright_file,
    read_unchanged_bytes,
    sha1_hex,
)

if TYPE_CHECKING:
    from .fact_store import FactStore

VARIABLE_RATE_TOLERANCE = 0.5  # of the mean time between two frames, by which one may be off
QUARTER_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class ProbedVideo:
    """What the content of a video file or a folder of frames says."""

    id: str  # sha1 of the bytes
    size: tuple[int, int]  # (width, height), upright
    frames: int
    fps: float  # frames a second, in the mean; 0 where nothing tells
    is_variable: bool = False

    @classmethod
    def from_text(cls, text: str) -> ProbedVideo:
        values = json.loads(text)
        return cls(**{**values, "size": tuple(values["size"])})

    def to_text(self) -> str:
        return json.dumps(vars(self))

    def to_info(self) -> VideoInfo:
        return VideoInfo(self.id, self.frames, self.fps)


# -- what it is --------------------------------------------------------------------------------------------------------


def probe_video(path: Path, facts: FactStore | None = None) -> ProbedVideo:
    """What a video file, an animation or a folder of frames holds. ValueError for what cannot be decoded."""
    if path.is_dir():
        return probe_frame_folder(path, facts)
    return (KNOWN_VIDEOS if is_video_path(path) else KNOWN_ANIMATIONS).get(path, facts)


def examine_video(file: Path) -> ProbedVideo:
    """Reads all of the file, and decodes its first frame."""
    with open_container(file) as (container, stream):
        times = sorted(float(p.pts * p.time_base) for p in container.demux(stream) if p.pts is not None and p.size)
    with open_container(file) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None or not times:
            raise ValueError(f"{file} cannot be decoded as a video (it holds no frames). Replace or remove it.")
        size = frame_to_image(first).size
    return ProbedVideo(hash_file(file), size, len(times), *measure_rate(times))


def hash_file(file: Path) -> str:
    """sha1 of a file that may be larger than memory."""
    digest = hashlib.sha1(usedforsecurity=False)
    with open(file, "rb") as opened:
        while block := opened.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def measure_rate(times: Sequence[float]) -> tuple[float, bool]:
    """(frames a second in the mean, whether they come at uneven times) of sorted times in seconds."""
    length = times[-1] - times[0]
    if len(times) < 2 or length <= 0:
        return 0.0, False
    mean = length / (len(times) - 1)
    gaps = (after - before for before, after in itertools.pairwise(times))
    return round(1 / mean, 4), any(abs(gap - mean) > VARIABLE_RATE_TOLERANCE * mean for gap in gaps)


def examine_animation(file: Path) -> ProbedVideo:
    """A GIF, WebP or PNG of several frames."""
    data = read_unchanged_bytes(str(file), None)
    times = [at for at, _ in list_animation_frames(file)]
    image = open_upright_file(str(file), None)
    return ProbedVideo(sha1_hex(data), image.size, len(times), *measure_rate(times))


def probe_frame_folder(folder: Path, facts: FactStore | None = None) -> ProbedVideo:
    """The images of a folder in natural order as the frames of a clip. ValueError where they are none, or of several
    sizes."""
    from .readers import KNOWN_IMAGES

    frames = list_frames(folder)
    if not frames:
        raise ValueError(f"{folder} is called like a folder of frames and holds no images. Fill or remove it.")
    digest, size = hashlib.sha1(usedforsecurity=False), None
    for frame in frames:
        probed = KNOWN_IMAGES.get(frame, facts)
        size = size or probed.size
        if probed.size != size:
            raise ValueError(
                f"{frame} is {probed.size[0]}x{probed.size[1]} px and {frames[0].name} {size[0]}x{size[1]} px. Make "
                "all frames of a clip one size."
            )
        digest.update(f"{probed.id}\n".encode())
    assert size is not None
    return ProbedVideo(digest.hexdigest(), size, len(frames), folder_rate(folder))


def list_frames(folder: Path) -> list[Path]:
    names = [name for found in require_listing(folder).files.values() for name in found if is_image_name(name)]
    return [folder / name for name in sorted(names, key=natural_sort_key)]


def folder_rate(folder: Path) -> float:
    """Frames a second that the name of a folder of frames tells, as in walk.24fps; 0 for walk.frames."""
    ending = folder.suffix.lower().removesuffix("fps").removeprefix(".")
    return float(ending) if ending.isdecimal() else 0.0


# -- its frames --------------------------------------------------------------------------------------------------------


def open_clip_frames(record: ImageRecord, ground=WHITE) -> Iterator[Image.Image]:
    """The frames of a record's clip in RGB, cropped to its crop, one after the other; of a video that is not cut, all
    of them. ValueError where the file is gone or another one than was read."""
    return open_frames_at(record, range(record.frames), ground)


def open_mask_frames(record: ImageRecord) -> Iterator[Image.Image]:
    """The frames of a record's mask video in L, as large as the uncropped frames of its clip."""
    assert record.mask is not None
    require_unchanged_video(record.mask, record.mask_id)
    for frame in read_frames(Path(record.mask), list_times(record), find_rate(record)):
        mask = frame.convert("L")
        check_mask_size(record.mask, mask.size, record.size)
        yield mask if mask.size == tuple(record.size) else mask.resize(record.size, Image.Resampling.BOX)


def open_middle_frame(record: ImageRecord) -> Image.Image:
    """The frame that stands for a clip or a video where one image is shown, uncropped."""
    times = list_times(record)
    return next(read_record_frames(record, [times[len(times) // 2]], WHITE))


def open_frames_at(record: ImageRecord, numbers: Sequence[int], ground=WHITE) -> Iterator[Image.Image]:
    """The frames of a clip with these sorted numbers, in RGB, cropped to its crop."""
    times = list_times(record)
    frames = read_record_frames(record, [times[number] for number in numbers], ground)
    return (image.crop(record.crop) if record.crop else image for image in frames)


def open_frame_grid(record: ImageRecord) -> Image.Image:
    """Four frames from the first to the last, in reading order, in one image of twice their size."""
    numbers = [round(part * (record.frames - 1) / 3) for part in range(4)]
    frames = list(open_frames_at(record, numbers))
    width, height = frames[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, frame in enumerate(frames):
        grid.paste(frame, (number % 2 * width, number // 2 * height))
    return grid


def list_times(record: ImageRecord) -> list[float]:
    """Seconds of each frame of a clip, or of a video that is not cut, after the video's first one."""
    video = record.require_video()
    return (record.clip or Clip(video.frames, video.fps)).times()


def find_rate(record: ImageRecord) -> float:
    """Frames a second of a folder of frames; those that tell no rate come one after the other."""
    return record.require_video().fps or (record.clip.fps if record.clip else 0.0) or 1.0


def read_record_frames(record: ImageRecord, times: Sequence[float], ground) -> Iterator[Image.Image]:
    require_unchanged_video(record.path, record.require_video().id)
    return read_frames(Path(record.path), times, find_rate(record), ground)


def require_unchanged_video(path: str, expected_id: str | None) -> ProbedVideo:
    """What the file holds; ValueError when it is gone or no longer the file that was read."""
    if not Path(path).exists():
        raise ValueError(f"Cannot read {path}: it is gone. Load the dataset again.")
    probed = probe_video(Path(path))
    if expected_id is not None and probed.id != expected_id:
        forget_file(path)
        raise ValueError(f"{path} has changed since the dataset was loaded. Load the dataset again.")
    return probed


def read_frames(path: Path, times: Sequence[float], fps: float, ground=WHITE) -> Iterator[Image.Image]:
    """The frames nearest to these sorted times, in RGB. fps: of a folder of frames."""
    if path.is_dir():
        frames = list_frames(path)
        for time in times:
            yield flatten_alpha(open_upright_file(str(frames[min(round(time * fps), len(frames) - 1)]), None), ground)
    elif is_video_path(path):
        yield from read_file_frames(path, times)
    else:
        decoded = ((at, partial(flatten_alpha, image, ground)) for at, image in list_animation_frames(path))
        yield from take_nearest(decoded, times, path)


def read_file_frames(path: Path, times: Sequence[float]) -> Iterator[Image.Image]:
    with open_container(path) as (container, stream):
        begin = float((stream.start_time or 0) * stream.time_base)
        decoded = decode_from(container, stream, begin, times[0])
        yield from take_nearest(((at, partial(frame_to_image, frame)) for at, frame in decoded), times, path)


def decode_from(container, stream, begin: float, time: float) -> Iterator[tuple[float, Any]]:
    """(seconds after `begin`, frame) from the key frame before this time on; from the first one where a file's index
    leads past it."""
    for start in (time, 0.0):
        if start > 0:
            container.seek(int((begin + start) / stream.time_base), stream=stream)
        elif time > 0:
            container.seek(int(begin / stream.time_base), stream=stream)
        frames = ((frame.time - begin, frame) for frame in container.decode(stream) if frame.time is not None)
        first = next(frames, None)
        if first is not None and (first[0] <= time or start == 0):
            yield first
            yield from frames
            return


def take_nearest(
    frames: Iterable[tuple[float, Callable[[], Image.Image]]], times: Sequence[float], path: Path
) -> Iterator[Image.Image]:
    """For each of the sorted times the frame nearest to it, of two equally near ones the earlier. frames: (time, what
    makes the image), in order. What is asked for after the last frame is the last frame, up to one frame's time."""
    waiting, before, gap = list(times), None, 0.0
    for at, make in frames:
        while waiting and waiting[0] <= at:
            is_nearer = before is None or at - waiting[0] < waiting[0] - before[0]
            waiting.pop(0)
            yield make() if before is None or is_nearer else before[1]()
        if not waiting:
            return
        gap = at - before[0] if before else 0.0
        before = at, make
    if before is None or waiting[-1] - before[0] > max(gap, 0.02) * 1.5:
        end = f"ends at {before[0]:.2f} s" if before else "holds no frames that can be decoded"
        raise ValueError(f"{path} {end}, and the frame at {waiting[-1]:.2f} s is asked for. It is damaged: replace it.")
    yield from (before[1]() for _ in waiting)


def frame_to_image(frame) -> Image.Image:
    """The decoded frame in RGB as it is to be shown: turned upright, its pixels made square."""
    image = frame.to_image()
    ratio = frame.sample_aspect_ratio if hasattr(frame, "sample_aspect_ratio") else None
    if ratio and ratio > 0 and ratio != 1:
        image = image.resize((max(1, round(image.width * float(ratio))), image.height), Image.Resampling.BICUBIC)
    turns = round(frame.rotation / 90) % 4
    return image.transpose(QUARTER_TURNS[turns]) if turns else image


def list_animation_frames(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """(time, frame) of a GIF, WebP or PNG."""
    image, at = open_unchanged_image(str(path), None), 0.0
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        image.load()  # a WebP tells its times then
        yield at, image.copy()
        at += image.info.get("duration", 100) / 1000


@contextlib.contextmanager
def open_container(file: Path):
    """(container, its first video stream) of a file. ValueError for what is no video, also while it is decoded."""
    try:
        import av
        import av.error
    except ImportError as error:  # outside of ComfyUI, which brings it
        raise ValueError(
            f"{file} is a video, and the package av, which reads it, is missing: pip install av."
        ) from error
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise ValueError(f"{file} cannot be decoded as a video (it has no pictures). Remove it.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(format_undecodable(file, error)) from error


def format_undecodable(file: Path, error: Exception) -> str:
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{file} cannot be decoded as a video ({why}). Replace or remove it."


KNOWN_VIDEOS = FileFacts(examine_video, ProbedVideo.to_text, ProbedVideo.from_text)
KNOWN_ANIMATIONS = FileFacts(examine_animation, ProbedVideo.to_text, ProbedVideo.from_text)
