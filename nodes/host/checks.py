"""Checks before a run: latent channels, prompt lengths, and whether the gradients of an unknown model are right."""

from __future__ import annotations

import comfy.latent_formats
import torch

from ...trainers.data.captions.caption_lengths import require_readable_length
from ...trainers.rng import make_generator
from .encoders import CaptionTokenizer, TokenCounter
from .gradient_check import central_difference, check_gradients, find_right_plans, gradient_norm_and_direction

__all__ = [
    "central_difference",
    "check_caption_lengths",
    "check_gradients",
    "check_latent_channels",
    "check_prompt_lengths",
    "check_text_lengths",
    "find_right_plans",
    "makes_images",
    "gradient_norm_and_direction",
    "random_latent",
    "square_latent_shapes",
]


def check_latent_channels(model, channels: int):
    wanted = model.model.latent_format.latent_channels
    if isinstance(model.model.latent_format, comfy.latent_formats.HunyuanImage21Refiner):
        wanted //= 2  # it lays two frames over each other
    if channels != wanted:
        raise ValueError(
            f"The latents have {channels} channels and this MODEL expects {wanted}. Encode the dataset with the VAE "
            "that belongs to the MODEL."
        )


def check_text_lengths(clip, texts, tokenize=None):
    """Raises ValueError for a prompt that is longer than any text encoder reads. `tokenize`: how the texts are read, if
    not as prompts."""
    count_tokens = TokenCounter(clip, tokenize or clip.tokenize)
    for text in texts:
        shown = text if len(text) <= 60 else text[:59] + "…"
        require_readable_length(text, f"The prompt {shown!r}", count_tokens, "Shorten it.")


def check_caption_lengths(clip, captions):
    """The same of prompts that are read as captions, literally, and must fit in one piece."""
    check_prompt_lengths(clip, captions, CaptionTokenizer(clip))


def check_prompt_lengths(clip, texts, tokenize=None):
    """Raises ValueError for a prompt that the text encoder would cut into several pieces, or that is longer than any
    reads."""
    texts = list(texts)
    check_text_lengths(clip, texts, tokenize)
    for text in texts:
        pieces = {name: len(chunks) for name, chunks in (tokenize or clip.tokenize)(text).items()}
        if (name := max(pieces, key=pieces.get)) and pieces[name] > 1:
            raise ValueError(
                f"The prompt {text!r} is longer than the text encoder {name} takes at once: it would be cut into "
                f"{pieces[name]} pieces. Shorten it."
            )


def makes_images(model) -> bool:
    """Whether a MODEL draws images or clips. ACE-Step 1.0's latents have two dimensions and are sound."""
    config = model.model.model_config.unet_config
    return "audio_model" not in config and model.model.latent_format.latent_dimensions in (2, 3)


def square_latent_shapes(model, resolution: int, dynamic: bool = False) -> tuple[tuple[int, ...], ...]:
    """Latent shapes (C, h, w) of square images of this size in pixels; dynamic: of every size from half of it on, in
    steps of 64."""
    shape = model.model.latent_format
    if not makes_images(model):
        raise ValueError(
            f"{type(model.model.model_config).__name__} does not generate images, and its latents have no height "
            "and width."
        )
    cells = lambda pixels: max(2, pixels // int(shape.spacial_downscale_ratio) // 2 * 2)
    sides = range(resolution // 2 // 64 * 64 or 64, resolution + 1, 64) if dynamic else (resolution,)
    return tuple((shape.latent_channels, cells(height), cells(width)) for height in sides for width in sides)


def random_latent(shape):
    return torch.randn((1, *shape), generator=make_generator(0))
