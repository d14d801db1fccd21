"""Between the modes in which Pillow decodes images: 8 bits from more, transparency found and laid over a ground."""

from __future__ import annotations

import numpy as np
from PIL import Image

GREY_MODES = ("1", "L", "LA", "La", "I", "F")


def check_colour_mode(mode: str) -> None:
    """ValueError for images that cannot be shown in RGB."""
    try:
        convert_to_8bit(Image.new(mode, (1, 1))).convert("RGB")
    except ValueError as error:
        raise ValueError(f"its colours are stored as {mode}, which cannot be read as RGB. Save it as RGB") from error


def convert_to_8bit(image: Image.Image) -> Image.Image:
    """The image itself, or modes of more than 8 bits per channel scaled to grey; PIL's own convert clips them to
    white."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    return Image.fromarray(
        np.rint(values.clip(min=0) * (255.0 / white_level(image.mode, values))).clip(max=255).astype(np.uint8)
    )


def white_level(mode: str, values: np.ndarray) -> float:
    """The value that means white. Floating point and 32-bit files do not say, so the smallest usual one that holds them
    all."""
    if mode.startswith("I;16"):
        return 65535.0
    levels = (255.0, 65535.0, 2.0**31 - 1) if mode == "I" else (1.0, 255.0, 65535.0)
    brightest = values.max(initial=0.0)
    return next((level for level in levels if brightest <= level), brightest)


def convert_to_rgba(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGBA" else image.convert("RGBA")


def flatten_alpha(image: Image.Image, ground) -> Image.Image:
    """RGB; what is transparent shows the ground instead of the colour hidden beneath it."""
    if not has_alpha(image):
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    image = convert_to_rgba(image)
    return Image.alpha_composite(Image.new("RGBA", image.size, (*ground, 255)), image).convert("RGB")


def is_grey_mode(mode: str) -> bool:
    return mode in GREY_MODES or mode.startswith("I;16")


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
