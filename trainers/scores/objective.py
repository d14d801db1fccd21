"""Training a scorer on rated latents: losses for ratings, classes and preference pairs, and the training batches.

Half of every batch is clean, the other half is noised to random points of the model's own schedule. Mirrored images are
encoded latents of their own; a latent is never flipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.encoded import BucketBatchSampler, EncodedDataset
from ..diffusion import Denoiser, cpu_randn_like
from ..memory.transfer import copy_to_device
from ..optimizers import ema_decay
from ..settings import Settings, choice_field, number_field, switch_field
from .networks import NUM_RATING_BINS, SCORE_TASKS, ScoreModelInfo, Scorer, to_scorer_input

MSE_RANKING, MSE_MARGIN_RANKING, MSE_ONLY = SCORE_LOSSES = ("MSE + ranking", "MSE + margin ranking", "MSE")
CALIBRATION_METHODS = ("linear", "isotonic", "off")
MAX_SCORE_NOISE = 0.98  # as a share of the schedule
RANKING_WEIGHT = 0.25  # of the ranking loss beside the squared error


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(Settings):
    """How a score model is trained on ratings, and how it is measured."""

    task: str = choice_field(
        "regression",
        SCORE_TASKS,
        "regression: ratings on a scale. distribution: ten bins of it. binary: two ratings, such as 0 and 1. "
        "multiclass: a few different ratings. pairwise: only which of two is better.",
    )
    steps: int = number_field(
        600,
        1,
        1_000_000,
        "Maximum steps of each member. Training stops earlier when the score on held-out images no longer improves.",
        unit="optimizer steps",
    )
    learning_rate: float = number_field(
        1e-3, 1e-7, 1.0, "Learning rate of AdamW; it decays to 0 along a cosine.", step=1e-4
    )
    batch: int = number_field(32, 2, 1024, "Images, or pairs of them, per step.", unit="images")
    members: int = number_field(
        5,
        2,
        20,
        "Number of networks, each evaluated on images it was not trained on. Their mean is the score, their "
        "disagreement its uncertainty.",
        unit="networks",
    )
    seed: int = number_field(
        0,
        0,
        2**63 - 1,
        "The same seed, images and settings give the same file: bit for bit on the CPU, nearly so on a GPU.",
    )
    loss: str = choice_field(
        MSE_RANKING,
        SCORE_LOSSES,
        "For regression. Ranking also rewards the right order within a batch, by a logistic curve or a margin.",
        advanced=True,
    )
    calibration: str = choice_field(
        "linear",
        CALIBRATION_METHODS,
        "How the raw output is mapped to your rating scale: by a line, or by a curve that never falls (from about"
        " 100 ratings on).",
        advanced=True,
    )
    weight_decay: float = number_field(0.05, 0.0, 10.0, "Pulls the weights toward zero.", step=0.01, advanced=True)
    ema: float = number_field(
        0.999,
        0.0,
        0.99999,
        "Decay of the moving average of the weights. The saved model holds the average.",
        step=0.001,
        advanced=True,
    )
    check_every: int = number_field(
        25, 1, 100_000, "How often the held-out images are scored.", unit="optimizer steps", advanced=True
    )
    patience: int = number_field(
        10,
        0,
        10_000,
        "Stop after this many checks without improvement. 0 never stops early.",
        unit="checks",
        advanced=True,
    )
    few: bool = switch_field(
        False,
        "Allow training on fewer than 20 ratings, to test a graph. The figures will mean little.",
        advanced=True,
    )


# -- losses, one number per sample -------------------------------------------------------------------------------------


def squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    return (predictions - targets).square()


def ranking_loss(predictions: Tensor, targets: Tensor, margin: bool = False) -> Tensor:
    """(B,) pairwise ranking loss over all pairs of the batch, weighted by their difference in rating. Logistic: log(1 +
    exp(-d)) for d, how far the better one is predicted above the worse one; margin: how far d falls short of the
    difference in rating. The mean over B is the weighted mean over pairs."""
    rating_gap, predicted_gap = targets[:, None] - targets[None], predictions[:, None] - predictions[None]
    weight, ahead = rating_gap.abs(), rating_gap.sign() * predicted_gap
    pair_loss = (weight - ahead).clamp(min=0) if margin else F.softplus(-ahead)
    return (weight * pair_loss).sum(1) / weight.sum().clamp(min=1e-6) * len(predictions)


def emd_loss(outputs: Tensor, targets: Tensor, r: int = 2) -> Tensor:
    """(B,) earth mover's distance between distributions over ordered bins, from logits (Hou et al. 2016; NIMA, Talebi
    and Milanfar 2018)."""
    distance = (outputs.softmax(1).cumsum(1) - targets.cumsum(1)).abs() ** r
    return distance.mean(1).clamp(min=1e-12) ** (1 / r)


def bradley_terry_loss(better: Tensor, worse: Tensor) -> Tensor:
    """(B,) negative log-likelihood that the better one wins (Bradley and Terry 1952)."""
    return F.softplus(worse - better)


def two_hot_ratings(scores: Tensor, low: float, high: float) -> Tensor:
    """(N,) -> (N, NUM_RATING_BINS): all weight on the two bins around each rating, so that their mean is the rating."""
    position = (scores.clamp(low, high) - low) / (high - low) * (NUM_RATING_BINS - 1)
    left = position.floor().clamp(max=NUM_RATING_BINS - 2).long()
    share = (position - left).float()
    return (
        F.one_hot(left, NUM_RATING_BINS) * (1 - share)[:, None] + F.one_hot(left + 1, NUM_RATING_BINS) * share[:, None]
    )


# -- targets and training ----------------------------------------------------------------------------------------------


def score_targets(scores: Sequence[float] | np.ndarray, info: ScoreModelInfo) -> Tensor:
    """The targets of the loss: (N,) standardised ratings, labels or class numbers, or (N, NUM_RATING_BINS)
    distributions."""
    ratings = torch.tensor(scores, dtype=torch.float32)
    if info.task == "distribution":
        return two_hot_ratings(ratings, info.low, info.high)
    if info.task in ("binary", "multiclass"):
        return torch.searchsorted(torch.tensor([float(c) for c in info.classes]), ratings).to(
            torch.float32 if info.task == "binary" else torch.long
        )
    return (ratings - info.mean) / info.std


@dataclass(frozen=True)
class EqualBatchElement:
    """What fits in a batch with every other."""

    shape: tuple = ()
    repeats: int = 1


@dataclass(frozen=True)
class EqualBatchElements:
    """In the place of a dataset, where only the number of samples counts."""

    items: list[EqualBatchElement]

    @classmethod
    def of_count(cls, count: int) -> EqualBatchElements:
        return cls([EqualBatchElement()] * count)


@dataclass
class ScoreTraining:
    """The training of one scorer, as the loop drives it. `data` holds the training images, `targets` what
    `score_targets` gives for each; the pairwise task takes `pairs` of (better, worse) indices in their place."""

    denoiser: Denoiser
    network: Scorer
    data: EncodedDataset
    info: ScoreModelInfo
    targets: Tensor | None = None
    pairs: Sequence[tuple[int, int]] = ()
    settings: ScoreSettings = ScoreSettings()
    dropout: float = 0.2
    deck: BucketBatchSampler = field(init=False)
    average: list[Tensor] = field(init=False)
    steps: int = 0

    def __post_init__(self):
        by_pairs = self.info.task == "pairwise"
        self.samples = list(self.pairs) if by_pairs else [(index,) for index in range(len(self.data))]
        if not self.samples:
            raise ValueError("There is no pair of images to compare. Give pairs, or ratings that differ.")
        self.deck = BucketBatchSampler(EqualBatchElements.of_count(len(self.samples)), self.settings.batch)
        self.average = [p.detach().clone() for p in self.parameters()]

    def parameters(self):
        return [p for p in self.network.parameters() if p.requires_grad]

    def state(self):
        return {"deck": self.deck.state(), "average": self.average, "steps": self.steps}

    def load_state(self, state):
        self.deck.load_state(state["deck"])
        self.average = [v.to(p) for v, p in zip(state["average"], self.parameters(), strict=True)]
        self.steps = state["steps"]

    def loss(self, rng):
        """(B,) one loss per image, or per pair."""
        self.update_average()
        samples = [self.samples[i] for i in self.deck.next_batch(rng)]
        levels = torch.where(
            torch.rand(len(samples), generator=rng) < 0.5,
            0.0,
            torch.rand(len(samples), generator=rng) * MAX_SCORE_NOISE,
        )
        sides = len(samples[0])
        index = [i for sample in samples for i in sample]
        outputs = self.predict_outputs(index, levels.repeat_interleave(sides) * self.info.noisy, rng)
        if self.info.task == "pairwise":
            return bradley_terry_loss(*outputs[:, 0].view(-1, 2).T)
        assert self.targets is not None  # only the pairwise task goes without
        return self.sample_losses(outputs, copy_to_device(self.targets[index], outputs.device))

    def sample_losses(self, outputs, targets):
        """(B,) the loss of the task for the network's outputs."""
        if self.info.task == "distribution":
            return emd_loss(outputs, targets)
        if self.info.task == "multiclass":
            return F.cross_entropy(outputs, targets, reduction="none")
        predictions = outputs[:, 0]
        if self.info.task == "binary":
            return F.binary_cross_entropy_with_logits(predictions, targets, reduction="none")
        if self.settings.loss == MSE_ONLY:
            return squared_error(predictions, targets)
        return squared_error(predictions, targets) + RANKING_WEIGHT * ranking_loss(
            predictions, targets, self.settings.loss == MSE_MARGIN_RANKING
        )

    def predict_outputs(self, index, u, rng) -> Tensor:
        """(B, outputs) in the order of index, at the share u of the schedule. Latents of one shape go through the
        network together."""
        items = [self.data.items[i] for i in index]
        flips = [
            item.flipped is not None and coin < 0.5
            for item, coin in zip(items, torch.rand(len(items), generator=rng).tolist(), strict=True)
        ]
        by_shape: dict[tuple, list[int]] = {}
        for position, item in enumerate(items):
            by_shape.setdefault(item.shape, []).append(position)
        outputs = [
            self.network(
                *self.scorer_input([items[i] for i in positions], [flips[i] for i in positions], u[positions], rng),
                self.dropout_mask(len(positions), rng),
            )
            for positions in by_shape.values()
        ]
        order = torch.tensor([position for positions in by_shape.values() for position in positions]).argsort()
        return torch.cat(outputs)[copy_to_device(order, outputs[0].device)]

    def scorer_input(self, items, flips, u, rng) -> tuple[Tensor, Tensor]:
        """(x, level) for the network, of items of one latent shape: clean where u is 0."""
        latents = [self.data.sample_latent(item, flip, rng) for item, flip in zip(items, flips, strict=True)]
        return noised_scorer_input(
            self.denoiser, self.denoiser.model_space(torch.stack(latents)), self.denoiser.sigma_at(u), u > 0, rng
        )

    def dropout_mask(self, count, rng) -> Tensor | None:
        """(count, size) inverted dropout of the features, drawn from the step's own generator so that a resumed run is
        the same run. None without dropout."""
        if not self.dropout:
            return None
        kept = torch.rand(count, self.network.feature_size, generator=rng) >= self.dropout
        return copy_to_device(kept.float() / (1 - self.dropout), next(self.network.head.parameters()).device)

    # -- EMA of the weights --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_average(self):
        """Update the EMA with the current weights. The decay grows with the number of steps, so that the initial
        weights do not linger."""
        decay = ema_decay(self.settings.ema, self.steps)
        self.average = [torch.lerp(p, a, decay) for a, p in zip(self.average, self.parameters(), strict=True)]
        self.steps += 1

    @torch.no_grad()
    def load_weights(self, weights: list[Tensor]):
        """Put these weights into the network."""
        for p, value in zip(self.parameters(), weights, strict=True):
            p.copy_(value)


def noised_scorer_input(denoiser, x0, sigma, noisy, rng) -> tuple[Tensor, Tensor]:
    """`to_scorer_input` of x0 noised to sigma (B,); rows where `noisy` (B,) is False stay clean at level 0. Noise is
    drawn for every row, so that the generator advances alike."""
    sigma = copy_to_device(sigma, x0.device, torch.float32)
    x, level = to_scorer_input(denoiser, denoiser.noised(x0, cpu_randn_like(x0, rng), sigma), sigma)
    noisy = copy_to_device(noisy, x0.device)
    return torch.where(noisy.view(-1, *[1] * (x0.ndim - 1)), x, x0), torch.where(noisy, level, 0.0)
