"""A LoRA learns to denoise pictures under their captions: the plain denoising loss on adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..adapters import Adapters
from ..data.encoded import Deck, Encoded
from ..diffusion import Denoiser, Density, denoising_loss, density_for, loss_weight, noise_like, randn_like, random_sigma
from ..settings import NoiseSettings


@dataclass
class Lora:
    """`encode` turns captions into conditionings with gradients, when the text encoder is trained too."""

    denoiser: Denoiser
    adapters: Adapters
    data: Encoded
    noise: NoiseSettings = NoiseSettings()
    density: Density = Density()  # the family's own, used where the settings leave it open
    batch: int = 1
    text_adapters: Adapters | None = None
    encode: object = None  # (captions) -> conds
    deck: Deck = field(init=False)

    def __post_init__(self):
        self.deck = Deck(self.data, self.batch)
        self.density = density_for(self.noise, self.density)

    def groups(self):
        named = {"model": list(self.adapters.parameters())}
        return named if self.text_adapters is None else {**named, "text encoder": list(self.text_adapters.parameters())}

    def parameters(self):
        return [p for params in self.groups().values() for p in params]

    def state(self):
        return self.deck.state()

    def load_state(self, state):
        self.deck.load_state(state)

    def loss(self, rng):
        """(B,) native loss of one batch, weighted."""
        batch = self.data.batch(self.deck.draw(rng), rng)
        x0 = self.denoiser.model_space(batch.x0)
        conds = self.encode(batch) if self.encode else batch.conds
        sigma = random_sigma(self.denoiser, self.density, x0, rng, self.noise.min_time, self.noise.max_time)
        mask = None if batch.mask is None else batch.mask.to(x0)
        noise = noise_like(x0, rng, self.noise)
        extra = self.noise.perturbation * randn_like(x0, rng) if self.noise.perturbation else None
        with self.adapters.dropping(rng):
            error = denoising_loss(self.denoiser, x0, noise, sigma, conds, mask, self.noise, extra)
        return loss_weight(self.denoiser, sigma, self.noise) * error
