"""A LoRA learns to denoise images under their captions: the plain denoising loss on adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..adapters.adapters import Adapters
from ..data.encoded import Batch, BucketBatchSampler, EncodedDataset
from ..diffusion import (
    Denoiser,
    NoiseLevelDensity,
    cpu_randn_like,
    denoising_loss,
    loss_weight,
    resolve_noise_density,
    sample_sigmas,
    sample_training_noise,
)
from ..memory.transfer import copy_like
from ..settings import NoiseSettings
from .few_step import FewStepPlan, check_empty_caption, drift_loss, make_retarget
from .prior import PriorData, PriorLoss


@dataclass
class LoraTraining:
    """The denoising loss of adapters on encoded images. `encode_batch` encodes captions with gradients, when the text
    encoder is trained too. `prior`: what the model must not forget. `few_step`: how a distilled model stays one."""

    denoiser: Denoiser
    adapters: Adapters
    data: EncodedDataset
    noise: NoiseSettings = NoiseSettings()
    density: NoiseLevelDensity = NoiseLevelDensity()  # the family's own, used where the settings leave it open
    batch: int = 1
    text_adapters: Adapters | None = None
    encode_batch: Callable[[Batch], list[dict]] | None = None  # -> one conditioning per sample
    prior: PriorData | None = None
    few_step: FewStepPlan = FewStepPlan()
    deck: BucketBatchSampler = field(init=False)

    def __post_init__(self):
        self.deck = BucketBatchSampler(self.data, self.batch)
        self.density = resolve_noise_density(self.noise, self.density)
        self.prior_loss = None if self.prior is None else PriorLoss(self.prior, self.batch)
        if not self.few_step.is_plain:
            for data in filter(None, (self.data, self.prior and self.prior.data)):
                check_empty_caption(data)

    def groups(self):
        named = {"model": list(self.adapters.parameters())}
        return named if self.text_adapters is None else {**named, "text encoder": list(self.text_adapters.parameters())}

    def parameters(self):
        return [p for params in self.groups().values() for p in params]

    def state(self):
        return self.deck.state() if self.prior_loss is None else {**self.deck.state(), "prior": self.prior_loss.state()}

    def load_state(self, state):
        self.deck.load_state(state)
        if self.prior_loss is not None:
            self.prior_loss.load_state(state["prior"])

    def loss(self, rng):
        """(B,) native loss of one batch, weighted; what is to be kept adds the same to each."""
        batch = self.data.make_batch(self.deck.next_batch(rng), rng)
        loss, x, sigma = self.denoise_batch(batch, rng)
        if self.few_step.drift:
            loss = loss + self.few_step.drift * drift_loss(self, x, batch, self.few_step, rng)
        return loss if self.prior_loss is None else loss + self.prior_loss.loss(self, x, sigma, rng)

    def denoise_batch(self, batch: Batch, rng, data: EncodedDataset | None = None):
        """((B,) weighted loss, x, sigma) of these images, freshly noised. `data`: where they are from, if not from what
        is learnt."""
        x0 = self.denoiser.model_space(batch.x0)
        conds = self.encode_batch(batch) if self.encode_batch else batch.conds
        sigma = sample_sigmas(self.denoiser, self.density, x0, rng, self.noise.min_time, self.noise.max_time)
        mask = None if batch.mask is None else copy_like(batch.mask, x0)
        noise = sample_training_noise(x0, rng, self.noise)
        extra = self.noise.perturbation * cpu_randn_like(x0, rng) if self.noise.perturbation else None
        empty = (data or self.data).empty_conds(batch) if self.few_step.contrast != 1 else []
        retarget = make_retarget(self, sigma, empty, batch.dropped)
        with self.adapters.dropout_active(rng):
            error = denoising_loss(self.denoiser, x0, noise, sigma, conds, mask, self.noise, extra, retarget)
        return loss_weight(self.denoiser, sigma, self.noise) * error, self.denoiser.noised(x0, noise, sigma), sigma
