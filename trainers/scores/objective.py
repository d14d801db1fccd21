"""A network learns what a person thinks of pictures, from their latents: ratings, classes, or which of two is better.

Half of every batch is clean, the other half lies anywhere on the way to noise, by the model's own schedule. Mirrored
pictures are latents of their own, as they were encoded; a latent is never flipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.encoded import BucketBatchSampler, EncodedDataset
from ..diffusion import Denoiser, cpu_randn_like
from ..settings import Settings, choice_field, number_field, switch_field
from .networks import NUM_RATING_BINS, SCORE_TASKS, ScoreModelInfo, Scorer, to_scorer_input

MSE_RANKING, MSE_MARGIN_RANKING, MSE_ONLY = SCORE_LOSSES = ("MSE + ranking", "MSE + margin ranking", "MSE")
CALIBRATION_METHODS = ("linear", "isotonic", "off")
MAX_SCORE_NOISE = 0.98  # of the schedule
RANKING_WEIGHT = 0.25  # weight of the ranking


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(Settings):
    """What is learnt from the ratings, and how it is measured."""

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
    batch: int = number_field(32, 2, 1024, "Images, or pairs of them, per step.", unit="pictures")
    members: int = number_field(
        5,
        2,
        20,
        "Number of networks, each evaluated on images it was not trained on. Their mean is the score, their "
        "disagreement its uncertainty.",
        unit="networks",
    )
    seed: int = number_field(0, 0, 2**63 - 1, "The same seed, images and settings give the same file, bit for bit.")
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


def squared_error(said: Tensor, wanted: Tensor) -> Tensor:
    return (said - wanted).square()


def ranking_loss(said: Tensor, wanted: Tensor, margin: bool = False) -> Tensor:
    """(B,) how wrong the order of a batch is: over all pairs log(1 + exp(-distance)) of the better one above the worse
    one, or how much of their difference in rating is missing; pairs count by that difference. The mean over B is the
    mean over pairs."""
    apart, wrong = wanted[:, None] - wanted[None], said[:, None] - said[None]
    weight, ahead = apart.abs(), apart.sign() * wrong
    lost = (weight - ahead).clamp(min=0) if margin else F.softplus(-ahead)
    return (weight * lost).sum(1) / weight.sum().clamp(min=1e-6) * len(said)


def emd_loss(out: Tensor, wanted: Tensor, r: int = 2) -> Tensor:
    """(B,) distance between two distributions over ordered bins (Hou et al. 2016; NIMA, Talebi and Milanfar 2018), from
    logits."""
    apart = (out.softmax(1).cumsum(1) - wanted.cumsum(1)).abs() ** r
    return apart.mean(1).clamp(min=1e-12) ** (1 / r)


def bradley_terry_loss(better: Tensor, worse: Tensor) -> Tensor:
    """(B,) -log of the chance that the better one wins (Bradley and Terry 1952)."""
    return F.softplus(worse - better)


def two_hot_ratings(scores: Tensor, low: float, high: float) -> Tensor:
    """(N,) -> (N, BINS): all weight on the two bins around each rating, so that their mean is the rating."""
    at = (scores.clamp(low, high) - low) / (high - low) * (NUM_RATING_BINS - 1)
    left = at.floor().clamp(max=NUM_RATING_BINS - 2).long()
    share = (at - left).float()
    return (
        F.one_hot(left, NUM_RATING_BINS) * (1 - share)[:, None] + F.one_hot(left + 1, NUM_RATING_BINS) * share[:, None]
    )


# -- what is wanted ----------------------------------------------------------------------------------------------------


def score_targets(scores: Sequence[float], about: ScoreModelInfo) -> Tensor:
    """What the network should say to each picture: (N,) standardised ratings, labels or class numbers, or (N, BINS)."""
    scores = torch.tensor(scores, dtype=torch.float32)
    if about.task == "distribution":
        return two_hot_ratings(scores, about.low, about.high)
    if about.task in ("binary", "multiclass"):
        return torch.searchsorted(torch.tensor([float(c) for c in about.classes]), scores).to(
            torch.float32 if about.task == "binary" else torch.long
        )
    return (scores - about.mean) / about.std


@dataclass
class ScoreTraining:
    """`data` holds the pictures that are learnt from, `wanted` what is to be said of each (`targets`); for the pairwise
    task `pairs` of (better, worse) indices take its place."""

    denoiser: Denoiser
    network: Scorer
    data: EncodedDataset
    about: ScoreModelInfo
    targets: Tensor | None = None
    pairs: Sequence[tuple[int, int]] = ()
    settings: ScoreSettings = ScoreSettings()
    dropout: float = 0.2
    deck: BucketBatchSampler = field(init=False)
    average: list[Tensor] = field(init=False)
    steps: int = 0

    def __post_init__(self):
        cards = (
            [pair for pair in self.pairs]
            if self.about.task == "pairwise"
            else [(index,) for index in range(len(self.data))]
        )
        if not cards:
            raise ValueError("There is no pair of pictures to compare. Give pairs, or ratings that differ.")
        self.cards = cards
        self.deck = BucketBatchSampler(
            SimpleNamespace(items=[SimpleNamespace(shape=(), repeats=1) for _ in cards]), self.settings.batch
        )
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
        """(B,) one number per picture, or per pair."""
        self.update_average()
        cards = [self.cards[i] for i in self.deck.draw(rng)]
        levels = torch.where(
            torch.rand(len(cards), generator=rng) < 0.5, 0.0, torch.rand(len(cards), generator=rng) * MAX_SCORE_NOISE
        )
        sides = len(cards[0])
        index = [i for card in cards for i in card]
        out = self.said(index, levels.repeat_interleave(sides) * self.about.noisy, rng)
        if self.about.task == "pairwise":
            return bradley_terry_loss(*out[:, 0].view(-1, 2).T)
        return self.sample_losses(out, self.targets[index].to(out.device))

    def sample_losses(self, out, wanted):
        if self.about.task == "distribution":
            return emd_loss(out, wanted)
        if self.about.task == "multiclass":
            return F.cross_entropy(out, wanted, reduction="none")
        said = out[:, 0]
        if self.about.task == "binary":
            return F.binary_cross_entropy_with_logits(said, wanted, reduction="none")
        if self.settings.loss == MSE_ONLY:
            return squared_error(said, wanted)
        return squared_error(said, wanted) + RANKING_WEIGHT * ranking_loss(
            said, wanted, self.settings.loss == MSE_MARGIN_RANKING
        )

    def said(self, index, u, rng) -> Tensor:
        """(B, outputs) in the order of index, at the share u of the schedule; pictures of one size go through the
        network together."""
        items = [self.data.items[i] for i in index]
        flips = [
            item.flipped is not None and coin < 0.5
            for item, coin in zip(items, torch.rand(len(items), generator=rng).tolist(), strict=True)
        ]
        by_shape: dict[tuple, list[int]] = {}
        for place, item in enumerate(items):
            by_shape.setdefault(item.shape, []).append(place)
        out = [
            self.network(
                *self.view([items[i] for i in places], [flips[i] for i in places], u[places], rng),
                self.kept(len(places), rng),
            )
            for places in by_shape.values()
        ]
        order = torch.tensor([place for places in by_shape.values() for place in places]).argsort()
        return torch.cat(out)[order.to(out[0].device)]

    def view(self, items, flips, u, rng) -> tuple[Tensor, Tensor]:
        """What the network sees of latents of one shape: clean where u is 0."""
        latents = [self.data.latent(item, flip, rng) for item, flip in zip(items, flips, strict=True)]
        return noised_scorer_input(
            self.denoiser, self.denoiser.model_space(torch.stack(latents)), self.denoiser.sigma_at(u), u > 0, rng
        )

    def kept(self, count, rng) -> Tensor | None:
        """Dropout by the step's own generator, so that a resumed run is the same run."""
        if not self.dropout:
            return None
        keep = (torch.rand(count, self.network.trunk.size, generator=rng) >= self.dropout).float() / (1 - self.dropout)
        return keep.to(next(self.network.head.parameters()).device)

    # -- the average of the weights ------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_average(self):
        """The average takes in the weights as they are. Its memory grows with the run, so that the first steps do not
        weigh on it."""
        decay = min(self.settings.ema, (1 + self.steps) / (10 + self.steps))
        self.average = [torch.lerp(p, a, decay) for a, p in zip(self.average, self.parameters(), strict=True)]
        self.steps += 1

    @torch.no_grad()
    def keep(self, weights: list[Tensor]):
        """Put these weights into the network."""
        for p, value in zip(self.parameters(), weights, strict=True):
            p.copy_(value)


def noised_scorer_input(denoiser, x0, sigma, noisy, rng) -> tuple[Tensor, Tensor]:
    """`unit_view` of latents, those that are not noisy left as they are at level 0. Noise is drawn for all of them."""
    sigma = sigma.to(x0.device, torch.float32)
    x, level = to_scorer_input(denoiser, denoiser.noised(x0, cpu_randn_like(x0, rng), sigma), sigma)
    noisy = noisy.to(x0.device)
    return torch.where(noisy.view(-1, *[1] * (x0.ndim - 1)), x, x0), torch.where(noisy, level, 0.0)
