"""The colour codes of an AVIF's main image, which Pillow does not tell: from its boxes (ISO/IEC 14496-12, 23008-12)."""

from __future__ import annotations

import struct
from collections.abc import Iterator


def read_avif_nclx(data: bytes) -> tuple[int, int] | None:
    """(primaries, transfer) of H.273 for the primary item; None where the file gives none, or is damaged."""
    try:
        return find_primary_nclx(data)
    except (struct.error, IndexError):
        return None


def find_primary_nclx(data: bytes) -> tuple[int, int] | None:
    meta = find_content(list_boxes(data, (0, len(data))), b"meta")
    if meta is None:
        return None
    parts = dict(list_boxes(data, (meta[0] + 4, meta[1])))
    if not {b"pitm", b"iprp"} <= parts.keys():
        return None
    properties = list(list_boxes(data, parts[b"iprp"]))
    container = find_content(properties, b"ipco")
    described = list(list_boxes(data, container)) if container else []
    primary = read_primary_item(data, parts[b"pitm"][0])
    for kind, (start, _) in properties:
        for number in list_item_properties(data, start, primary) if kind == b"ipma" else ():
            name, (place, end) = described[number - 1]
            if number and name == b"colr" and data[place : place + 4] == b"nclx" and end - place >= 8:
                return struct.unpack_from(">HH", data, place + 4)
    return None


def list_boxes(data: bytes, span: tuple[int, int]) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(type, (start, end of the content)) of each box in the span."""
    place, end = span
    while place + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, place)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", data, place + 8), 16
        size = size or end - place  # 0: to the end
        if size < head or place + size > end:
            return
        yield kind, (place + head, place + size)
        place += size


def find_content(boxes, kind: bytes) -> tuple[int, int] | None:
    return next((content for name, content in boxes if name == kind), None)


def read_primary_item(data: bytes, place: int) -> int:
    """The item id of a `pitm` box whose content starts here."""
    return struct.unpack_from(">I" if data[place] else ">H", data, place + 4)[0]


def list_item_properties(data: bytes, place: int, item: int) -> list[int]:
    """The numbers, from 1, of the properties that an `ipma` box gives to the item."""
    version, wide = data[place], data[place + 3] & 1
    (entries,) = struct.unpack_from(">I", data, place + 4)
    place += 8
    for _ in range(entries):
        (here,) = struct.unpack_from(">I" if version else ">H", data, place)
        place += 4 if version else 2
        count, place = data[place], place + 1
        if here == item:
            numbers = struct.unpack_from(f">{count}{'H' if wide else 'B'}", data, place)
            return [number & (0x7FFF if wide else 0x7F) for number in numbers]  # the first bit: essential
        place += count * (2 if wide else 1)
    return []
