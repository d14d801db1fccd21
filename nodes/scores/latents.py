"""The latents and the noise of a MODEL without its weights, which is all that a score model needs of it."""

from __future__ import annotations

import comfy.latent_formats
import torch

from .. import host


class NoiseSchedule(host.denoiser.ComfyDenoiser):
    """A Denoiser that does everything but denoise. Nothing is loaded."""

    def __init__(self, model):
        self.patcher, self.model, self.device = model, model.model, model.load_device

    @property
    def sampling(self):
        return self.patcher.get_model_object("model_sampling")  # with what a ModelSampling node changed

    def denoise(self, x, sigma, conds):
        raise NotImplementedError("The model is not loaded.")


def latent_format_name(model) -> str:
    """The host's name of the latents that this MODEL draws."""
    return type(model.model.latent_format).__name__


def latent_scoring_inputs(model, vae) -> tuple:
    """(vae, name of the latents, their channels) of an image score that is to score latents too; () of one that is not.
    ValueError for half of it."""
    if (model is None) != (vae is None):
        raise ValueError(
            "To score latents both model and vae are needed, and one of them is connected. Connect the other, or "
            "neither to score pictures."
        )
    return () if model is None else (vae, latent_format_name(model), model.model.latent_format.latent_channels)


def latent_to_model_space(latent: torch.Tensor, name: str) -> torch.Tensor:
    """A latent (B, C, ..., h, w) as a VAE gives it, scaled as models of this format see it. ValueError for a format of
    no known scale."""
    kind = getattr(comfy.latent_formats, name, None)
    if kind is None:
        raise ValueError(
            f"This score model judges latents of {name!r}, which this ComfyUI does not know. Update ComfyUI."
        )
    latent_format = kind()
    latent = latent.float()
    if latent.ndim == 4 and latent_format.latent_dimensions == 3:
        latent = latent.unsqueeze(2)  # a picture is a video of one frame
    return latent_format.process_in(latent)
