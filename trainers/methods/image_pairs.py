"""A difference learnt from images: image-pair sliders, and ADDifT, which learns what changed between before and
after."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..adapters.adapters import Adapters
from ..data.encoded import Batch, BucketBatchSampler, EncodedDataset
from ..data.pairs import ImagePair, collect_image_pairs
from ..diffusion import (
    Denoiser,
    NoiseLevelDensity,
    loss_weight,
    native_error,
    resolve_noise_density,
    sample_sigmas,
    sample_training_noise,
)
from ..memory.transfer import copy_like
from ..settings import NoiseSettings
from .rollouts import sample_element


@dataclass
class ImagePairTraining:
    """What both kinds share: pairs of encoded images, drawn with the same flip, noise and noise level on every
    side."""

    fingerprint_name: ClassVar[str]  # of the kind, in fingerprints of runs and of validation losses

    denoiser: Denoiser
    adapters: Adapters
    data: EncodedDataset
    noise: NoiseSettings = NoiseSettings()
    density: NoiseLevelDensity = NoiseLevelDensity()
    batch: int = 1
    deck: BucketBatchSampler = field(init=False)

    def __post_init__(self):
        self.items: list[ImagePair] = collect_image_pairs(self.data)
        self.deck = BucketBatchSampler(self, self.batch)
        self.density = resolve_noise_density(self.noise, self.density)
        self.forward_counts = {"frozen": 0, "student": 0}

    def parameters(self):
        return list(self.adapters.parameters())

    def state(self):
        return {"deck": self.deck.state(), "spent": dict(self.forward_counts)}

    def load_state(self, state):
        self.deck.load_state(state["deck"])
        self.forward_counts = dict(state["spent"])

    def sample_sides(self, pairs, rng) -> list[tuple[float, Batch]]:
        """[(strength, batch)]: the images at one randomly chosen size of strength, all drawn with the same noise."""
        size = sample_element(pairs[0].magnitudes, rng)
        seed = int(torch.randint(2**62, (1,), generator=rng))
        strengths = [strength for strength in pairs[0].strengths if abs(strength) == size]
        return [
            (
                s,
                self.data.make_batch(
                    [pair.index_by_strength[s] for pair in pairs], torch.Generator().manual_seed(seed)
                ),
            )
            for s in strengths
        ]

    def sample_step(self, rng):
        """(sides, x0 of each side, noise, sigma): noise and sigma are the same for every side."""
        sides = self.sample_sides([self.items[i] for i in self.deck.next_batch(rng)], rng)
        x0 = [self.denoiser.model_space(batch.x0) for _, batch in sides]
        sigma = sample_sigmas(self.denoiser, self.density, x0[0], rng, self.noise.min_time, self.noise.max_time)
        return sides, x0, sample_training_noise(x0[0], rng, self.noise), sigma

    def loss(self, rng):
        """(sides * B,)"""
        drawn = self.sample_step(rng)
        with self.adapters.dropout_active(rng):
            return self.side_losses(*drawn)

    def planned_forwards(self, updates: int) -> dict[str, float]:
        """Forwards that so many updates cost."""
        return {"student": 2.0 * self.batch * updates}

    def side_losses(self, sides, x0, noise, sigma):
        """(sides * B,) of what was drawn."""
        raise NotImplementedError

    def predict_student(self, x, sigma, batch, strength):
        self.forward_counts["student"] += len(x)
        with self.adapters.at_strength(strength):
            return self.denoiser.denoise(x, sigma, batch.conds)

    def weighted_error(self, x0_hat, goal, sigma, batch):
        mask = None if batch.mask is None else copy_like(batch.mask, goal)
        return loss_weight(self.denoiser, sigma, self.noise) * native_error(
            self.denoiser, x0_hat, goal, sigma, mask, self.noise
        )


class ImageSlider(ImagePairTraining):
    """The image of each side is what the adapter should draw at that side's strength (Gandikota et al. 2024, visual
    sliders)."""

    fingerprint_name = "ImageSlider"  # part of a run's fingerprint

    def side_losses(self, sides, x0, noise, sigma):
        return torch.cat([self.side_loss(clean, noise, sigma, *side) for clean, side in zip(x0, sides, strict=True)])

    def side_loss(self, x0, noise, sigma, strength, batch):
        answer = self.predict_student(self.denoiser.noised(x0, noise, sigma), sigma, batch, strength)
        return self.weighted_error(answer, x0, sigma, batch)


@dataclass
class AddiftTraining(ImagePairTraining):
    """ADDifT (hako-mikan 2025): with the same noise on both, the student on `after` at +m should err as the frozen
    model errs on `before`, and on `before` at -m as it errs on `after`. What the model always gets wrong cancels, and
    only the change is left to learn."""

    fingerprint_name = "Change"  # part of a run's fingerprint

    strength: float = 0.25

    def planned_forwards(self, updates):
        return {"frozen": 2.0 * self.batch * updates, **super().planned_forwards(updates)}

    def side_losses(self, sides, x0, noise, sigma):
        order = sorted(range(2), key=lambda i: sides[i][0])
        ((_, before), (_, after)), (b, a) = [sides[i] for i in order], [x0[i] for i in order]
        seen_b, seen_a = self.denoiser.noised(b, noise, sigma), self.denoiser.noised(a, noise, sigma)
        error_b, error_a = (
            self.predict_teacher(seen_b, sigma, before) - b,
            self.predict_teacher(seen_a, sigma, after) - a,
        )
        forth = self.weighted_error(
            self.predict_student(seen_a, sigma, after, self.strength), a + error_b, sigma, after
        )
        back = self.weighted_error(
            self.predict_student(seen_b, sigma, before, -self.strength), b + error_a, sigma, before
        )
        return torch.cat([forth, back])

    @torch.no_grad()
    def predict_teacher(self, x, sigma, batch):
        self.forward_counts["frozen"] += len(x)
        with self.adapters.at_strength(0):
            return self.denoiser.denoise(x, sigma, batch.conds)
