"""Bars at the edges of an image: letterbox, scan borders, frames of one colour."""

from __future__ import annotations

import numpy as np

BAR_COLOUR_TOLERANCE = 10  # levels of 255 that one colour may vary by, for JPEG's sake
BAR_EDGE_DEPTH = 8  # px past a bar in which its image must begin
MIN_BAR_EDGE_SHARE = 0.6  # share of the bar's length along which it must begin


def detect_bars(rgb: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in px: rows and columns of one colour that end in a straight edge. A plain ground,
    into which the subject reaches at a few places only, is no bar. (H, W, 3) uint8; bars that would leave nothing are
    none."""
    top, bottom = measure_bar_depth(rgb), measure_bar_depth(rgb[::-1])
    if top + bottom >= len(rgb):
        return 0, 0, 0, 0
    inside = rgb[top : len(rgb) - bottom].swapaxes(0, 1)  # columns are judged without the bars above and below
    left, right = measure_bar_depth(inside), measure_bar_depth(inside[::-1])
    return (left, top, right, bottom) if left + right < len(inside) else (0, top, 0, bottom)


def measure_bar_depth(rows: np.ndarray) -> int:
    """How many of the first rows are a bar."""
    colour = np.median(rows[0], axis=0)
    count = 0
    for start in range(0, len(rows), 64):  # most images have none and are done after the first piece
        plain = (
            np.abs(rows[start : start + 64].astype(np.int16) - colour.astype(np.int16)).max(2) <= BAR_COLOUR_TOLERANCE
        ).mean(1) > 0.995
        if not plain.all():
            count += int(plain.argmin())
            break
        count += len(plain)
    if count in (0, len(rows)):
        return 0
    beyond = (
        np.abs(rows[count : count + BAR_EDGE_DEPTH].astype(np.int16) - colour.astype(np.int16)).max(2)
        > BAR_COLOUR_TOLERANCE
    )
    return count if beyond.mean(1).max() >= MIN_BAR_EDGE_SHARE else 0
