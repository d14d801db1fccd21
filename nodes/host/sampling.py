"""Latents drawn by the host's ordinary sampler."""

from __future__ import annotations

import comfy.lora
import comfy.sample
import comfy.samplers
import torch

from ...trainers.rng import make_generator

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


def sample_latents(model, positive, negative, shape, seeds, *, steps, guidance, sampler, scheduler):
    """LATENT samples (B, C, ...) by the ordinary sampler, one per seed, for latents of shape (C, h, w). The seed alone
    decides an image's noise, whatever else is in its batch."""
    noise = torch.cat([torch.randn((1, *shape), generator=make_generator(seed)) for seed in seeds])
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(noise))
    noise = noise.reshape(latent.shape)
    return comfy.sample.sample(
        model, noise, steps, guidance, sampler, scheduler, positive, negative, latent, disable_pbar=True, seed=seeds[0]
    )
