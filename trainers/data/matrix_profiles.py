"""Colour profiles (ICC, version 4.4) of the colours that are described by primaries and a tone curve alone."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float]  # CIE 1931 x, y

D65: Point = (0.3127, 0.3290)
D50_XYZ = (0.9642, 1.0, 0.8249)  # the white that ICC profiles are relative to
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB_PRIMARIES: tuple[Point, Point, Point] = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # (a x + b) ^ g from d on, c x below: g, a, b, c, d


@dataclass(frozen=True)
class MatrixColours:
    """Colours with a white of D65. gamma: of a power curve, None for the curve of sRGB."""

    name: str
    primaries: tuple[Point, Point, Point] = SRGB_PRIMARIES  # red, green, blue
    gamma: float | None = None


ADOBE_RGB = MatrixColours("Adobe RGB (1998)", ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), 563 / 256)


def build_matrix_profile(colours: MatrixColours, grey: bool = False) -> bytes:
    """The colours as an ICC profile; grey: for images without colour, where the curve alone counts."""
    tone, white = encode_tone_curve(colours.gamma), xyz_of_point(D65)
    tags = {b"desc": encode_text(colours.name), b"cprt": encode_text("public domain"), b"wtpt": encode_xyz(D50_XYZ)}
    if grey:
        return join_profile(b"GRAY", tags | {b"kTRC": tone})
    columns = np.stack([xyz_of_point(point) for point in colours.primaries], 1)
    adapt = adapt_white(white)
    columns = adapt @ (columns * np.linalg.solve(columns, white))  # the three sum up to white
    for index, letter in enumerate((b"r", b"g", b"b")):
        tags |= {letter + b"XYZ": encode_xyz(columns[:, index]), letter + b"TRC": tone}
    return join_profile(b"RGB ", tags | {b"chad": b"sf32" + bytes(4) + encode_fixed(*adapt.ravel())})


def xyz_of_point(point: Point) -> np.ndarray:
    """(3,) X, Y, Z of a chromaticity at Y = 1."""
    x, y = point
    return np.array([x / y, 1.0, (1 - x - y) / y])


def adapt_white(white: np.ndarray) -> np.ndarray:
    """(3, 3) from XYZ under this white to XYZ under D50, as ICC profiles do it (linear Bradford)."""
    return np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50_XYZ / (BRADFORD @ white)) @ BRADFORD


def encode_tone_curve(gamma: float | None) -> bytes:
    """A parametric curve: a power, or that of sRGB."""
    kind, values = (3, SRGB_CURVE) if gamma is None else (0, (gamma,))
    return b"para" + bytes(4) + struct.pack(">HH", kind, 0) + encode_fixed(*values)


def encode_fixed(*values: float) -> bytes:
    """s15Fixed16 numbers."""
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def encode_xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + encode_fixed(*values)


def encode_text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(encoded), 28) + encoded


def join_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A display profile of these tags by their signatures, each content with its type."""
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x04400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + encode_fixed(*D50_XYZ)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body
