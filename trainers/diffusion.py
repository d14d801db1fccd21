"""The arithmetic of noise that every method shares, in one convention.

x = noised(x0, noise, sigma); a model answers denoise(x, sigma, conds) -> x0; slope = (x - x0) / sigma is the noise of
eps models and the velocity of flow models (Karras et al. 2022, eq. 4), so one loss serves both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory.transfer import copy_like, copy_to_device
from .protocols import Denoiser
from .settings import MSE, SCHEDULED_HUBER, NoiseSettings

DEFAULT_NOISE_SETTINGS = NoiseSettings()


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), to multiply with x."""
    return value.view(-1, *[1] * (x.ndim - 1))


def slope(x, sigma, x0):
    """The noise for eps models, the velocity for flow models."""
    return (x - x0) / per_sample(sigma, x)


def per_sample_mse(a, b, mask=None):
    """(B, ...) -> (B,). With a mask (B, 1, ...) the mean is taken over what the mask lets through."""
    return masked_mean((a.float() - b.float()).square(), mask)


def masked_mean(error, mask=None):
    """(B, ...) -> (B,), over what the mask lets through."""
    if mask is None:
        return error.flatten(1).mean(1)
    mask = copy_like(mask, error).expand_as(error)
    return (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-6)


def cpu_randn_like(x, rng):
    """Normal noise drawn on the CPU from rng, so that every device sees the same numbers."""
    return copy_to_device(torch.randn(x.shape, generator=rng), x.device)


def sample_training_noise(x0, rng, settings: NoiseSettings):
    """The noise of one step. With an offset (Guttenberg 2023) each channel is moved as a whole; multi-resolution noise
    (Whitaker 2023) adds coarser and coarser noises and is brought back to the spread of normal noise."""
    noise = cpu_randn_like(x0, rng)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * cpu_randn_like(x0.new_empty(*x0.shape[:2], *[1] * (x0.ndim - 2)), rng)
    if settings.pyramid_levels:
        noise = add_pyramid_noise(noise, rng, settings.pyramid_levels, settings.pyramid_discount)
    return noise


def add_pyramid_noise(noise, rng, levels: int, discount: float):
    """Noise (B, C, ..., H, W) and `levels` noises of 1/r, 1/r^2, ... of its size, r drawn from 2 to 4, each `discount`
    of the one before."""
    height, width = noise.shape[-2:]
    total, shrink = noise, 1.0
    for level in range(1, levels + 1):
        shrink *= 2 + 2 * float(torch.rand(1, generator=rng))
        size = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = copy_like(torch.randn(noise.shape[:-2].numel(), 1, *size, generator=rng), noise)
        total = total + discount**level * F.interpolate(coarse, (height, width), mode="bilinear").view_as(noise)
        if size == (1, 1):
            break
    return total / per_sample(total.flatten(1).std(1), total)


def noising_coefficients(denoiser: Denoiser, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), each (B,), of x = a * x0 + b * noise, read off the denoiser's own mixing."""
    one, zero = torch.ones_like(sigma)[:, None], torch.zeros_like(sigma)[:, None]
    return denoiser.noised(one, zero, sigma).flatten(), denoiser.noised(zero, one, sigma).flatten()


def snr(denoiser, sigma):
    """(B,) signal-to-noise ratio: 1/sigma^2 for eps and v, ((1-s)/s)^2 for flow."""
    signal, noise = noising_coefficients(denoiser, sigma)
    return (signal / noise).square()


# -- where to train: densities over t in (0, 1) ------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenShift:
    """The shift exp(mu) with mu linear in the latent's tokens, through two points (tokens, mu). The values are those
    Flux was trained with (Black Forest Labs)."""

    patch: int = 2  # latent cells per token, along height and along width
    low: tuple[int, float] = (256, 0.5)
    high: tuple[int, float] = (4096, 1.15)
    max_mu: float = math.inf
    frames: bool = False  # count the tokens of every frame
    logarithmic: bool = False  # mu is linear in the logarithm of the tokens: the shift is a power of them

    def count_tokens(self, x0) -> int:
        """Tokens of latents (B, C, ..., H, W)."""
        height, width = (side // self.patch for side in x0.shape[-2:])
        return height * width * (math.prod(x0.shape[2:-2]) if self.frames else 1)

    def shift_at(self, tokens: int) -> float:
        (first, low), (last, high) = self.low, self.high
        scale = math.log if self.logarithmic else float
        way = (scale(tokens) - scale(first)) / (scale(last) - scale(first))
        return math.exp(min(low + (high - low) * way, self.max_mu))


@dataclass(frozen=True)
class NoiseLevelDensity:
    """How often each noise level is drawn. `shift` moves flow levels up; 'resolution' derives it from the latent's
    size by `tokens`; 'model' is the shift that the host samples the loaded model with, put in by the host's side."""

    kind: str = "uniform"  # uniform | logit-normal | host schedule
    mean: float = 0.0
    std: float = 1.0
    shift: float | str = 1.0
    tokens: TokenShift = TokenShift()

    def fingerprint(self) -> list:
        """JSON-able values that change with what is drawn."""
        values = [self.kind, self.mean, self.std, self.shift]
        return values if self.tokens == TokenShift() else [*values, str(self.tokens)]


def resolve_noise_density(settings: NoiseSettings, default: NoiseLevelDensity) -> NoiseLevelDensity:
    """The density the settings ask for, with the family's default where they leave it open."""
    if settings.density == "model default":
        return replace(default, shift=settings.shift or default.shift)
    return replace(
        default, kind=settings.density, mean=settings.mean, std=settings.std, shift=settings.shift or default.shift
    )


def shift_for_latents(density: NoiseLevelDensity, x0) -> float:
    """The factor by which the noise levels of these latents (B, C, ..., H, W) are shifted."""
    if density.shift == "resolution":
        return density.tokens.shift_at(density.tokens.count_tokens(x0))
    return float(density.shift)


def density_quantile(density: NoiseLevelDensity, q: Tensor) -> Tensor:
    """Time t for quantile q; both in (0, 1)."""
    return q if density.kind != "logit-normal" else torch.sigmoid(density.mean + density.std * torch.special.ndtri(q))


def density_cdf(density: NoiseLevelDensity, t: float) -> float:
    """The share of draws below t: the inverse of `density_quantile`, finite at 0 and 1."""
    if density.kind != "logit-normal" or t in (0.0, 1.0):
        return t
    return float(torch.special.ndtr((torch.logit(torch.tensor(t, dtype=torch.float64)) - density.mean) / density.std))


def shift_noise_level(t, shift: float):
    """Noise levels moved up for shift > 1 (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_noise_level(t, shift: float):
    return t / (shift - (shift - 1) * t)


def sum_tensors(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum, added from left to right; at least one is given."""
    return functools.reduce(torch.add, tensors)


def sigmas_at_levels(denoiser: Denoiser, levels: Tensor) -> Tensor:
    """The model's own noise levels for levels in [0, 1] (0 clean, 1 noise) of any shape, in that shape."""
    return denoiser.sigma_at(levels.flatten()).view(levels.shape)


def sample_sigmas(denoiser: Denoiser, density: NoiseLevelDensity, x0: Tensor, rng, low=0.0, high=1.0) -> Tensor:
    """(B,) noise levels, each between the levels `low` and `high` (0 clean, 1 noise), by exact truncation of the
    density."""
    return sigmas_at_quantiles(
        denoiser, density, x0, torch.rand(len(x0), generator=rng, dtype=torch.float64), low, high
    )


def stratified_sigmas(
    denoiser: Denoiser, density: NoiseLevelDensity, x0: Tensor, count: int, low=0.0, high=1.0
) -> Tensor:
    """(count,) noise levels at the middles of `count` equal shares of what sample_sigmas draws, from clean to noisy."""
    return sigmas_at_quantiles(
        denoiser, density, x0, (torch.arange(count, dtype=torch.float64) + 0.5) / count, low, high
    )


def sigmas_at_quantiles(
    denoiser: Denoiser, density: NoiseLevelDensity, x0: Tensor, share: Tensor, low=0.0, high=1.0
) -> Tensor:
    """(N,) the noise levels below which these shares (N,) of the density between `low` and `high` lie."""
    scheduled = not denoiser.flow or density.kind == "host schedule"
    shift = 1.0 if scheduled else shift_for_latents(density, x0)
    ends = [unshift_noise_level(level, shift) for level in (low, high)]
    first, last = (density_cdf(density, t) for t in ends)
    q = share * (last - first) + first
    t = density_quantile(density, q.clamp(1e-6, 1 - 1e-6)).clamp(
        *ends
    )  # in a far tail first and last are the same number
    sigma = denoiser.sigma_at(t) if scheduled else shift_noise_level(t, shift).clamp(min=1e-4)
    return copy_to_device(sigma, x0.device, torch.float32)


# -- how wrong ---------------------------------------------------------------------------------------------------------


def loss_weight(denoiser: Denoiser, sigma: Tensor, settings: NoiseSettings) -> Tensor:
    """(B,) weight of the native loss. Each weighting is one weight of the x0 error, times native_scale^2 to be one of
    the network's own
    target: min-SNR gives min(SNR, g)/SNR for eps and min(SNR, g)/(SNR + 1) for v. A published weight of the eps error
    is multiplied by the SNR first, so that eps, v and flow models of one noise level are weighed alike."""
    if settings.weighting == "none":
        return torch.ones_like(sigma)
    return (
        LOSS_WEIGHT_FUNCTIONS[settings.weighting](snr(denoiser, sigma), settings)
        * denoiser.native_scale(sigma).square()
    )


LOSS_WEIGHT_FUNCTIONS = {  # (SNR, settings) -> weight of the x0 error
    "min-SNR": lambda snr, s: snr.clamp(max=s.gamma),  # Hang et al. 2023
    "soft-min-SNR": lambda snr, s: (
        snr * s.gamma / (snr + s.gamma)
    ),  # Crowson (k-diffusion), whose sigma_data^2 is 1 / gamma
    "debiased": lambda snr, s: snr.clamp(max=1e6).sqrt(),  # Yu et al. 2023: 1 / sqrt(SNR) of the eps error
    "P2": lambda snr, s: snr / (1 + snr) ** s.p2_gamma,  # Choi et al. 2022: (1 + SNR)^-gamma of the eps error
}


def native_error(denoiser, x0_hat, x0, sigma, mask=None, settings: NoiseSettings = DEFAULT_NOISE_SETTINGS):
    """(B,) mean error of the network's own target, the noise, v or the velocity, in the measure of the settings."""
    scale = denoiser.native_scale(sigma)
    if settings.loss == MSE:
        return per_sample_mse(x0_hat, x0, mask) / scale.square()
    error, c = (
        (x0_hat.float() - x0.float()) / per_sample(scale, x0),
        per_sample(huber_width(denoiser, sigma, settings), x0),
    )
    return masked_mean(2 * c * ((error.square() + c.square()).sqrt() - c), mask)


def huber_width(denoiser, sigma, settings):
    """(B,) where the pseudo-Huber loss turns from a square into a line. Scheduled (Khrapov et al. 2024, the "snr"
    schedule of kohya-ss sd-scripts): (1 - c) / (1 + s)^2 + c with s = 1 / sqrt(SNR), 1 on the clean side and c on the
    noisy one."""
    width = torch.full_like(sigma, settings.huber_c)
    if settings.loss == SCHEDULED_HUBER:
        width = width + (1 - width) / (1 + snr(denoiser, sigma).rsqrt()).square()
    return width


def denoising_loss(
    denoiser,
    x0,
    noise,
    sigma,
    conds,
    mask=None,
    settings: NoiseSettings = DEFAULT_NOISE_SETTINGS,
    extra=None,
    retarget=None,
):
    """(B,) native loss of one prediction. `extra`: noise that the model is shown beyond that of its target (input
    perturbation, Ning et al. 2023): the network's target stays that of `noise`, and with it x0 moves by c_skip =
    (native_scale / sigma)^2 of what is added. `retarget(x, x0)`: another x0 in the place of the image's own."""
    x = plain = denoiser.noised(x0, noise, sigma)
    if extra is not None:
        x = denoiser.noised(x0, noise + extra, sigma)
        x0 = x0 + per_sample((denoiser.native_scale(sigma) / sigma).square(), x0) * (x - plain)
    if retarget is not None:
        x0 = retarget(x, x0)
    return native_error(denoiser, denoiser.denoise(x, sigma, conds), x0, sigma, mask, settings)


def denoise_with_guidance(denoiser, x, sigma, cond, away, guidance: float):
    """x0 under classifier-free guidance (Ho and Salimans 2022): away + guidance * (cond - away), both in one call; one
    half of it at guidance 1. `cond` and `away` are single conditionings for the whole batch."""
    n = len(x)
    if guidance == 1:
        return denoiser.denoise(x, sigma, [cond] * n)
    toward, off = denoiser.denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), [cond] * n + [away] * n).chunk(2)
    return off + guidance * (toward - off)


def rollout(denoiser, noise, sigmas, cond, away, guidance: float):
    """Every (x, sigma) that Euler steps pass from pure noise on, the first included; sigmas (S, B) fall along S."""
    x = denoiser.noised(torch.zeros_like(noise), noise, sigmas[0])
    for number, here in enumerate(sigmas):
        yield x, here
        if number + 1 < len(sigmas):
            x0 = denoise_with_guidance(denoiser, x, here, cond, away, guidance)
            x = x + slope(x, here, x0) * per_sample(sigmas[number + 1] - here, x)


@torch.no_grad()
def sample_euler(denoiser, noise, conds, sigmas):
    """x at sigmas[-1], by Euler steps from pure noise at sigmas[0]."""
    x = denoiser.noised(torch.zeros_like(noise), noise, sigmas[0].expand(len(noise)))
    for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
        sigma = here.expand(len(x))
        x = x + slope(x, sigma, denoiser.denoise(x, sigma, conds)) * (there - here)
    return x
