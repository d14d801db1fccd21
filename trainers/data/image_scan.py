"""Every picture of a dataset decoded once, by a few threads: measured there, and shown to a vision model if there is
one.

Memory does not grow with the number of pictures, the result does not depend on the number of threads, and one file that
cannot be read costs nobody else anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .readers import make_printable
from .records import ImageRecord, open_image, open_mask

IN_FLIGHT_PER_THREAD = 4  # pictures in work or waiting, for each thread
VISION_SHORT_SIDE_PX = 512  # vision models see at most this much of the short side
ImageFeatureEncoder = Callable[[list[Image.Image]], np.ndarray]


@dataclass(frozen=True)
class ScanOptions:
    """How: what does not change the result. features(pictures) -> (n, d), normalised, asked from this thread only."""

    threads: int = 2
    features: ImageFeatureEncoder | None = None
    report: Callable[[int, int, str], None] = lambda done, total, text: None
    check_interrupt: Callable[[], None] = lambda: None


DEFAULT_SCAN = ScanOptions()


def scan_images(records: Sequence[ImageRecord], see: Callable, how: ScanOptions, masks: bool = False):
    """(values, features or None, {index: why it could not be read}) of see(record, picture, mask or None), asked by
    several threads at once. The value of what could not be read is None, its features are 0."""

    def look(record):
        picture, mask, error = open_image_and_mask(record, masks)
        if error:
            return None, None, error
        return (
            see(record, picture, mask),
            shrink_for_vision(picture) if how.features else None,
            "",
        )  # outside of every except: a bug is no bad picture

    values, features, broken = [], [], {}
    with ThreadPoolExecutor(max(1, how.threads)) as pool:
        for start in range(0, len(records), IN_FLIGHT_PER_THREAD * max(1, how.threads)):
            how.check_interrupt()
            part = records[start : start + IN_FLIGHT_PER_THREAD * max(1, how.threads)]
            found = list(pool.map(look, part))
            values += [value for value, _, _ in found]
            broken |= {start + i: error for i, (_, _, error) in enumerate(found) if error}
            if how.features:
                features.append(extract_readable_features(how.features, [picture for _, picture, _ in found]))
            how.report(start + len(part), len(records), make_printable(Path(part[-1].path).name))
    return values, stack_feature_rows(features), broken


def open_image_and_mask(record: ImageRecord, masks: bool) -> tuple[Image.Image | None, Image.Image | None, str]:
    """(picture, its mask or None, "") or (None, None, why not)."""
    try:
        picture = open_image(record)
        return picture, open_mask(record) if masks else None, ""
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError, ... for broken files
        return None, None, str(error) or type(error).__name__


def shrink_for_vision(picture: Image.Image) -> Image.Image:
    scale = VISION_SHORT_SIDE_PX / min(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0) if scale < 1 else picture


def extract_readable_features(features: ImageFeatureEncoder, pictures) -> list[np.ndarray | None]:
    there = [picture for picture in pictures if picture is not None]
    rows = iter(np.asarray(features(there), np.float32) if there else ())
    return [None if picture is None else next(rows) for picture in pictures]


def stack_feature_rows(parts) -> np.ndarray | None:
    rows = [row for part in parts for row in part]
    width = next((len(row) for row in rows if row is not None), 0)
    return np.stack([np.zeros(width, np.float32) if row is None else row for row in rows]) if width else None
