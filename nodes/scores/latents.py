"""What a score model needs of a MODEL and a VAE: noise schedule, latent format, and the latents of images."""

from __future__ import annotations

import math

import comfy.latent_formats
import torch

from ...trainers.data.buckets import BucketSettings
from ...trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from ...trainers.data.encode import encode_dataset
from ...trainers.scores.files import check_score_latent_format
from ...trainers.scores.networks import ScoreModelInfo
from .. import host, paths

DEFAULT_RESOLUTION = 512  # px, where a score model does not say at which size it was trained


class NoiseSchedule(host.denoiser.ComfyDenoiser):
    """A Denoiser that does everything but denoise: the weights are not loaded."""

    def __init__(self, model):
        self.patcher, self.model, self.device = model, model.model, model.load_device
        self.sigma_max = float(self.sampling.sigma_max)

    @property
    def sampling(self):
        return self.patcher.get_model_object("model_sampling")  # with what a ModelSampling node changed

    def denoise(self, x, sigma, conds):
        raise NotImplementedError("The model is not loaded.")


def latent_format_name(model) -> str:
    """ComfyUI's name of this MODEL's latent format."""
    return type(model.model.latent_format).__name__


def latent_scoring_inputs(model, vae) -> tuple:
    """(vae, latent format's name, channels) for an image score model that is to score latents too; () for one that is
    not. ValueError where only one of model and vae is connected."""
    if (model is None) != (vae is None):
        raise ValueError(
            "To score latents both model and vae are needed, and one of them is connected. Connect the other, or "
            "neither to score images."
        )
    return () if model is None else (vae, latent_format_name(model), model.model.latent_format.latent_channels)


def latent_to_model_space(latent: torch.Tensor, name: str) -> torch.Tensor:
    """Latents (B, C, ..., h, w) as a VAE gives them, in model space of the latent format of this name. ValueError for a
    format that ComfyUI does not have."""
    kind = getattr(comfy.latent_formats, name, None)
    if kind is None:
        raise ValueError(
            f"This score model reads latents of {name!r}, which this ComfyUI does not know. Update ComfyUI."
        )
    latent_format = kind()
    latent = latent.float()
    if latent.ndim == 4 and latent_format.latent_dimensions == 3:
        latent = latent.unsqueeze(2)  # an image is a video of one frame
    return latent_format.process_in(latent)


def encode_for_score_model(info: ScoreModelInfo, dataset, vae, report, resolution: int = 0) -> list[torch.Tensor]:
    """The latents (C, ..., h, w) of a dataset's images in the model space of this score model, without sampling noise.
    `resolution`: px, side of a square of about their area; 0: as the score model was trained. ValueError for a VAE of
    another latent format."""
    encoder = host.encoders.VaeEncoder(vae)
    check_score_latent_format(info, "", encoder.channels)
    step = math.lcm(8, 2 * encoder.factor)
    side = max(step, resolution or info.resolution or DEFAULT_RESOLUTION)
    try:
        with host.context.enable_gradients():
            encoded = encode_dataset(
                dataset,
                CaptionSettings(caption_mode=CAPTION_MODE_EMPTY),
                BucketSettings(resolution=side, step=step, merge=1),
                flip=False,
                vae=encoder,
                text=None,
                cache_dir=paths.cache_folder(),
                report=report,
                check_interrupt=host.progress.raise_if_interrupted,
            )
    finally:
        encoder.unload()
    means = [encoded.store.load(item.latent)["mean"] for item in encoded.items]
    return [latent_to_model_space(mean[None], info.latent_format)[0] for mean in means]
