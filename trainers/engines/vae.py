"""Images to latents and back, through diffusers' autoencoders. Latents are unscaled, as ComfyUI's LATENT is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .text import hash_module_weights, module_on_device


@dataclass
class DiffusersVae:
    """`scale` and `shift` map an unscaled latent to the model's space: (latent - shift) * scale (the family's latent
    format).

    A tiny autoencoder (TAESD) speaks model space itself, so its latents are unscaled here, the way ComfyUI does it."""

    model: Any  # an AutoencoderKL or AutoencoderTiny: diffusers says of neither what its answers hold
    scale: float
    shift: float = 0.0
    tiny: bool = False
    device: torch.device = torch.device("cpu")
    _identity: str = field(default="", init=False)

    @property
    def identity(self) -> str:
        if not self._identity:
            self._identity = hash_module_weights(self.model, extra=(self.scale, self.shift, self.tiny))
        return self._identity

    @property
    def channels(self) -> int:
        return self.model.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent cell."""
        widths = getattr(self.model.config, "encoder_block_out_channels", None) or self.model.config.block_out_channels
        return 2 ** (len(widths) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, 3) in 0..1 -> mean and standard deviation (B, C, h, w), or None where the autoencoder has no
        spread."""
        with module_on_device(self.model, self.device):
            x = images.movedim(-1, 1).to(self.device, self.model.dtype) * 2 - 1
            if self.tiny:
                return (self.model.encode(x).latents.float() / self.scale + self.shift).cpu(), None
            spread = self.model.encode(x).latent_dist
            return spread.mean.float().cpu(), spread.std.float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H, W, 3) in 0..1."""
        with module_on_device(self.model, self.device):
            z = (latents - self.shift) * self.scale if self.tiny else latents
            images = self.model.decode(z.to(self.device, self.model.dtype)).sample
            return (images.float() * 0.5 + 0.5).clamp(0, 1).movedim(1, -1).cpu()
