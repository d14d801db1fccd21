"""How much detail an image really holds, whatever its size in pixels says. Greys are arrays (H, W) of 0..255."""

from __future__ import annotations

import math

import numpy as np

SHARPNESS_TILES, SHARPEST_TILES = (
    8,
    6,
)  # 8 x 8 tiles; the sharpest 6 speak for the image, so that a soft background costs nothing
FINE_DETAIL_FREQUENCY = 0.25  # cycles per pixel; upscaled and blurred images have hardly any power above it
SPECTRUM_WINDOW_PX, MAX_SPECTRUM_WINDOWS = 128, 8  # px; enlargement is read from the 8 windows with the most detail
MAX_SEARCHED_WINDOWS = (
    256  # windows at most, evenly spread: those of 2048 x 2048 px; a camera's 24 MP would take half a GiB
)
DETAIL_END_LEVEL = 0.2  # of the usual level: where the spectrum falls below it, detail ends
MAX_ENLARGEMENT = 4.0  # enlargement by more than this cannot be told from plain blur


def fine_detail_share(grey: np.ndarray) -> float:
    """Share of the power (without the mean) above a quarter cycle per pixel, under a Hann window: 0.034 for the median
    sharp photo at 512 px, under 0.007 for the least sharp twentieth."""
    import scipy.fft

    window = np.outer(*(np.hanning(n).astype(np.float32) for n in grey.shape))
    total = window.sum()
    if total == 0:
        return 0.0
    spectrum = scipy.fft.rfft2((grey - (grey * window).sum() / total) * window)
    power = np.abs(spectrum) ** 2  # pyright: ignore[reportCallIssue, reportArgumentType]  an array, which scipy hides
    power[:, 1 : (grey.shape[1] + 1) // 2] *= 2  # rfft2 keeps one of each pair of mirrored columns
    fine = np.hypot(np.fft.fftfreq(grey.shape[0])[:, None], np.fft.rfftfreq(grey.shape[1])) > FINE_DETAIL_FREQUENCY
    return float(power[fine].sum() / max(power.sum(), 1e-6))


def tile_sharpness(grey: np.ndarray) -> float:
    """Mean Laplacian variance of the sharpest 6 of 64 tiles: 2272 for the median sharp photo at 512 px, under 410 for
    the least sharp twentieth. 0 for images too small for tiles."""
    if min(grey.shape) < 2 + 2 * SHARPNESS_TILES:
        return 0.0
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    height, width = (n // SHARPNESS_TILES for n in laplacian.shape)
    tiles = laplacian[: height * SHARPNESS_TILES, : width * SHARPNESS_TILES].reshape(
        SHARPNESS_TILES, height, SHARPNESS_TILES, width
    )
    return float(np.sort(tiles.var(axis=(1, 3)), axis=None)[-SHARPEST_TILES:].mean())


def estimate_enlargement(grey: np.ndarray) -> float:
    """The factor by which this image seems to have been enlarged, 1 to 4; 1 where its detail reaches down to single
    pixels or there is too little of it to tell. Within a third for bilinear, bicubic and Lanczos; images that are
    plainly soft read the same.

    The spectrum of a natural image falls with the square of the frequency, so times that square it is level.
    Enlarging by k leaves nothing above 0.5 / k cycles per pixel but the weak echoes of the interpolation."""
    windows = select_detailed_windows(grey)
    if windows is None:
        return 1.0
    return min(enlargement_along_axis(windows, axis) for axis in (1, 2))  # motion blurs one axis, enlarging both


def select_detailed_windows(grey) -> np.ndarray | None:
    """(n, WINDOW, WINDOW), the most detailed ones with their mean removed; None for images that are too small or too
    plain."""
    rows, columns = (n // SPECTRUM_WINDOW_PX for n in grey.shape)
    if rows * columns == 0:
        return None
    tiles = (
        grey[: rows * SPECTRUM_WINDOW_PX, : columns * SPECTRUM_WINDOW_PX]
        .reshape(rows, SPECTRUM_WINDOW_PX, columns, SPECTRUM_WINDOW_PX)
        .swapaxes(1, 2)
    )
    apart = math.ceil(math.sqrt(rows * columns / MAX_SEARCHED_WINDOWS))
    tiles = tiles[::apart, ::apart].reshape(-1, SPECTRUM_WINDOW_PX, SPECTRUM_WINDOW_PX).astype(np.float32)
    detail = np.minimum(np.square(np.diff(tiles, axis=1)).mean((1, 2)), np.square(np.diff(tiles, axis=2)).mean((1, 2)))
    best = np.argsort(-detail, kind="stable")[:MAX_SPECTRUM_WINDOWS]
    best = best[detail[best] > 1]  # under one grey level there is only rounding noise
    return tiles[best] - tiles[best].mean((1, 2), keepdims=True) if len(best) else None


def enlargement_along_axis(windows, axis) -> float:
    import scipy.fft

    taper = np.hanning(SPECTRUM_WINDOW_PX).astype(np.float32)
    tapered = windows * (taper if axis == 2 else taper[:, None])
    spectrum = scipy.fft.rfft(tapered, axis=axis)
    heights = np.abs(spectrum)  # pyright: ignore[reportCallIssue, reportArgumentType]  an array, which scipy hides
    power = np.square(heights).mean((0, 3 - axis))
    frequency = np.arange(len(power)) / SPECTRUM_WINDOW_PX
    level = np.convolve(power * frequency**2, np.ones(5) / 5, mode="same")
    first, last = 5, len(level) - 3  # the ends of the running mean are lower by themselves
    weak = np.nonzero(level[first:last] < DETAIL_END_LEVEL * np.median(level[4:16]))[0]
    return float(min(MAX_ENLARGEMENT, 0.5 / frequency[first + weak[0]])) if len(weak) else 1.0
