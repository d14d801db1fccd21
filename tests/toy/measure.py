"""Reads a toy image back in pixels: which shape, colour, ground, size, and how large. Plain geometry, no model."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import shapes

ZOOM = 4  # the mask is judged this many times larger
MIN_CONTRAST = 40  # levels between ground and shape, below which nothing is seen
MIN_AREA = 60  # px of 64 x 64; the smallest drawn shape has 201
LARGE = 520  # px; small shapes end at 346, large ones begin at 804
SPOKES = 72  # directions in which the outline is measured
ROUND = 0.075  # strongest wave of a circle: half of a square's. The base's small circles have up to 0.045, squares 0.12


@dataclass(frozen=True)
class Seen:
    """What an image shows. Names are None (or "other" for the shape) when nothing fits; lengths and areas in px of a
    64 px image."""

    shape: str
    colour: str | None
    ground: str | None
    size: str | None
    area: float  # px covered by the shape, edge pixels in part
    centre: tuple[float, float]
    rgb: tuple[int, int, int]  # the shape's median colour
    ground_rgb: tuple[int, int, int]
    stray: float  # share of the coverage that lies outside the largest piece
    hole: float  # hole area over filled area
    solidity: float  # filled area over the area of its convex hull
    waves: tuple[float, ...]  # 2, 3, 4, 5 bumps around the outline: amplitude over mean radius

    def matches(self, **wanted):
        """True if every wanted attribute (shape=, colour=, ground=, size=) was seen."""
        return all(getattr(self, key) == value for key, value in wanted.items())


def measure(image):
    """What is seen on an image: PIL, or an array or tensor (H, W, 3) in [0, 1], with or without a batch of one in
    front."""
    rgb = levels(image)
    ground = np.median(
        np.concatenate([edge.reshape(-1, 3) for edge in (rgb[:2], rgb[-2:], rgb[:, :2], rgb[:, -2:])]), 0
    )
    cover, colour = coverage(rgb, ground)
    piece, stray = largest_piece(cover)
    area = float((cover * nearby(piece)).sum()) * (64 / rgb.shape[1]) * (64 / rgb.shape[0])
    if area < MIN_AREA:
        return Seen(
            "other",
            None,
            ground_name(ground),
            None,
            area,
            (32.0, 32.0),
            whole(ground),
            whole(ground),
            0.0,
            0.0,
            0.0,
            (0.0,) * 4,
        )
    filled, hole = without_holes(piece)
    centre, waves, solid = centroid(filled), outline_waves(filled), solidity(filled)
    at = tuple(float(c / side * 64) for c, side in zip(centre[::-1], piece.shape[::-1], strict=True))
    return Seen(
        shape_name(waves, solid, hole),
        colour_name(colour),
        ground_name(ground),
        "large" if area > LARGE else "small",
        area,
        at,
        whole(colour),
        whole(ground),
        stray,
        hole,
        solid,
        waves,
    )


def levels(image):
    """(H, W, 3) float levels, 0 to 255."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"), dtype=np.float32)
    array = np.asarray(image.detach().cpu().float() if hasattr(image, "detach") else image, dtype=np.float32)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"Got an array of shape {array.shape}; give one picture as (H, W, 3) with values in [0, 1].")
    return array.clip(0, 1) * 255


def coverage(rgb, ground):
    """How much of each pixel the shape covers, 0 to 1, and the shape's colour: its colour mixes with the ground's along
    its edge."""
    away = rgb - ground
    far = np.linalg.norm(away, axis=2)
    peak = np.sort(far.ravel())[-30]  # the 30th strongest pixel: single bad pixels do not set the scale
    if peak < MIN_CONTRAST:
        return np.zeros(far.shape, np.float32), ground
    colour = np.median(rgb[far > 0.75 * peak], 0)
    axis = colour - ground
    share = (away @ axis) / max(float(axis @ axis), 1.0)
    return np.where(share < 0.12, 0, share).clip(0, 1), colour


def largest_piece(cover):
    """Mask of the largest connected piece, ZOOM times larger, and the share of the coverage outside it."""
    from scipy import ndimage

    fine = ndimage.gaussian_filter(ndimage.zoom(cover, ZOOM, order=1, mode="nearest", grid_mode=True), ZOOM * 0.4)
    pieces, count = ndimage.label(fine > 0.5)
    if count == 0:
        return pieces > 0, 0.0
    sizes = ndimage.sum_labels(np.ones(pieces.shape), pieces, range(1, count + 1))
    piece = pieces == 1 + int(np.argmax(sizes))
    return piece, float(1 - sizes.max() / sizes.sum())


def nearby(piece, margin_px=1.5):
    """Mask, in image pixels, of a piece and its margin: edge pixels belong to it, noise far away does not."""
    from scipy import ndimage

    near = ndimage.binary_dilation(piece, iterations=round(margin_px * ZOOM))
    return near.reshape(near.shape[0] // ZOOM, ZOOM, near.shape[1] // ZOOM, ZOOM).any((1, 3))


def without_holes(mask):
    """The mask with its holes filled, and the holes' share of it."""
    from scipy import ndimage

    filled = ndimage.binary_fill_holes(mask)
    return filled, float(1 - mask.sum() / filled.sum())


def centroid(mask):
    """(row, column) of the middle of a mask, in its own pixels."""
    rows, columns = np.nonzero(mask)
    return rows.mean() + 0.5, columns.mean() + 0.5


def outline_waves(mask):
    """Amplitudes of 2, 3, 4 and 5 bumps in the distance from the centroid to the outline, over its mean."""
    row, column = centroid(mask)
    rows, columns = np.nonzero(mask)
    y, x = rows + 0.5 - row, columns + 0.5 - column
    spoke = ((np.arctan2(y, x) / (2 * np.pi)) * SPOKES).round().astype(int) % SPOKES
    reach = np.zeros(SPOKES)
    np.maximum.at(reach, spoke, np.hypot(x, y))
    spectrum = np.abs(np.fft.rfft(reach)) * 2 / SPOKES / max(reach.mean(), 1e-6)
    return tuple(float(a) for a in spectrum[2:6])


def solidity(mask):
    """Area over the area of the convex hull."""
    from scipy.spatial import ConvexHull

    rows, columns = np.nonzero(mask)
    corners = np.concatenate([np.stack([rows + dy, columns + dx], 1) for dy in (0, 1) for dx in (0, 1)])
    return float(mask.sum() / ConvexHull(corners).volume)


def shape_name(waves, solid, hole):
    """A hole makes a ring; the strongest wave tells the corners, the solidity whether they are arms. No fit, or a long
    shape: "other"."""
    two, three, four, five = waves
    strongest = max(waves)
    if two > 0.1:
        return "other"
    if hole > 0.12:
        return "ring"
    if strongest < ROUND:
        return "circle" if solid > 0.93 else "other"
    if strongest == three and three > 0.12:
        return "triangle" if solid > 0.85 else "other"
    if strongest == four and solid > 0.88:
        return "square"
    if strongest == four and four > 0.1:
        return "cross"
    if strongest == five and five > 0.1 and solid < 0.85:
        return "star"
    return "other"


def colour_name(rgb):
    """The named colour whose hue and strength are nearest; None for greys."""
    if max(rgb) - min(rgb) < MIN_CONTRAST:
        return None
    return min(shapes.COLOURS, key=lambda name: abs(turn(hue(rgb) - hue(shapes.COLOURS[name]))))


def ground_name(rgb):
    """white, grey or black; None for a coloured ground."""
    if max(rgb) - min(rgb) > MIN_CONTRAST:
        return None
    return min(shapes.GROUNDS, key=lambda name: abs(shapes.GROUNDS[name][0] - float(np.mean(rgb))))


def hue(rgb):
    """Angle on the colour circle, degrees."""
    import colorsys

    return 360 * colorsys.rgb_to_hsv(*(float(c) / 255 for c in rgb))[0]


def turn(degrees):
    """An angle between -180 and 180."""
    return (degrees + 180) % 360 - 180


def whole(rgb):
    """A colour in whole levels."""
    return tuple(round(float(c)) for c in rgb)
