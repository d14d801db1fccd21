"""Drawn images of the toy world: colour x shape x size x ground, 64 px, with captions. `measure.py` reads them back.

The base model is trained on SEEN only. UNSEEN shapes are for proofs: what a LoRA must teach, and the base must fail at.
Every shape covers the same area at the same radius, so that size is one number whatever the shape: pi * radius ** 2.
"""

import math

import torch
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 40, 45),
    "yellow": (240, 210, 40),
    "green": (40, 160, 60),
    "cyan": (40, 195, 205),
    "blue": (45, 75, 215),
    "purple": (150, 50, 175),
}
GROUNDS = {"white": (243, 243, 243), "grey": (128, 128, 128), "black": (16, 16, 16)}
SIZES = {"small": (8.0, 10.5), "large": (16.0, 19.0)}  # radius of the circle of equal area, px in a 64 px image
SEEN = ("circle", "square", "triangle", "cross")
UNSEEN = ("star", "ring")
SHAPES = SEEN + UNSEEN
PX = 64
FINE = 4  # drawn this many times larger, then reduced: antialiasing
HOLE = 0.55  # inner over outer radius of a ring
STAR_WAIST = 0.45  # inner over outer radius of a star
DRIFT_PX = 3  # how far a centre strays from the middle


def turned(radii, start=-90.0):
    """Corner points at equal angles around (0, 0), the first one straight up: the list of radii is repeated around the
    circle."""
    angles = [math.radians(start + 360.0 * i / len(radii)) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def outline(shape, radius):
    """Corner points around (0, 0) of a shape whose area is pi * radius ** 2; circles and rings have many corners."""
    area = math.pi * radius**2
    if shape in ("circle", "ring"):
        return turned([radius if shape == "circle" else radius / math.sqrt(1 - HOLE**2)] * 96)
    if shape == "square":
        return turned([math.sqrt(area / 2)] * 4, start=-45.0)
    if shape == "triangle":
        return [(x, y + 0.12 * radius) for x, y in turned([math.sqrt(area * 4 / (3 * math.sqrt(3)))] * 3)]
    if shape == "cross":
        long, short = math.sqrt(area * 9 / 5) / 2, math.sqrt(area * 9 / 5) / 6
        quarter = [(-short, -long), (short, -long), (short, -short)]
        return [p for turn in range(4) for p in [rotate(q, 90 * turn) for q in quarter]]
    if shape == "star":
        tip = math.sqrt(area / (5 * STAR_WAIST * math.sin(math.pi / 5)))
        return turned([tip, STAR_WAIST * tip] * 5)
    raise ValueError(f"No shape is called {shape!r}. Use one of {', '.join(SHAPES)}.")


def rotate(point, degrees):
    """A point turned clockwise on the screen about (0, 0)."""
    a = math.radians(degrees)
    return point[0] * math.cos(a) - point[1] * math.sin(a), point[0] * math.sin(a) + point[1] * math.cos(a)


def paint(image, shape, colour, radius, centre, degrees=0.0):
    """Draw one shape, in pixels of the final image, on an image that is FINE times larger. A ring lets the ground
    through."""

    def placed(points):
        return [(FINE * (centre[0] + x), FINE * (centre[1] + y)) for x, y in (rotate(p, degrees) for p in points)]

    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).polygon(placed(outline(shape, radius)), fill=255)
    if shape == "ring":
        ImageDraw.Draw(mask).polygon(placed(turned([HOLE * radius / math.sqrt(1 - HOLE**2)] * 96)), fill=0)
    image.paste(Image.new("RGB", image.size, colour), mask=mask)


def draw(shape="circle", colour="red", size="large", ground="white", *, radius=None, centre=None, degrees=0.0, px=PX):
    """An image of one shape. Colour and ground are names or RGB; `radius` (px of 64) wins over `size`; centre in px of
    64."""
    radius = sum(SIZES[size]) / 2 if radius is None else radius
    image = Image.new("RGB", (FINE * PX, FINE * PX), GROUNDS.get(ground, COLOURS.get(ground, ground)))
    paint(image, shape, COLOURS.get(colour, colour), radius, centre or (PX / 2, PX / 2), degrees)
    return image.resize((px, px), Image.Resampling.BOX if px <= FINE * PX else Image.Resampling.BICUBIC)


def caption(shape, colour=None, size=None, ground=None):
    """`a small red circle on a white ground`; what is None is left out."""
    words = " ".join(w for w in ("a", size, colour, shape) if w)
    return f"{words} on a {ground} ground" if ground else words


def sample(rng, **fixed):
    """(image, caption, attributes) drawn by chance from a torch.Generator. `fixed` pins shape, colour, size, ground
    or radius.

    Shapes come from SEEN unless pinned. Colours and grounds vary by a few levels, centres by up to DRIFT_PX.
    """
    unknown = set(fixed) - {"shape", "colour", "size", "ground", "radius"}
    if unknown:
        raise ValueError(f"Cannot fix {sorted(unknown)}: a picture has shape, colour, size, ground and radius.")
    names = {"shape": SEEN, "colour": tuple(COLOURS), "size": tuple(SIZES), "ground": tuple(GROUNDS)}
    chosen = {
        key: values[below(rng, len(values))] for key, values in names.items()
    }  # drawn even when pinned: equal seeds, equal rest
    low, high = SIZES[fixed.get("size", chosen["size"])]
    radius = low + (high - low) * torch.rand((), generator=rng).item()
    drift = ((torch.rand(2, generator=rng) * 2 - 1) * DRIFT_PX).tolist()
    tint, shade = (torch.rand(3, generator=rng) * 16 - 8).tolist(), torch.rand((), generator=rng).item() * 12 - 6
    chosen |= {"radius": radius} | fixed
    chosen["centre"] = inside(chosen["shape"], chosen["radius"], drift)
    colour = tuple(round(min(255, max(0, c + t))) for c, t in zip(COLOURS[chosen["colour"]], tint, strict=True))
    ground = tuple(round(min(255, max(0, c + shade))) for c in GROUNDS[chosen["ground"]])
    image = draw(chosen["shape"], colour, ground=ground, radius=chosen["radius"], centre=chosen["centre"])
    return image, caption(*(chosen[k] for k in ("shape", "colour", "size", "ground"))), chosen


def below(rng, n):
    """A whole number from 0 to n - 1."""
    return int(torch.randint(n, (), generator=rng))


def inside(shape, radius, drift, margin=1.5):
    """The centre nearest to the drifted one that keeps the whole shape in the image, px."""
    xs, ys = zip(*outline(shape, radius), strict=True)
    return tuple(
        min(max(PX / 2 + d, margin - min(side)), PX - margin - max(side))
        for d, side in zip(drift, (xs, ys), strict=True)
    )
