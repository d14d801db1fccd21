"""Image files as they are opened: what would take minutes or all of the memory is refused or waits its turn."""

from __future__ import annotations

import contextlib
import io
import threading

from PIL import Image

PNG_PIXEL_CHUNKS = (b"IDAT", b"fdAT", b"fcTL")
MAX_PNG_NOTES = 2000  # an image has two or three; each may cost milliseconds
MAX_NOTE_BYTES, MAX_NOTES_BYTES = 2**20, 2**26  # unpacked: of one note and of all, the limits of Pillow
WITHOUT_NOTES = "Save it anew without metadata"
LARGE_PIXELS = 2**25  # 100 MB in RGB, and as much again in every step from one form to another
MAX_WEBP_PIXELS = 80_000_000  # its decoder holds 16 bytes a pixel, and cannot make it smaller; a PNG's holds 4
LARGE_IMAGE_LOCK = threading.RLock()


def open_image_bytes(data: bytes) -> Image.Image:
    """The first frame of an image file, not decoded yet, with the colour profile that counts: see `told_colours`.
    ValueError for a PNG with more notes, or larger ones, than are read, and for a WebP that would fill the memory;
    Pillow's own errors for what it cannot read."""
    from .told_colours import apply_told_colours

    check_png_notes(data)
    image = Image.open(io.BytesIO(data))
    check_webp_size(image)
    apply_told_colours(image, data)
    return image


def check_webp_size(image: Image.Image) -> None:
    """ValueError for a WebP that would fill the memory when it is decoded; opening it took none yet."""
    pixels = image.width * image.height
    if image.format == "WEBP" and pixels > MAX_WEBP_PIXELS:
        raise ValueError(
            f"it has {pixels / 1e6:.4g} megapixels, and a WebP is read up to {MAX_WEBP_PIXELS / 1e6:.4g} megapixels, "
            "for it takes several times the memory of other formats. Save it smaller, or as PNG or JPEG"
        )


def check_png_notes(data: bytes) -> None:
    """ValueError for a PNG with too many chunks that are no pixels, such as texts, or whose texts or colour profile
    unpack to more than is read."""
    from .png_chunks import NOTE_CHUNKS, list_png_chunks, measure_unpacked

    if sum(kind not in PNG_PIXEL_CHUNKS for kind, _ in list_png_chunks(data)) > MAX_PNG_NOTES:
        raise ValueError(f"it holds more than {MAX_PNG_NOTES} texts or other notes. {WITHOUT_NOTES}")
    total = 0
    for kind, (start, end) in list_png_chunks(data):
        if kind not in NOTE_CHUNKS:
            continue
        size = measure_unpacked(kind, data[start:end], MAX_NOTE_BYTES)
        if size > MAX_NOTE_BYTES and kind != b"tEXt":
            raise ValueError(
                f"its {NOTE_CHUNKS[kind]} ({kind.decode()}, {end - start} bytes) unpacks to more than "
                f"{MAX_NOTE_BYTES >> 20} MiB. {WITHOUT_NOTES}"
            )
        total += size
        if total > MAX_NOTES_BYTES:
            raise ValueError(f"its texts hold more than {MAX_NOTES_BYTES >> 20} MiB. {WITHOUT_NOTES}")


@contextlib.contextmanager
def one_large_image_at_a_time(size: tuple[int, int]):
    """Within it a thread may decode an image of this size (width, height): small ones at once, large ones in turn, so
    that memory holds one of them and not one for each thread."""
    with LARGE_IMAGE_LOCK if size[0] * size[1] > LARGE_PIXELS else contextlib.nullcontext():
        yield
