"""Score model backbones on loaded models: features of a diffusion model, or of the decoded image in a CLIP vision
model.

`LoadedModelTrunk` is a score model's trunk on such features. Only its normalisation, one linear layer and optional LoRA
adapters are its own, so its file is small and the loaded model stays as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapters import Adapters
from ..data.cache import MemoryStore
from ..data.encoded import EncodedDataset
from ..diffusion import Denoiser, noising_coefficients, per_sample
from .networks import Scorer, ScorerEnsemble, batch_indices_by_shape, level_to_sigma

CACHED_NOISE_LEVELS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # at which frozen features are cached
CACHED_NOISE_DRAWS = 3  # fixed noises for each latent shape


# -- trunks on loaded models -------------------------------------------------------------------------------------------


class FeatureNorm(nn.Module):
    """Standardises each feature to mean 0 and variance 1 by the statistics of the first training batch; fixed from then
    on. The features of loaded models differ little from image to image, and without this a head would learn from the
    largest of them only."""

    LEAST = 4  # rows; the spread of fewer means nothing
    middle: Tensor
    spread: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("middle", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.is_fitted = False

    def forward(self, rows: Tensor) -> Tensor:
        if not self.is_fitted and self.training and torch.is_grad_enabled() and len(rows) >= self.LEAST:
            self.fit_statistics(rows.detach())
        return (rows - self.middle) / self.spread

    def fit_statistics(self, rows: Tensor):
        self.middle.copy_(rows.mean(0))
        self.spread.copy_((rows.std(0) + 1e-3 * rows.std()).clamp(min=1e-4))
        self.is_fitted = True

    def _load_from_state_dict(self, *args):
        """Statistics that were loaded stay."""
        super()._load_from_state_dict(*args)
        self.is_fitted = True


class LoadedModelTrunk(nn.Module):
    """A trunk (x, level) -> (B, size) on the features `extract(x, level) -> (B, features)` of a loaded model, which is
    no part of it: not saved, not trained, not moved.

    `adapters` of the loaded network are attached while features are extracted and at no other time; they are saved with
    the trunk."""

    excluded_adapters: Adapters | None

    def __init__(
        self, extract: Callable[[Tensor, Tensor], Tensor], features: int, width: int, adapters: Adapters | None = None
    ):
        super().__init__()
        self.extract, self.size = extract, 8 * width
        self.scale = FeatureNorm(features)
        self.layers = nn.Sequential(nn.Linear(features, self.size), nn.SiLU())
        self.adapters = adapters
        self.exclude_adapters(None)

    def exclude_adapters(self, adapters: Adapters | None) -> None:
        """Bypass adapters that are trained on the same loaded network. They are lent: set past nn.Module, so that they
        do not become a part of this trunk and its state_dict."""
        object.__setattr__(self, "excluded_adapters", adapters)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        with self.adapters_context():
            features = self.extract(x, level)
        weight = next(self.layers.parameters())
        return self.layers(self.scale(features.to(weight.device, weight.dtype)))

    def adapters_context(self):
        """The loaded network with this trunk's adapters, and without the excluded ones."""
        if self.excluded_adapters is not None:
            return self.excluded_adapters.replaced_by(self.adapters)
        return contextlib.nullcontext() if self.adapters is None else self.adapters.attached()


@contextlib.contextmanager
def bypass_adapters(model: ScorerEnsemble, adapters: Adapters):
    """While `adapters` are trained on the network that a score model takes its features from, the score model sees that
    network without them."""
    trunks = [
        trunk for network in model.networks if isinstance(trunk := getattr(network, "trunk", None), LoadedModelTrunk)
    ]
    before = [trunk.excluded_adapters for trunk in trunks]
    try:
        for trunk in trunks:
            trunk.exclude_adapters(adapters)
        yield model
    finally:
        for trunk, previous in zip(trunks, before, strict=True):
            trunk.exclude_adapters(previous)


def from_scorer_input(denoiser: Denoiser, x: Tensor, level: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x, sigma) in the model's own scale: the inverse of `to_scorer_input`. For levels below `floor` the sigma is that
    of the floor, because the model's features say little at less noise."""
    a, b = noising_coefficients(denoiser, level_to_sigma(denoiser, level))
    return x * per_sample((a.square() + b.square()).sqrt(), x), level_to_sigma(denoiser, level.clamp(min=floor))


def pool_hidden_states(state: Tensor) -> Tensor:
    """(B, C, h, w), (B, C, t, h, w) or tokens (B, T, C) -> (B, 3 C): mean, maximum and standard deviation over the
    positions, each layer-normed over C, because stages differ in scale by orders of magnitude. The mean alone tells
    colours and little of shapes."""
    positions = (state.transpose(1, 2) if state.ndim == 3 else state.flatten(2)).float()
    parts = positions.mean(2), positions.amax(2), positions.std(2, correction=0)
    return torch.cat([F.layer_norm(part, part.shape[1:]) for part in parts], 1)


# -- frozen features are computed once ---------------------------------------------------------------------------------


class FrozenFeatureCache:
    """An `extract` of a frozen model whose features are cached by its input. Each image is passed by itself: in a batch
    the last digits would depend on the rest of the batch, and a resumed training would differ. A model of real size is
    hardly slower for it."""

    def __init__(self, extract: Callable[[Tensor, Tensor], Tensor]):
        self.extract = extract
        self.cached: dict[bytes, Tensor] = {}

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return self.extract(x, level)
        keys = [feature_cache_key(row, at) for row, at in zip(x, level, strict=True)]
        with torch.no_grad():
            for i, key in enumerate(keys):
                if key not in self.cached:
                    self.cached[key] = self.extract(x[i : i + 1], level[i : i + 1])[0].half().cpu()
        return torch.stack([self.cached[key] for key in keys]).to(x.device, torch.float32)


def feature_cache_key(row: Tensor, level: Tensor) -> bytes:
    """A hash of one latent and its noise level."""
    return hashlib.blake2b(
        row.detach().float().cpu().contiguous().numpy().tobytes() + f"{float(level):.6f}".encode(), digest_size=16
    ).digest()


class FixedNoiseDenoiser:
    """A denoiser with a grid of noise levels and a few fixed noises, so that the inputs of a frozen model recur and its
    cached features are used again."""

    def __init__(
        self, denoiser: Denoiser, levels: Sequence[float] = CACHED_NOISE_LEVELS, draws: int = CACHED_NOISE_DRAWS
    ):
        self.denoiser, self.levels, self.draws = denoiser, torch.tensor(levels), draws

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def sigma_at(self, u: Tensor) -> Tensor:
        """The sigma of the grid level nearest to u, the share of the schedule."""
        level = self.levels[(u[:, None].cpu() - self.levels).abs().argmin(1)]
        return level_to_sigma(self.denoiser, level).to(u.device)

    def noised(self, x0, noise, sigma):
        return self.denoiser.noised(
            x0, torch.stack([self.pick_fixed_noise(n) for n in noise]) if noise.ndim > 2 else noise, sigma
        )

    def pick_fixed_noise(self, noise: Tensor) -> Tensor:
        """One of the fixed noises, chosen by the random noise that was drawn."""
        which = int(float(noise.flatten()[0].abs()) * 1e4) % self.draws
        return torch.randn(noise.shape, generator=torch.Generator().manual_seed(which)).to(noise)


def cache_frozen_features(data: EncodedDataset, denoiser: Denoiser, trunk: Callable):
    """(data, denoiser, trunk) for training on frozen features: each image passes the loaded model once per noise level
    and fixed noise instead of at every step. All members share the cache. The VAE's std is dropped: a sampled latent
    would be a new input every time."""
    keys = [key for item in data.items for key in (item.latent, item.flipped) if key]
    means = MemoryStore({key: {**data.store.load(key), "std": None} for key in keys})
    shared: list[FrozenFeatureCache] = []

    def make_cached_trunk(info):
        made = trunk(info)
        if isinstance(made, LoadedModelTrunk) and made.adapters is None:
            shared.append(shared[0] if shared else FrozenFeatureCache(made.extract))
            made.extract = shared[0]
        return made

    return replace(data, store=means, dropout=0.0), FixedNoiseDenoiser(denoiser), make_cached_trunk


@torch.no_grad()
def extract_trunk_features(
    model: ScorerEnsemble, latents: Sequence[torch.Tensor], device="cpu", report=None, check_interrupt=lambda: None
) -> np.ndarray:
    """(n, d) features of clean latents (C, ..., h, w) in model space, by the trunk of a score model's first network."""
    network = model.networks[0]
    assert isinstance(network, Scorer)  # the caller refuses models without a trunk
    trunk, rows = network.trunk, {}
    try:
        trunk.to(device)
        for batch in batch_indices_by_shape([tuple(x.shape) for x in latents]):
            check_interrupt()
            x = torch.stack([latents[i] for i in batch]).to(device, torch.float32)
            rows |= zip(batch, trunk(x, torch.zeros(len(x), device=device)).float().cpu().numpy(), strict=True)
            if report:
                report(len(rows), len(latents), "looked at")
    finally:
        trunk.to("cpu")
    return np.stack([rows[i] for i in range(len(latents))])
