"""Image files as they are opened: what would take minutes or all of the memory is refused or waits its turn."""

from __future__ import annotations

import contextlib
import io
import threading

from PIL import Image

PNG_PIXEL_CHUNKS = (b"IDAT", b"fdAT", b"fcTL")
MAX_PNG_NOTES = 2000  # an image has two or three; each may cost milliseconds
LARGE_PIXELS = 2**25  # 100 MB in RGB, and as much again in every step from one form to another
LARGE_IMAGE_LOCK = threading.RLock()


def open_image_bytes(data: bytes) -> Image.Image:
    """The first frame of an image file, not decoded yet, with the colour profile that counts: see `told_colours`.
    ValueError for a PNG with so many notes that reading them would take minutes; Pillow's own errors for what it cannot
    read."""
    from .told_colours import apply_told_colours

    check_png_notes(data)
    image = Image.open(io.BytesIO(data))
    apply_told_colours(image, data)
    return image


def check_png_notes(data: bytes) -> None:
    """ValueError for a PNG with too many chunks that are no pixels, such as texts."""
    from .png_chunks import list_png_chunks

    notes = 0
    for kind, _ in list_png_chunks(data):
        notes += kind not in PNG_PIXEL_CHUNKS
        if notes > MAX_PNG_NOTES:
            raise ValueError(f"it holds more than {MAX_PNG_NOTES} texts or other notes. Save it anew without metadata")


@contextlib.contextmanager
def one_large_image_at_a_time(size: tuple[int, int]):
    """Within it a thread may decode an image of this size (width, height): small ones at once, large ones in turn, so
    that memory holds one of them and not one for each thread."""
    with LARGE_IMAGE_LOCK if size[0] * size[1] > LARGE_PIXELS else contextlib.nullcontext():
        yield
