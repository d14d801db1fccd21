"""Colours that an image file tells without an ICC profile: by code in a PNG (cICP) or an AVIF (nclx), by EXIF as Adobe
RGB, by numbers in a PNG (gAMA, cHRM).

What they tell becomes the image's ICC profile where it can be converted to sRGB, and a reason that is told where it
cannot. Codes are those of ITU-T H.273. The curves of television (BT.709, BT.601, BT.2020) are taken for sRGB's, as
Chromium does: the standards give a camera's curve, which is not the inverse of a display's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from PIL import Image

from .avif_boxes import read_avif_nclx
from .colour_profiles import COLOUR_PROBLEM
from .matrix_profiles import ADOBE_RGB, D65, SRGB_PRIMARIES, MatrixColours, build_matrix_profile
from .pixel_modes import is_grey_mode
from .png_chunks import list_png_chunks

ADOBE_RGB_MARK = "R03"  # interoperability index of EXIF; with "uncalibrated" as the colour space
EXIF_POINTER, INTEROP_POINTER, COLOUR_SPACE_TAG, INTEROP_INDEX_TAG, UNCALIBRATED = 0x8769, 0xA005, 0xA001, 1, 65535
UNSPECIFIED, FULL_RANGE, RGB_MATRIX = 2, 1, 0
CODED_PRIMARIES = {
    1: MatrixColours("BT.709"),
    UNSPECIFIED: MatrixColours("BT.709"),
    5: MatrixColours("BT.601 (625 lines)", ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06))),
    6: MatrixColours("BT.601 (525 lines)", ((0.63, 0.34), (0.31, 0.595), (0.155, 0.07))),
    9: MatrixColours("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))),
    12: MatrixColours("Display P3", ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))),
}
SRGB_TRANSFERS = (1, UNSPECIFIED, 6, 13, 14, 15)
POWER_TRANSFERS = {4: 2.2, 5: 2.8, 8: 1.0}
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
SRGB_PNG_GAMMA, PNG_GAMMA_TOLERANCE = 1 / 2.2, 0.05  # a PNG says sRGB's curve as 0.45455
SRGB_CHROMATICITIES = tuple(value for point in (D65, *SRGB_PRIMARIES) for value in point)  # in the order of a cHRM
CHROMATICITY_TOLERANCE = 0.01


@dataclass(frozen=True)
class CodedColours:
    """What codes say: colours, or why they cannot be converted."""

    colours: MatrixColours | None
    problem: str | None = None


def apply_told_colours(image: Image.Image, data: bytes) -> None:
    """Gives an image that was opened and not decoded the ICC profile that counts (none for sRGB), and in
    info[COLOUR_PROBLEM] what is to be told. A PNG's codes go before its ICC profile, as the PNG specification says, but
    not where they cannot be converted; everything else counts only without an ICC profile."""
    coded = read_coded_colours(image, data)
    has_profile = bool(image.info.get("icc_profile"))
    if coded is not None and coded.colours is not None and (image.format == "PNG" or not has_profile):
        embed_colours(image, coded.colours)
    elif has_profile:
        return
    elif coded is not None:
        image.info[COLOUR_PROBLEM] = coded.problem
    elif is_adobe_rgb_by_exif(image):
        embed_colours(image, ADOBE_RGB)
    elif problem := explain_png_numbers(image):
        image.info[COLOUR_PROBLEM] = problem


def embed_colours(image: Image.Image, colours: MatrixColours) -> None:
    """As the ICC profile; sRGB needs none."""
    is_grey = is_grey_mode(image.mode)
    image.info.pop("icc_profile", None)
    if colours.gamma is not None or (colours.primaries != SRGB_PRIMARIES and not is_grey):
        image.info["icc_profile"] = build_matrix_profile(colours, is_grey)


def read_coded_colours(image: Image.Image, data: bytes) -> CodedColours | None:
    """What a PNG's or an AVIF's codes say; None where there are none."""
    if image.format == "AVIF":
        codes = read_avif_nclx(data)
        return codes and interpret_codes(*codes)
    codes = read_png_cicp(data) if image.format == "PNG" else None
    if codes is None:
        return None
    primaries, transfer, matrix, full_range = codes
    if matrix != RGB_MATRIX or full_range != FULL_RANGE:
        return CodedColours(None, format_code_problem(f"matrix {matrix}, range {full_range}; both must be for RGB"))
    return interpret_codes(primaries, transfer)


def read_png_cicp(data: bytes) -> tuple[int, int, int, int] | None:
    """(primaries, transfer, matrix, full range) of the chunk before the pixels; None without a whole one."""
    for kind, content in list_png_chunks(data):
        if kind == b"IDAT":
            return None
        if kind == b"cICP" and content[1] - content[0] == 4:
            return struct.unpack_from("4B", data, content[0])
    return None


def interpret_codes(primaries: int, transfer: int) -> CodedColours:
    if transfer in HDR_TRANSFERS:
        return CodedColours(
            None,
            f"its colours are HDR ({HDR_TRANSFERS[transfer]}), which sRGB cannot hold, so they are taken as they are, "
            "for sRGB, and look flat. Save it as SDR, for example as sRGB from the program that made it",
        )
    colours = CODED_PRIMARIES.get(primaries)
    if colours is None:
        return CodedColours(None, format_code_problem(f"primaries {primaries}"))
    if transfer in SRGB_TRANSFERS:
        return CodedColours(colours)
    if transfer in POWER_TRANSFERS:
        gamma = POWER_TRANSFERS[transfer]
        return CodedColours(replace(colours, name=f"{colours.name} with gamma {gamma:g}", gamma=gamma))
    return CodedColours(None, format_code_problem(f"transfer {transfer}"))


def format_code_problem(codes: str) -> str:
    return f"its colours are told by a code that is not known here ({codes}), and are taken as they are, for sRGB"


def is_adobe_rgb_by_exif(image: Image.Image) -> bool:
    """Whether EXIF marks the image as Adobe RGB, as cameras do (DCF 2.0)."""
    if image.format != "TIFF" and ADOBE_RGB_MARK.encode() not in image.info.get("exif", b""):
        return False  # a TIFF's marks are its own directories
    try:
        marks = image.getexif()
        space = marks.get_ifd(EXIF_POINTER).get(COLOUR_SPACE_TAG)
        index = marks.get_ifd(INTEROP_POINTER).get(INTEROP_INDEX_TAG)
    except Exception:  # struct.error, SyntaxError, TypeError, ... for damaged marks; the pixels are whole
        return False
    return space == UNCALIBRATED and isinstance(index, str) and index.strip("\0 ") == ADOBE_RGB_MARK


def explain_png_numbers(image: Image.Image) -> str | None:
    """What is to be told of a PNG whose numbers give other colours than sRGB: few programs follow them and many write
    wrong ones, so they are not applied."""
    if image.format != "PNG" or "srgb" in image.info:
        return None
    gamma, points = image.info.get("gamma"), image.info.get("chromaticity")
    found = []
    if gamma and abs(gamma / SRGB_PNG_GAMMA - 1) > PNG_GAMMA_TOLERANCE:
        found.append(f"gamma {gamma:g}")
    if points and max(abs(a - b) for a, b in zip(points, SRGB_CHROMATICITIES, strict=True)) > CHROMATICITY_TOLERANCE:
        found.append("other primaries or another white")
    if not found:
        return None
    return (
        f"its PNG header says that it is not in sRGB ({' and '.join(found)}), and it has no colour profile; its "
        "colours are taken as they are, for sRGB"
    )
