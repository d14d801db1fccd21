"""Every picture of a dataset decoded once, by a few threads: measured there, and shown to a vision model if there is one.

Memory does not grow with the number of pictures, the result does not depend on the number of threads, and one file that cannot be
read costs nobody else anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .readers import printable
from .records import Record

AHEAD = 4  # pictures in work or waiting, for each thread
VISION_PX = 512  # vision models see at most this much of the short side
Features = Callable[[list[Image.Image]], np.ndarray]


@dataclass(frozen=True)
class Look:
    """What was found out about one picture, and the picture itself while it is at hand."""

    value: Any
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Looking:
    """How: what does not change the result. features(pictures) -> (n, d), normalised, asked from this thread only."""

    threads: int = 2
    features: Features | None = None
    report: Callable[[int, int, str], None] = lambda done, total, text: None
    check_interrupt: Callable[[], None] = lambda: None


def looked(records: Sequence[Record], see: Callable[[Record], Look], how: Looking):
    """(values, features or None, {index: why it could not be read}). A value that could not be had is None, its features are 0."""
    values, features, broken = [], [], {}
    with ThreadPoolExecutor(max(1, how.threads)) as pool:
        for start in range(0, len(records), AHEAD * max(1, how.threads)):
            how.check_interrupt()
            part = records[start : start + AHEAD * max(1, how.threads)]
            found = list(pool.map(lambda record: attempted(see, record, how.features is not None), part))
            broken |= {start + i: error for i, (_, error) in enumerate(found) if error}
            values += [look and look.value for look, _ in found]
            if how.features:
                features.append(shown_to(how.features, [look and look.picture for look, _ in found]))
            how.report(start + len(part), len(records), printable(Path(part[-1].path).name))
    return values, stacked(features), broken


def attempted(see, record: Record, keep_picture: bool) -> tuple[Look | None, str]:
    """(look, "") or (None, why not). Only the small picture that a vision model wants survives this call."""
    try:
        look = see(record)
        return Look(look.value, reduced(look.picture) if keep_picture and look.picture else None), ""
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError, ... for broken files
        return None, str(error) or type(error).__name__


def reduced(picture: Image.Image) -> Image.Image:
    scale = VISION_PX / min(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0) if scale < 1 else picture


def shown_to(features: Features, pictures) -> list[np.ndarray | None]:
    there = [picture for picture in pictures if picture is not None]
    rows = iter(np.asarray(features(there), np.float32) if there else ())
    return [None if picture is None else next(rows) for picture in pictures]


def stacked(parts) -> np.ndarray | None:
    rows = [row for part in parts for row in part]
    width = next((len(row) for row in rows if row is not None), 0)
    return np.stack([np.zeros(width, np.float32) if row is None else row for row in rows]) if width else None
