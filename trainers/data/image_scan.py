"""Every image of a dataset decoded once, by a few threads: measured there, and shown to a vision model if there is
one.

Memory does not grow with the number of images, the result does not depend on the number of threads, and one file that
cannot be read costs nobody else anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .image_files import one_large_image_at_a_time
from .readers import make_printable
from .records import ImageRecord, open_image, open_mask

IN_FLIGHT_PER_THREAD = 4  # images in work or waiting, for each thread
VISION_SHORT_SIDE_PX = 512  # vision models see at most this much of the short side
ImageFeatureEncoder = Callable[[list[Image.Image]], np.ndarray]


@dataclass(frozen=True)
class ScanOptions:
    """How: what does not change the result. features(images) -> (n, d), normalised, asked from this thread only."""

    threads: int = 2
    features: ImageFeatureEncoder | None = None
    report: Callable[[int, int, str], None] = lambda done, total, text: None
    check_interrupt: Callable[[], None] = lambda: None


DEFAULT_SCAN = ScanOptions()


def scan_images(records: Sequence[ImageRecord], see: Callable, options: ScanOptions, masks: bool = False):
    """(values, features or None, {index: why it could not be read}) of see(record, image, mask or None), asked by
    several threads at once. The value of what could not be read is None, its features are 0."""

    def look(record):
        with one_large_image_at_a_time(record.size):
            return look_at_once(record)

    def look_at_once(record):
        image, mask, error = open_image_and_mask(record, masks)
        if image is None:
            return None, None, error
        return (
            see(record, image, mask),
            shrink_for_vision(image) if options.features else None,
            "",
        )  # outside of every except: a bug is no bad image

    values, features, broken = [], [], {}
    with ThreadPoolExecutor(max(1, options.threads)) as pool:
        for start in range(0, len(records), IN_FLIGHT_PER_THREAD * max(1, options.threads)):
            options.check_interrupt()
            part = records[start : start + IN_FLIGHT_PER_THREAD * max(1, options.threads)]
            found = list(pool.map(look, part))
            values += [value for value, _, _ in found]
            broken |= {start + i: error for i, (_, _, error) in enumerate(found) if error}
            if options.features:
                features.append(extract_readable_features(options.features, [image for _, image, _ in found]))
            options.report(start + len(part), len(records), make_printable(Path(part[-1].path).name))
    return values, stack_feature_rows(features), broken


def open_image_and_mask(record: ImageRecord, masks: bool) -> tuple[Image.Image | None, Image.Image | None, str]:
    """(image, its mask or None, "") or (None, None, why not)."""
    try:
        image = open_image(record)
        return image, open_mask(record) if masks else None, ""
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError, ... for broken files
        return None, None, str(error) or type(error).__name__


def shrink_for_vision(image: Image.Image) -> Image.Image:
    scale = VISION_SHORT_SIDE_PX / min(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0) if scale < 1 else image


def extract_readable_features(features: ImageFeatureEncoder, images) -> list[np.ndarray | None]:
    there = [image for image in images if image is not None]
    rows = iter(np.asarray(features(there), np.float32) if there else ())
    return [None if image is None else next(rows) for image in images]


def stack_feature_rows(parts) -> np.ndarray | None:
    rows = [row for part in parts for row in part]
    width = next((len(row) for row in rows if row is not None), 0)
    return np.stack([np.zeros(width, np.float32) if row is None else row for row in rows]) if width else None
