"""Checks before a run: latent channels, prompt lengths, and whether the gradients of an unknown model are right."""

from __future__ import annotations

import math

import torch

from ...trainers.data.captions.caption_lengths import require_readable_length
from ...trainers.rng import make_generator
from .encoders import CaptionTokenizer, TokenCounter
from .session import TrainingSession


def check_latent_channels(model, channels: int):
    wanted = model.model.latent_format.latent_channels
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


def square_latent_shapes(model, resolution: int, dynamic: bool = False) -> tuple[tuple[int, ...], ...]:
    """Latent shapes (C, h, w) of square images of this size in pixels; dynamic: of every size from half of it on, in
    steps of 64."""
    shape = model.model.latent_format
    if shape.latent_dimensions not in (2, 3):
        raise ValueError(
            f"{type(model.model.model_config).__name__} does not generate images, and its latents have no height "
            "and width."
        )
    cells = lambda pixels: max(2, pixels // int(shape.spacial_downscale_ratio) // 2 * 2)
    sides = range(resolution // 2 // 64 * 64 or 64, resolution + 1, 64) if dynamic else (resolution,)
    return tuple((shape.latent_channels, cells(height), cells(width)) for height in sides for width in sides)


def random_latent(shape):
    return torch.randn((1, *shape), generator=make_generator(0))


def check_gradients(session: TrainingSession, x0, conds, tolerance=None):
    """Two tiny steps against finite differences, on adapters shaken off zero; they are put back. For families that no
    test covers.

    Raises RuntimeError when the model's gradients cannot be had or are wrong: training would run and learn nonsense."""
    denoiser, adapters = session.denoiser, session.adapters
    params = list(adapters.parameters())
    before = [p.detach().clone() for p in params]
    rng = make_generator(0)
    low_precision = denoiser.model.get_dtype_inference() in (torch.float16, torch.bfloat16)
    tolerance = tolerance or (0.2 if low_precision else 0.03)
    x0, conds = x0[:1], conds[:1]
    noise = torch.randn(x0.shape, generator=rng).to(x0)
    sigma = denoiser.sigma_at(torch.tensor([0.5])).to(x0)
    x = denoiser.noised(x0, noise, sigma)

    def loss():
        return (denoiser.denoise(x, sigma, conds) - x0).square().mean()

    try:
        with torch.no_grad():
            for p in params:
                p.add_(torch.randn(p.shape, generator=rng).to(p) * 0.02)
        autograd, direction = gradient_norm_and_direction(loss, params)
        errors = [abs(central_difference(loss, params, direction, step) / autograd - 1) for step in (3e-2, 1e-2, 3e-3)]
    except RuntimeError as error:
        raise RuntimeError(
            f"{format_failed_gradient_check(denoiser)}: its forward pass cannot be differentiated ({error}). It is not "
            "trained."
        ) from error
    finally:
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)
                p.grad = None
    if not min(errors) <= tolerance:
        raise RuntimeError(
            f"{format_failed_gradient_check(denoiser)}: its gradients are off by {min(errors):.0%} against finite "
            f"differences (at most {tolerance:.0%} is allowed). Training would go wrong, so it is refused."
        )
    return min(errors)


def format_failed_gradient_check(denoiser):
    return (
        f"Trainyard does not know {type(denoiser.model.model_config).__name__}, so its gradients were checked first, "
        "and the check failed"
    )


def gradient_norm_and_direction(loss, params):
    """(norm, unit direction) of the loss gradient over all params."""
    loss().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in params]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    if not math.isfinite(norm) or norm == 0:
        raise RuntimeError(f"the gradient norm is {norm}")
    return norm, [g / norm for g in grads]


@torch.no_grad()
def central_difference(loss, params, direction, step):
    """Central difference of the loss along a direction."""
    values = []
    for sign in (+1, -1):
        for p, d in zip(params, direction, strict=True):
            p.add_(d, alpha=sign * step)
        values.append(float(loss()))
        for p, d in zip(params, direction, strict=True):
            p.add_(d, alpha=-sign * step)
    return (values[0] - values[1]) / (2 * step)
