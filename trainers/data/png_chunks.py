"""The chunks of a PNG file."""

from __future__ import annotations

import struct
from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def list_png_chunks(data: bytes) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(type, (start, end of the content)) of each chunk; none for other files. The last may end after the data."""
    place = len(PNG_SIGNATURE)
    while data.startswith(PNG_SIGNATURE) and place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, (place + 8, place + 8 + length)
        place += length + 12
