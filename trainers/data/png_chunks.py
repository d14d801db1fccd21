"""The chunks of a PNG file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

NOTE_CHUNKS = {b"tEXt": "text", b"zTXt": "text", b"iTXt": "text", b"iCCP": "colour profile"}
MAX_DEFLATE_RATIO = 1032  # bytes that one byte unpacks to at most (zlib)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def list_png_chunks(data: bytes) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(type, (start, end of the content)) of each chunk; none for other files. The last may end after the data."""
    place = len(PNG_SIGNATURE)
    while data.startswith(PNG_SIGNATURE) and place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, (place + 8, place + 8 + length)
        place += length + 12


def measure_unpacked(kind: bytes, content: bytes, most: int) -> int:
    """Bytes of a text or a colour profile when it is unpacked, `most` + 1 for any above it. What is damaged counts as
    it lies in the file."""
    packed = find_packed_part(kind, content)
    if packed is None or len(packed) * MAX_DEFLATE_RATIO <= most:
        return len(content)
    try:
        return len(zlib.decompressobj().decompress(packed, most + 1))
    except zlib.error:
        return len(content)


def find_packed_part(kind: bytes, content: bytes) -> bytes | None:
    """The part of a chunk that is compressed; None where nothing is."""
    _, _, rest = content.partition(b"\0")
    if kind in (b"zTXt", b"iCCP"):
        return rest[1:]  # after the method
    if kind == b"iTXt" and rest[:1] not in (b"", b"\0"):
        return rest[2:].split(b"\0", 2)[-1]  # after flag, method, language and translated keyword
    return None
