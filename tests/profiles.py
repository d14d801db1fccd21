"""Colour profiles (ICC, version 2) made from scratch: matrix profiles, grey ones and one of inks."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
D65 = (0.3127, 0.3290)
SRGB_PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3_PRIMARIES = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_PRIMARIES = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def profile_bytes(space, tags, pcs=b"XYZ "):
    """A profile of tags {signature: content}, each content with its type."""
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    size = offset + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"mntr", space, pcs)
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + s15(*D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def s15(*values):
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def xyz(values):
    return b"XYZ \0\0\0\0" + s15(*values)


def named(name):
    return b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + bytes(1 + 8 + 3 + 67)


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def srgb_curve():
    levels = np.linspace(0, 1, 1024)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *np.rint(linear * 65535).astype(int))


def rgb_profile(primaries, tone=None, name="colours"):
    """A matrix profile with a white of D65; tone: a curve, else that of sRGB."""
    tone = tone or srgb_curve()
    to_xyz = lambda x, y: np.array([x / y, 1, (1 - x - y) / y])
    columns = np.stack([to_xyz(*primary) for primary in primaries], 1)
    white = to_xyz(*D65)
    columns = columns * np.linalg.solve(columns, white)
    adapted = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ white)) @ BRADFORD @ columns
    colorants = {sig: xyz(adapted[:, index]) for index, sig in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tones = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone)
    return profile_bytes(b"RGB ", {b"desc": named(name), b"wtpt": xyz(D50), **colorants, **tones})


def grey_profile(tone=None, name="greys"):
    return profile_bytes(b"GRAY", {b"desc": named(name), b"wtpt": xyz(D50), b"kTRC": tone or srgb_curve()})


def ink_profile(name="inks"):
    """CMYK in which cyan prints as pure red would look, and every other ink as black: nobody mistakes it for the
    arithmetic that Pillow does without a profile."""
    corners = []
    for index in range(16):
        cyan, other = index >> 3 & 1, index & 7
        corners += [0, 128, 128] if other else [136, 208, 195] if cyan else [255, 128, 128]  # L, a, b
    identity = [i for i in range(256)]
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += bytes(identity * 4) + bytes(corners) + bytes(identity * 3)
    return profile_bytes(b"CMYK", {b"desc": named(name), b"wtpt": xyz(D50), b"A2B0": lut}, b"Lab ")
