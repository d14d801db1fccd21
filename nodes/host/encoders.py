"""A loaded CLIP and a loaded VAE as the encoders of trainers.data."""

from __future__ import annotations

import comfy.model_management as mm
import torch

from .context import enable_gradients
from .identity import hash_patched_weights


def encode_caption(clip, caption: str) -> dict:
    """One caption as the host's own encode node gives it."""
    ((tensor, extras),) = clip.encode_from_tokens_scheduled(clip.tokenize(caption), show_pbar=False)
    return {"cross_attn": tensor, **extras}


def check_clip(clip):
    if clip is None:
        raise ValueError(
            "CLIP is empty: this checkpoint holds no text encoder. Load one with a CLIP loader node (CLIPLoader, "
            "DualCLIPLoader) and connect it."
        )


def encode_prompts_once(clip, prompts) -> dict[str, dict]:
    """{prompt: conditioning}, which autograd may use; the text encoder leaves the device afterwards."""
    encoder = TextEncoder(clip)
    try:
        with enable_gradients():
            return dict(zip(prompts, encoder.encode(list(prompts)), strict=True))
    finally:
        encoder.unload()


class TextEncoder:
    """trainers.data's text door over a loaded CLIP."""

    def __init__(self, clip):
        check_clip(clip)
        self.clip = clip
        self.identity = hash_patched_weights(clip.patcher, clip.layer_idx)

    def encode(self, captions: list[str]) -> list[dict]:
        with torch.no_grad():
            return [encode_caption(self.clip, c) for c in captions]

    def unload(self):
        mm.unload_model_and_clones(self.clip.patcher)


class VaeEncoder:
    """trainers.data's VAE door over a loaded VAE."""

    def __init__(self, vae):
        if vae is None:
            raise ValueError(
                "VAE is empty: this checkpoint holds no VAE. Load one with the Load VAE node and connect it."
            )
        self.vae = vae
        self.identity = hash_patched_weights(vae.patcher)
        self.channels = vae.latent_channels
        self.factor = int(vae.spacial_compression_encode())

    def encode(self, images):
        """(mean, std or None), unscaled; images (B, H, W, 3) in 0..1. A VAE with a Gaussian posterior shows its
        moments."""
        moments = []
        regulariser = getattr(self.vae.first_stage_model, "regularization", None)
        hook = regulariser and regulariser.register_forward_pre_hook(lambda _, args: moments.append(args[0].detach()))
        try:
            with torch.no_grad():
                latent = self.vae.encode(images)
        finally:
            if hook:
                hook.remove()
        return posterior_mean_std(latent, moments)

    def unload(self):
        mm.unload_model_and_clones(self.vae.patcher)


def posterior_mean_std(latent, moments):
    """(mean, std) from the encoder's raw moments, when they describe this very latent; (latent, None) otherwise."""
    z = torch.cat(moments).to(latent) if moments else None
    if (
        z is None
        or z.shape[0] != latent.shape[0]
        or z.shape[1] != 2 * latent.shape[1]
        or z.shape[2:] != latent.shape[2:]
    ):
        return latent, None
    mean, log_variance = z.chunk(2, dim=1)
    return mean, (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
