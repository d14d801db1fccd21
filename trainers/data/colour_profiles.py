"""Colours as sRGB: what an image's colour profile (ICC) says of its numbers, and their conversion. The profile is the
embedded one, or one made of what the file tells otherwise (`told_colours`).

An image without a profile, or with one that says sRGB, keeps its pixels bit for bit; so does one whose profile cannot
be used, which is told. Conversion is relative colorimetric with black point compensation, by LittleCMS.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from .pixel_modes import convert_to_8bit, convert_to_rgba, has_alpha, is_grey_mode

COLOUR_PROBLEM = "colour_problem"  # in Image.info: why colours that the file tells are not applied
SRGB_TOLERANCE = 2  # levels of 255: profiles that mean sRGB differ by that much, gamma 2.2 differs by 9
PROBE_STEPS = 9  # colours along each channel that a profile is compared with sRGB at
GREY, RGB, CMYK = "GRAY", "RGB", "CMYK"  # as profiles name the colour space of an image
RGB_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV")
PIXEL_MODES = {GREY: "L", RGB: "RGB", CMYK: "CMYK"}  # in Pillow, of what is converted


@dataclass(frozen=True)
class ColourProfile:
    """What an image's profile is good for."""

    name: str | None = None  # of a profile from which the pixels are converted
    transform: Any = None  # the conversion to sRGB
    is_srgb: bool = False  # the profile fits the image and says sRGB
    problem: str | None = None  # why the profile cannot be used; the pixels stay as they are then


def read_colour_profile(image: Image.Image) -> ColourProfile:
    """What the profile embedded in the image is good for."""
    data = image.info.get("icc_profile")
    if not data:
        return ColourProfile(problem=image.info.get(COLOUR_PROBLEM))
    space = name_colour_space(image.mode)
    return examine_profile(bytes(data), space, name_pixel_mode(image.mode, space))


def name_colour_space(mode: str) -> str:
    """The colour space of a profile that fits images of this mode of Pillow."""
    if is_grey_mode(mode):
        return GREY
    return RGB if mode in RGB_MODES else mode


def name_pixel_mode(mode: str, space: str) -> str:
    """The mode of Pillow in which such an image's colours are converted. Grey of 16 bits is converted from all of
    them."""
    return mode if mode.startswith("I;16") else PIXEL_MODES.get(space, mode)


@lru_cache(maxsize=32)  # the images of a dataset share a few profiles, and a transform takes milliseconds to make
def examine_profile(data: bytes, space: str, mode: str) -> ColourProfile:
    """What a profile is good for in images of a colour space, whose pixels are given in a mode of Pillow."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        facts: Any = profile.profile
        own = facts.xcolor_space.strip()
        if own != space:
            return examine_foreign_profile(data, own, space)
        if is_srgb(make_srgb_transform(profile, PIXEL_MODES[space]), space):
            return ColourProfile(is_srgb=True)
        return ColourProfile(format_profile_name(facts.profile_description), make_srgb_transform(profile, mode))
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # OSError, PyCMSError, KeyError, ... for damaged profiles, and a Pillow without LittleCMS
        return ColourProfile(problem=format_profile_problem(str(error) or type(error).__name__))


def examine_foreign_profile(data: bytes, own: str, space: str) -> ColourProfile:
    """A profile of another colour space than the image's: nothing to tell where it means sRGB, as programs leave it in
    images that they turn grey."""
    if own == RGB and examine_profile(data, RGB, RGB).is_srgb:
        return ColourProfile()
    return ColourProfile(problem=format_profile_problem(f"it is for {own}, and the image is {space}"))


def format_profile_problem(reason: str) -> str:
    return f"its colour profile cannot be used ({reason}), so its colours are taken as they are, for sRGB"


def format_profile_name(description: str | None) -> str:
    """The profile's name, short and printable."""
    name = "".join(char for char in description or "" if char.isprintable())
    return " ".join(name.split())[:60] or "a profile without a name"


def make_srgb_transform(profile: ImageCms.ImageCmsProfile, mode: str):
    # unoptimised: as fast, and without the rounding of prepared tables, which would differ between versions
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOOPTIMIZE
    return ImageCms.buildTransform(
        profile, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags
    )


def is_srgb(transform, space: str) -> bool:
    """Whether the transform leaves colours as they are."""
    if space == CMYK:
        return False
    probe = make_grey_probe() if space == GREY else make_colour_probe()
    change = np.asarray(probe.convert("RGB"), np.int16) - np.asarray(transform.apply(probe), np.int16)
    return int(np.abs(change).max()) <= SRGB_TOLERANCE


def make_grey_probe() -> Image.Image:
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def make_colour_probe() -> Image.Image:
    """A cube of colours, and every grey."""
    levels = np.linspace(0, 255, PROBE_STEPS).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    return Image.fromarray(np.concatenate([cube, np.asarray(make_grey_probe().convert("RGB"))], 1))


def convert_to_srgb(image: Image.Image) -> Image.Image:
    """The image itself, or where its profile says other colours than sRGB a new one in L, LA, RGB or RGBA. A profile
    stays with it only where it fits the image and says sRGB."""
    found = read_colour_profile(image)
    if found.transform is not None:
        image = apply_transform(image, found.transform)
    if not found.is_srgb:
        image.info.pop("icc_profile", None)
    return image


def apply_transform(image: Image.Image, transform) -> Image.Image:
    """The image in sRGB: L, LA, RGB or RGBA."""
    space = name_colour_space(image.mode)
    alpha = convert_to_rgba(image).getchannel("A") if has_alpha(image) else None
    colours = transform.apply(separate_colours(image, name_pixel_mode(image.mode, space)))
    colours = colours.getchannel("G") if space == GREY else colours
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


def separate_colours(image: Image.Image, mode: str) -> Image.Image:
    """The image's colours alone, in the mode that its transform takes."""
    if image.mode == mode:
        return image
    if mode == "L":
        return convert_to_8bit(image).convert("L")
    return (convert_to_rgba(image) if has_alpha(image) else image).convert(mode)
