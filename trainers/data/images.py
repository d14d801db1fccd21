"""Between datasets and the graph's own images: tensors become files named by their content, records become tensors.

Tensors are (B, H, W, channels) in 0..1, masks (B, H, W) or (H, W); in both directions white in a mask is what is
learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import write_bytes_atomically
from .metadata import check_plain_text
from .records import ImageDataset, ImageRecord, open_image, open_mask, sha1_hex
from .writers import encode_image_bytes

CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def dataset_from_tensors(
    images: Sequence[Tensor],
    captions: Sequence[str] = (),
    masks: Sequence[Tensor] = (),
    folder=".",
    report: Callable[[int, int, str], None] | None = None,
    check_interrupt: Callable[[], None] | None = None,
) -> ImageDataset:
    """A dataset of these images, each written once into the folder as a PNG that is called after its content.

    Captions and masks: none, one for all, one for each item of the list, or one for each image."""
    tensors = [image for batch in images for image in batch]
    if not tensors:
        raise ValueError("There are no images to make a dataset of.")
    counts = [len(batch) for batch in images]
    texts = assign_per_image([check_plain_text(text.strip(), "A caption") for text in captions], counts, "captions")
    shapes = assign_per_image(
        [mask for batch in masks for mask in (batch if batch.ndim == 3 else batch[None])], counts, "masks"
    )
    records = []
    for index, (image, text, mask) in enumerate(zip(tensors, texts, shapes, strict=True)):
        if check_interrupt:
            check_interrupt()
        records.append(save_image_record(index, image, text, mask, Path(folder)))
        if report:
            report(index + 1, len(tensors), records[-1].id[:8])
    return ImageDataset(tuple(records))


def assign_per_image(things: Sequence, counts: list[int], what: str) -> list:
    """One thing for each image; None for each when there are none."""
    total = sum(counts)
    if len(things) == len(counts) and len(things) != total:
        return [thing for thing, times in zip(things, counts, strict=True) for _ in range(times)]
    if len(things) in (0, 1):
        return list(things or [None]) * total
    if len(things) != total:
        raise ValueError(
            f"There are {total} images in {len(counts)} batches, and {len(things)} {what}. Give none, one for all, "
            "one for each batch, or one for each image."
        )
    return list(things)


def save_image_record(index: int, pixels: Tensor, text: str | None, mask: Tensor | None, folder: Path) -> ImageRecord:
    image = tensor_to_image(pixels, f"image {index + 1}")
    path, id_ = save_hashed_png(image, folder)
    shape = save_mask_file(mask, image, index, folder) if mask is not None else (None, None)
    return ImageRecord(id_, str(path), image.size, captions=(text,) if text else (), mask=shape[0], mask_id=shape[1])


def save_mask_file(mask: Tensor, image: Image.Image, index: int, folder: Path) -> tuple[str, str]:
    """(path, sha1) of a mask's file. ValueError for one that would let nothing be learnt, or of another shape."""
    shape = tensor_to_image(mask[..., None], f"mask {index + 1}")
    if shape.getextrema()[1] == 0:
        raise ValueError(
            f"Mask {index + 1} is black everywhere ({shape.width}x{shape.height} px), so nothing of its image would "
            "be learnt. White is what is learnt; Load Image gives a black mask where an image has no transparency."
        )
    if shape.width * image.height != shape.height * image.width:
        raise ValueError(
            f"Mask {index + 1} is {shape.width}x{shape.height} px and its image {image.width}x{image.height} px. "
            "Give a mask of the image's shape."
        )
    path, id_ = save_hashed_png(shape, folder)
    return str(path), id_


def save_hashed_png(image: Image.Image, folder: Path) -> tuple[Path, str]:
    """(file, sha1 of its bytes): the image as a PNG that is called after its content, written once."""
    data = encode_image_bytes(image, "PNG")
    path = Path(folder) / f"{sha1_hex(data)}.png"
    if not path.is_file() or path.stat().st_size != len(data):
        write_bytes_atomically(path, data)
    return path, sha1_hex(data)


def tensor_to_image(tensor: Tensor, what: str) -> Image.Image:
    """(H, W, channels) in 0..1 -> an image of 8 bits, rounded."""
    array = tensor.detach().cpu().float().numpy()
    if array.ndim != 3 or array.shape[-1] not in CHANNEL_MODES or 0 in array.shape:
        raise ValueError(f"{what} has the shape {tuple(array.shape)}; it must be height, width and 1, 3 or 4 channels.")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds NaN or infinite values. Look at the node that made it.")
    array = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(array if array.shape[-1] > 1 else array[..., 0])


def image_to_batch_tensor(image: Image.Image) -> Tensor:
    """(1, H, W, 3) of an image in RGB, (1, H, W) of one in L, in 0..1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def record_to_tensors(record: ImageRecord) -> tuple[Tensor, str, Tensor]:
    """(image (1, H, W, 3), first caption or "", mask (1, H, W), white where the record has none)."""
    image, mask = image_to_batch_tensor(open_image(record)), open_mask(record)
    return (
        image,
        next(iter(record.captions), ""),
        torch.ones(image.shape[:3]) if mask is None else image_to_batch_tensor(mask),
    )
