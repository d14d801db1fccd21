"""From videos to clips: records of a video become records of some of its frames, at one rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .buckets import CHUNKS, LEAVE_SHORT_OUT, START, ClipSettings
from .metadata import format_count, format_first_names
from .records import Clip, ImageDataset, ImageRecord, VideoInfo, sha1_hex
from .videos import probe_video

ANIMATED_ENDINGS = (".gif", ".webp", ".apng")
RATE_TOLERANCE = 1.1  # 15 frames a second may be taken at 16: one in fifteen comes twice

__all__ = ["ClipSettings", "cut_clips", "describe_videos"]


def cut_clips(dataset: ImageDataset, settings: ClipSettings, progress=None) -> ImageDataset:
    """The clips of every video, animation and folder of frames; images stay as they are. ValueError for videos that
    are too short, unless they are to be left out, and for a dataset of images alone."""
    records, short = [], []
    for done, record in enumerate(dataset, 1):
        video = find_video(record)
        if video is None:
            records.append(record)
        elif why := explain_short(video, settings):
            short.append((record.path, why))
        else:
            records += [make_clip(record, video, clip) for clip in choose_clips(video, settings)]
        if progress:
            progress(done, len(dataset), Path(record.path).name)
    if short and settings.short_videos != LEAVE_SHORT_OUT:
        shown = "; ".join(f"{Path(path).name} {why}" for path, why in short[:5])
        raise ValueError(
            f"{format_count(short, 'video')} cannot give a clip of {settings.frames} frames at {settings.fps:g} a "
            f"second: {shown}{'; ...' if len(short) > 5 else ''}. Choose fewer frames or a lower fps, take these "
            "videos out, or set short_videos to 'leave out'."
        )
    if not any(record.clip for record in records):
        raise ValueError(
            f"There are no videos to cut: the dataset has {format_count(dataset, 'image')}"
            + (f", and {format_count(short, 'video')} too short." if short else ". Connect it without Cut Clips.")
        )
    return ImageDataset(tuple(records), (*dataset.skipped, *((path, f"it {why}") for path, why in short)))


def find_video(record: ImageRecord) -> VideoInfo | None:
    """What a record's file holds where that is more than one frame. An animation counts as an image until it is cut."""
    if record.clip is not None:
        raise ValueError(
            f"{Path(record.path).name} is cut into clips already. Connect the dataset of Load Dataset to Cut Clips."
        )
    if record.video is not None or Path(record.path).suffix.lower() not in ANIMATED_ENDINGS:
        return record.video
    probed = probe_video(Path(record.path))
    return probed.to_info() if probed.frames > 1 else None


def explain_short(video: VideoInfo, settings: ClipSettings) -> str:
    """Why a video cannot give one clip; empty where it can."""
    if settings.fps > video.fps * RATE_TOLERANCE > 0:
        return f"has {video.fps:g} frames a second"
    step = frames_per_step(video, settings)
    if (settings.frames - 1) * step > video.frames - 1 + step / 2:  # as near as the nearest frame is
        return f"has {video.frames} frames" + (f" at {video.fps:g} a second" if video.fps else "")
    return ""


def frames_per_step(video: VideoInfo, settings: ClipSettings) -> float:
    """The video's own frames from one taken frame to the next."""
    return video.fps / settings.fps if settings.fps and video.fps else 1.0


def choose_clips(video: VideoInfo, settings: ClipSettings) -> list[Clip]:
    rate = settings.fps if video.fps and settings.fps else video.fps or settings.fps
    step = frames_per_step(video, settings)
    per_second = video.fps or rate or 1.0  # of the video's own frames
    length = settings.frames * step
    last = max(0.0, video.frames - 1 - (settings.frames - 1) * step)  # the latest first frame
    if settings.sampling == START:
        starts = [0.0]
    elif settings.sampling == CHUNKS:
        starts = [number * length for number in range(max(1, int((last + 1e-6) // length) + 1))]
    else:
        starts = [last * (number + 0.5) / settings.clips for number in range(settings.clips)]
    starts = list(dict.fromkeys(float(round(start)) for start in starts))  # a short video has fewer clips that differ
    return [Clip(settings.frames, rate, round(start / per_second, 6)) for start in starts]


def make_clip(record: ImageRecord, video: VideoInfo, clip: Clip) -> ImageRecord:
    """The record of a clip. Its id is its own, so that caches, captions and splits tell the clips of a video apart."""
    if record.mask == record.path:
        raise ValueError(
            f"{Path(record.path).name} is an animation with transparency as its mask, which is not read. Turn "
            "alpha_mask off, or put a mask beside it as name.mask.png."
        )
    id_ = sha1_hex(f"{video.id} {clip.frames} {clip.fps!r} {clip.start!r}".encode())
    return replace(record, id=id_, video=video, clip=clip)


def describe_videos(records: Sequence[ImageRecord]) -> list[str]:
    """Lines on the videos and clips of a dataset; none where there are none."""
    videos = [record for record in records if record.video and not record.clip]
    clips = Counter((record.clip.frames, record.clip.fps) for record in records if record.clip)
    lines = [
        f"{format_count(range(count), 'clip')} of {frames} frames{describe_rate(frames, fps)}"
        for (frames, fps), count in sorted(clips.items())
    ]
    if videos:
        shown = [f"{Path(record.path).name} ({describe_length(record)})" for record in videos]
        lines.append(f"{format_count(videos, 'video')}, for Cut Clips: {format_first_names(shown)}")
    return lines


def describe_length(record: ImageRecord) -> str:
    """Such as 81 frames, 16 fps, 5.1 s."""
    rate = record.clip.fps if record.clip else record.require_video().fps
    return f"{format_count(range(record.frames), 'frame')}{describe_rate(record.frames, rate)}"


def describe_rate(frames: int, fps: float) -> str:
    return f", {fps:g} fps, {frames / fps:.1f} s" if fps else ""
