"""What something that is loaded already sees of a latent, as numbers for a score model to learn from.

`Looking` is a score model's trunk over a diffusion model's own states or over a decoded picture: only the two small
layers after them are its own, so its file is small and the loaded model stays as it was.
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
from ..diffusion import Denoiser, per_sample
from .networks import BACKBONES, ScorerEnsemble, batch_indices_by_shape, level_to_sigma

MODEL_FEATURES, DECODED_IMAGE = LOADED_BACKBONES = BACKBONES[2:]  # backbones that are made from something loaded
CACHED_NOISE_LEVELS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # of noise, at which frozen features are remembered
CACHED_NOISE_DRAWS = 3  # noises for each picture and level


# -- trunks over something loaded --------------------------------------------------------------------------------------


class FeatureNorm(nn.Module):
    """Each number of a row moved and scaled to mean 0 and variance 1, as the first batch of training has them; fixed
    from then on. What loaded models see differs little from picture to picture, and without this a head would learn the
    large numbers only."""

    LEAST = 4  # rows; fewer have no spread worth the name

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
        """What a file says stays."""
        super()._load_from_state_dict(*args)
        self.is_fitted = True


class LoadedModelTrunk(nn.Module):
    """A trunk (x, level) -> (B, size) over `look(x, level) -> (B, seen)`, which is no part of it: not saved, not
    trained, not moved.

    `adapters` of the loaded network are attached while it looks and at no other time; they are saved with the trunk."""

    def __init__(
        self, look: Callable[[Tensor, Tensor], Tensor], seen: int, width: int, adapters: Adapters | None = None
    ):
        super().__init__()
        self.look, self.size = look, 8 * width
        self.scale = FeatureNorm(seen)
        self.layers = nn.Sequential(nn.Linear(seen, self.size), nn.SiLU())
        self.adapters = adapters
        self.__dict__["others"] = None  # Adapters that hang on the same network and must not be looked through

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        with self.adapters_context():
            seen = self.look(x, level)
        return self.layers(self.scale(seen.to(self.layers[0].weight)))

    def adapters_context(self):
        """The loaded network as this trunk learnt to look through it."""
        if self.others is not None:
            return self.others.replaced_by(self.adapters)
        return contextlib.nullcontext() if self.adapters is None else self.adapters.attached()


@contextlib.contextmanager
def bypass_adapters(model: ScorerEnsemble, adapters: Adapters):
    """While adapters are trained on the very network that a score model looks through, it looks at the network as it
    was."""
    trunks = [
        network.trunk for network in model.networks if isinstance(getattr(network, "trunk", None), LoadedModelTrunk)
    ]
    before = [trunk.others for trunk in trunks]
    try:
        for trunk in trunks:
            trunk.__dict__["others"] = adapters  # lent, not owned: it must not become a part of the trunk
        yield model
    finally:
        for trunk, other in zip(trunks, before, strict=True):
            trunk.__dict__["others"] = other


def from_scorer_input(denoiser: Denoiser, x: Tensor, level: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x, sigma) in the model's own scale: the inverse of `unit_view`. Levels below the floor are told to the model as
    the floor, because it never saw less noise."""
    sigma = level_to_sigma(denoiser, level)
    one, zero = torch.ones(len(x), 1, device=x.device), torch.zeros(len(x), 1, device=x.device)
    a, b = denoiser.noised(one, zero, sigma).flatten(), denoiser.noised(zero, one, sigma).flatten()
    return x * per_sample((a.square() + b.square()).sqrt(), x), level_to_sigma(denoiser, level.clamp(min=floor))


def pool_hidden_states(state: Tensor) -> Tensor:
    """(B, C, h, w), (B, C, t, h, w) or tokens (B, T, C) -> (B, 3 C): mean, maximum and spread over the places, each of
    mean 0 and variance 1 over C, because stages differ in size by magnitudes. The mean alone tells colours and little
    of shapes."""
    places = (state.transpose(1, 2) if state.ndim == 3 else state.flatten(2)).float()
    parts = places.mean(2), places.amax(2), places.std(2, correction=0)
    return torch.cat([F.layer_norm(part, part.shape[1:]) for part in parts], 1)


# -- frozen features are computed once ---------------------------------------------------------------------------------


class FrozenFeatureCache:
    """A look whose answers are kept, by what it is shown. For frozen models only. Each picture is looked at by itself:
    in a batch the last digits would depend on its company, and a training that goes on after a stop would be another
    one. A model of real size hardly minds."""

    def __init__(self, look):
        self.look, self.known = look, {}

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return self.look(x, level)
        keys = [feature_cache_key(row, at) for row, at in zip(x, level, strict=True)]
        with torch.no_grad():
            for i, key in enumerate(keys):
                if key not in self.known:
                    self.known[key] = self.look(x[i : i + 1], level[i : i + 1])[0].half().cpu()
        return torch.stack([self.known[key] for key in keys]).to(x.device, torch.float32)


def feature_cache_key(row: Tensor, level: Tensor) -> bytes:
    return hashlib.blake2b(
        row.detach().float().cpu().contiguous().numpy().tobytes() + f"{float(level):.6f}".encode(), digest_size=16
    ).digest()


class FixedNoiseDenoiser:
    """The same denoiser with a grid of levels and a few noises, so that what a frozen model says of a picture comes up
    again."""

    def __init__(
        self, denoiser: Denoiser, levels: Sequence[float] = CACHED_NOISE_LEVELS, draws: int = CACHED_NOISE_DRAWS
    ):
        self.denoiser, self.levels, self.draws = denoiser, torch.tensor(levels), draws

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def sigma_at(self, u: Tensor) -> Tensor:
        """The sigma of the grid's level that is nearest to the share u of the schedule."""
        level = self.levels[(u[:, None].cpu() - self.levels).abs().argmin(1)]
        return level_to_sigma(self.denoiser, level).to(u.device)

    def noised(self, x0, noise, sigma):
        return self.denoiser.noised(
            x0, torch.stack([self.one_of(n) for n in noise]) if noise.ndim > 2 else noise, sigma
        )

    def one_of(self, noise: Tensor) -> Tensor:
        """One of the few, by what chance drew."""
        which = int(float(noise.flatten()[0].abs()) * 1e4) % self.draws
        return torch.randn(noise.shape, generator=torch.Generator().manual_seed(which)).to(noise)


def cache_frozen_features(data: EncodedDataset, denoiser: Denoiser, trunk: Callable):
    """(data, denoiser, trunk) for training on frozen features: each picture is looked at once per level and noise
    instead of at every step. All members share what is remembered. The VAE's spread is left out: it would make every
    look a new one."""
    keys = [key for item in data.items for key in (item.latent, item.flipped) if key]
    means = MemoryStore({key: {**data.store.load(key), "std": None} for key in keys})
    shared: list[FrozenFeatureCache] = []

    def make(about):
        made = trunk(about)
        if isinstance(made, LoadedModelTrunk) and made.adapters is None:
            shared.append(shared[0] if shared else FrozenFeatureCache(made.look))
            made.look = shared[0]
        return made

    return replace(data, store=means, dropout=0.0), FixedNoiseDenoiser(denoiser), make


@torch.no_grad()
def extract_trunk_features(
    model: ScorerEnsemble, latents: Sequence[torch.Tensor], device="cpu", report=None, check_interrupt=lambda: None
) -> np.ndarray:
    """(n, d) what the trunk of a score model's first network sees of clean latents (C, ..., h, w) in model space."""
    trunk, rows = model.networks[0].trunk, {}
    try:
        trunk.to(device)
        for part in batch_indices_by_shape([tuple(x.shape) for x in latents]):
            check_interrupt()
            x = torch.stack([latents[i] for i in part]).to(device, torch.float32)
            rows |= zip(part, trunk(x, torch.zeros(len(x), device=device)).float().cpu().numpy(), strict=True)
            if report:
                report(len(rows), len(latents), "looked at")
    finally:
        trunk.to("cpu")
    return np.stack([rows[i] for i in range(len(latents))])
