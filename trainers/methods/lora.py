"""A LoRA learns to denoise pictures under their captions: the plain denoising loss on adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..adapters.adapters import Adapters
from ..data.encoded import Batch, Deck, Encoded
from ..diffusion import Denoiser, Density, denoising_loss, density_for, loss_weight, noise_like, randn_like, random_sigma
from ..settings import NoiseSettings
from .prior import Kept, Prior


@dataclass
class Lora:
    """`encode` turns captions into conditionings with gradients, when the text encoder is trained too. `prior`: what must not be forgotten."""

    denoiser: Denoiser
    adapters: Adapters
    data: Encoded
    noise: NoiseSettings = NoiseSettings()
    density: Density = Density()  # the family's own, used where the settings leave it open
    batch: int = 1
    text_adapters: Adapters | None = None
    encode: object = None  # (captions) -> conds
    prior: Prior | None = None
    deck: Deck = field(init=False)

    def __post_init__(self):
        self.deck = Deck(self.data, self.batch)
        self.density = density_for(self.noise, self.density)
        self.kept = None if self.prior is None else Kept(self.prior, self.batch)

    def groups(self):
        named = {"model": list(self.adapters.parameters())}
        return named if self.text_adapters is None else {**named, "text encoder": list(self.text_adapters.parameters())}

    def parameters(self):
        return [p for params in self.groups().values() for p in params]

    def state(self):
        return self.deck.state() if self.kept is None else {**self.deck.state(), "prior": self.kept.state()}

    def load_state(self, state):
        self.deck.load_state(state)
        if self.kept is not None:
            self.kept.load_state(state["prior"])

    def loss(self, rng):
        """(B,) native loss of one batch, weighted; what is to be kept adds the same to each."""
        loss, x, sigma = self.denoised(self.data.batch(self.deck.draw(rng), rng), rng)
        return loss if self.kept is None else loss + self.kept.loss(self, x, sigma, rng)

    def denoised(self, batch: Batch, rng):
        """((B,) weighted loss, x, sigma) of these pictures, freshly noised."""
        x0 = self.denoiser.model_space(batch.x0)
        conds = self.encode(batch) if self.encode else batch.conds
        sigma = random_sigma(self.denoiser, self.density, x0, rng, self.noise.min_time, self.noise.max_time)
        mask = None if batch.mask is None else batch.mask.to(x0)
        noise = noise_like(x0, rng, self.noise)
        extra = self.noise.perturbation * randn_like(x0, rng) if self.noise.perturbation else None
        with self.adapters.dropping(rng):
            error = denoising_loss(self.denoiser, x0, noise, sigma, conds, mask, self.noise, extra)
        return loss_weight(self.denoiser, sigma, self.noise) * error, self.denoiser.noised(x0, noise, sigma), sigma
