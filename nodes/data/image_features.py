"""Image features of a CLIP_VISION, one row per image."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

from .. import host

VISION_BATCH_SIZE = 8
DEFAULT_VISION_SIDE = 384  # px, for encoders that take any size


def encode_image_features(clip_vision, images, check_interrupt=host.progress.raise_if_interrupted) -> np.ndarray:
    """(n, d) float32 of unit length for PIL images of any size, in batches; the middle square of each is seen, as the
    host does. ValueError for features that are no numbers."""
    parts = []
    for start in range(0, len(images), VISION_BATCH_SIZE):
        check_interrupt()
        parts.append(encode_image_batch(clip_vision, images[start : start + VISION_BATCH_SIZE]))
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def encode_image_batch(clip_vision, images) -> np.ndarray:
    side = getattr(clip_vision, "image_size", 0)
    side = side if isinstance(side, int) and side > 0 else DEFAULT_VISION_SIDE
    squares = [ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).float() / 255
    with torch.no_grad():
        found = pool_vision_output(clip_vision.encode_image(pixels)).float().cpu()
    if not torch.isfinite(found).all():
        raise ValueError("The clip_vision gives NaN features. Load it again, or choose another CLIP vision file.")
    return torch.nn.functional.normalize(found, dim=-1).numpy()


def pool_vision_output(output) -> torch.Tensor:
    """(B, d). CLIP and DINO pool by themselves; of SigLIP the host keeps all tokens, whose mean stands for the
    image."""
    pooled = output["image_embeds"]
    return pooled.mean(1) if pooled.ndim == 3 else pooled


def make_image_feature_encoder(clip_vision):
    """features(images) for trainers.data, or None when nothing is connected."""
    return None if clip_vision is None else lambda images: encode_image_features(clip_vision, images)
