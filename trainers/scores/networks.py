"""Networks that score latents at any noise level.

A network takes latents scaled to about unit variance and a noise level in [0, 1] (0 clean, 1 pure noise), whatever the
model family's sigma means. The task decides how its outputs are read: as a rating, a distribution over ten bins, a
class, or a value to compare two images by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion import Denoiser, noising_coefficients, per_sample
from ..memory.transfer import copy_to_device
from ..settings import Settings, choice_field, number_field, switch_field

BACKBONES = ("latent ResNet", "latent ViT", "model features", "decode + image scorer")
MODEL_FEATURES, DECODED_IMAGE = LOADED_BACKBONES = BACKBONES[
    2:
]  # built on a loaded diffusion model, or VAE + CLIP_VISION
SCORE_TASKS = ("regression", "distribution", "binary", "multiclass", "pairwise")
PRETRAINING_TASK = "pretraining"  # the task of a backbone that has no head yet
NUM_RATING_BINS = 10


@dataclass(frozen=True, kw_only=True)
class ScorerSettings(Settings):
    """Architecture of the networks that score latents."""

    backbone: str = choice_field(
        "latent ResNet",
        BACKBONES,
        "latent ResNet suits a few hundred to some thousand ratings; the loaded model's own features need the "
        "fewest; latent ViT needs many or pretraining; decode + image scorer reads pixels.",
    )
    width: int = number_field(
        64, 8, 2048, "Channels of the first stage (ResNet), or of a token divided by 6 (ViT).", advanced=True
    )
    depth: int = number_field(
        2, 1, 48, "Blocks per stage (ResNet), or number of layers divided by 4 (ViT).", advanced=True
    )
    noisy: bool = switch_field(True, "Also train on noised latents, as LECO-Score needs. Off: clean images only.")
    dropout: float = number_field(
        0.2, 0.0, 0.9, "Share of the last features dropped during training.", step=0.05, advanced=True
    )
    rank: int = number_field(
        0,
        0,
        4096,
        "model features: also trains a LoRA of this rank on the model's attention, stored in the score model's "
        "file; your model stays unchanged. 0: the model only extracts features, many times faster.",
        advanced=True,
        later=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rank and self.backbone != MODEL_FEATURES:
            raise ValueError(
                f"rank is {self.rank} and backbone is {self.backbone!r}, which looks through no diffusion model that a "
                f"LoRA could adapt. Set rank to 0, or choose {MODEL_FEATURES!r}."
            )


def sigma_to_level(denoiser: Denoiser, sigma: Tensor) -> Tensor:
    """(B,) the noise level of `to_scorer_input`: b / (a + b) for x = a * x0 + b * noise."""
    a, b = noising_coefficients(denoiser, sigma)
    return b / (a + b)


def to_scorer_input(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x of about unit variance, noise level in [0, 1]) of noised latents of any family: for x = a * x0 + b * noise
    these are x / sqrt(a^2 + b^2) and b / (a + b)."""
    a, b = noising_coefficients(denoiser, copy_to_device(sigma, x.device))
    return x / per_sample((a.square() + b.square()).sqrt(), x), b / (a + b)


def level_to_sigma(denoiser: Denoiser, level: Tensor) -> Tensor:
    """(B,) the sigma whose `to_scorer_input` has this noise level; the level must be below 1."""
    return level if denoiser.flow else level / (1 - level)


class NoiseLevelEmbedding(nn.Module):
    """Noise levels (B,) -> features (B, width): sines and cosines of several frequencies, then two layers."""

    def __init__(self, width: int, speeds: int = 16):
        super().__init__()
        self.register_buffer("speed", torch.exp(torch.linspace(0, math.log(1000.0), speeds)), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * speeds, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, level):
        angle = level[:, None].float() * self.speed
        return self.layers(torch.cat([angle.sin(), angle.cos()], 1))


class FiLM(nn.Module):
    """Scale and shift per channel from the noise level features (Perez et al. 2018). Starts as the identity."""

    def __init__(self, features: int, channels: int):
        super().__init__()
        self.layer = nn.Linear(features, 2 * channels)
        nn.init.zeros_(self.layer.weight), nn.init.zeros_(self.layer.bias)

    def forward(self, h, features):
        scale, shift = self.layer(features)[..., None, None].chunk(2, 1)
        return h * (1 + scale) + shift


def make_group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with groups of 16 channels or more: with one channel per group, the norm would remove brightness and
    saturation."""
    return nn.GroupNorm(math.gcd(max(1, channels // 16), channels), channels)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with FiLM of the noise level between them, and a skip connection. Starts as the skip."""

    def __init__(self, inputs, outputs, features, stride=1):
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norms = nn.ModuleList([make_group_norm(inputs), make_group_norm(outputs)])
        self.film = FiLM(features, outputs)
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)
        nn.init.zeros_(self.second.weight)

    def forward(self, h, features):
        inner = self.first(F.silu(self.norms[0](h)))
        return self.skip(h) + self.second(F.silu(self.film(self.norms[1](inner), features)))


class LatentResNet(nn.Module):
    """(B, C, h, w), (B,) -> (B, size): four stages, the first at full latent resolution, then mean and maximum over the
    last map."""

    size: int

    def __init__(self, channels: int, width: int = 64, depth: int = 2):
        super().__init__()
        widths, features = [width, 2 * width, 4 * width, 4 * width], 4 * width
        self.level, self.stem = NoiseLevelEmbedding(features), nn.Conv2d(channels, width, 3, 1, 1)
        self.blocks = nn.ModuleList(
            ResBlock(widths[max(0, stage - (block == 0))], widths[stage], features, 2 if stage and not block else 1)
            for stage in range(4)
            for block in range(depth)
        )
        self.last, self.size = make_group_norm(widths[-1]), 2 * widths[-1]

    def forward(self, x, level):
        h, features = self.stem(squeeze_single_frame(x)), self.level(level)
        for block in self.blocks:
            h = block(h, features)
        h = F.silu(self.last(h))
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)


class DiTBlock(nn.Module):
    """Attention and an MLP, each scaled, shifted and gated by the noise level features (adaLN-Zero, Peebles and Xie
    2023). Starts as the identity."""

    def __init__(self, width: int, heads: int, features: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(features, 6 * width)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)

    def forward(self, h, features):  # (B, tokens, width), (B, features)
        scale, shift, gate, scale_2, shift_2, gate_2 = self.modulation(features)[:, None].chunk(6, -1)
        h = h + gate * self.attention(self.norms[0](h) * (1 + scale) + shift)
        return h + gate_2 * self.mlp(self.norms[1](h) * (1 + scale_2) + shift_2)

    def attention(self, h):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LatentViT(nn.Module):
    """(B, C, h, w), (B,) -> (B, size): patches of 2x2 latent cells as tokens, for any h and w, then mean and maximum
    over the tokens."""

    HEADS = 6
    size: int

    def __init__(self, channels: int, width: int = 64, depth: int = 2):
        super().__init__()
        tokens, features = self.HEADS * (width + width % 2), 4 * width
        self.level, self.stem = NoiseLevelEmbedding(features), nn.Conv2d(channels, tokens, 2, 2)
        self.blocks = nn.ModuleList(DiTBlock(tokens, self.HEADS, features) for _ in range(4 * depth))
        self.last, self.size = nn.LayerNorm(tokens), 2 * tokens

    def forward(self, x, level):
        x = squeeze_single_frame(x)
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")
        h, features = self.stem(x), self.level(level)
        h = (h + sincos_position_embedding(*h.shape[1:]).to(h)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h, features)
        h = self.last(h)
        return torch.cat([h.mean(1), h.amax(1)], 1)


def sincos_position_embedding(width: int, rows: int, columns: int) -> Tensor:
    """(width, rows, columns) sines and cosines of the distance from the centre: half of the channels for the row, half
    for the column."""
    frequency = 1000.0 ** -(torch.arange(width // 4) / (width // 4))

    def line(count):
        angle = (torch.arange(count) - (count - 1) / 2)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], 1).T  # (width / 2, count)

    return torch.cat([line(rows)[:, :, None].expand(-1, -1, columns), line(columns)[:, None].expand(-1, rows, -1)])


def squeeze_single_frame(x: Tensor) -> Tensor:
    """(B, C, h, w) of single images, which a video model holds as (B, C, 1, h, w)."""
    if x.ndim == 4:
        return x
    if x.ndim != 5 or x.shape[2] != 1:
        raise ValueError(
            f"A score model scores images, but got latents of shape {tuple(x.shape)}. Give it single frames."
        )
    return x.squeeze(2)


class Scorer(nn.Module):
    """A trunk (x, level) -> features (B, size), and a linear head to the outputs of the task."""

    trunk: nn.Module

    def __init__(self, trunk: nn.Module, outputs: int):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(nn.LayerNorm(self.feature_size, bias=False), nn.Linear(self.feature_size, outputs))

    @property
    def feature_size(self) -> int:
        return int(self.trunk.size)  # pyright: ignore[reportArgumentType]  each trunk has a size

    def forward(self, x, level, keep: Tensor | None = None):
        """(B, outputs). `keep` (B, size) is a dropout mask that the features are multiplied with, so that the caller's
        own generator draws it."""
        features = self.trunk(x, level)
        return self.head(features if keep is None else features * keep)


@dataclass(frozen=True)
class ScoreModelInfo:
    """What a score model is and what it was trained on: everything but its weights. Saved as JSON in its file, so the
    field names are part of the file format."""

    backbone: str = "latent ResNet"
    task: str = "regression"
    latent_format: str = ""  # ComfyUI's name of the latent format; latents of another format are refused
    channels: int = 4
    width: int = 64
    depth: int = 2
    noisy: bool = True
    outputs: int = 1
    classes: tuple[str, ...] = ()
    mean: float = 0.0  # of the ratings, on the user's scale
    std: float = 1.0
    low: float = 0.0  # ends of the user's scale
    high: float = 1.0
    line: tuple[float, float] = (1.0, 0.0)  # calibration: rating = line[0] * prediction + line[1], on the user's scale
    # calibration by knots (prediction, rating) on the user's scale, in place of the line
    curve: tuple[tuple[float, float], ...] = ()
    members: int = 1
    # px, side of the square with the area of the training images; 0 where only latents were given
    resolution: int = 0
    trained: bool = True  # False: its predictions are no better than chance
    metrics: dict = field(default_factory=dict)
    dataset: str = ""  # hash of what it was trained on
    rank: int = 0  # of the LoRA on the diffusion model whose features it reads

    def to_dict(self) -> dict:
        """The JSON of the file. A rank of 0 is left out, so files of frozen features are as before ranks existed."""
        return {name: value for name, value in asdict(self).items() if name != "rank" or value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScoreModelInfo:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"This score model was made by a newer version: it says {', '.join(unknown)}. Update Trainyard."
            )
        return cls(**{k: lists_to_tuples(v) for k, v in values.items()})


def check_trained_head(info: ScoreModelInfo) -> None:
    """ValueError for a pre-trained backbone: its head predicts 0 for everything."""
    if info.task == PRETRAINING_TASK:
        raise ValueError(
            f"This is a pre-trained backbone ({info.backbone}, from Pretrain Score Backbone): it has no trained "
            "head, so it cannot score yet. Connect it to Train Score Model as pretrained, with rated images, and "
            "use the score model that comes out."
        )


def lists_to_tuples(value: Any) -> Any:
    """The value with JSON's lists turned back into tuples, at any depth."""
    return tuple(map(lists_to_tuples, value)) if isinstance(value, list) else value


LATENT_BACKBONES: dict[str, type[LatentResNet] | type[LatentViT]] = {
    "latent ResNet": LatentResNet,
    "latent ViT": LatentViT,
}


def build_scorer(info: ScoreModelInfo, trunk: nn.Module | None = None) -> Scorer:
    """A new network as `info` describes it, initialised from torch's global generator. `trunk`: for backbones that are
    built on a loaded model; its state_dict must leave the loaded model's own weights out."""
    if trunk is None:
        if info.backbone not in LATENT_BACKBONES:
            raise ValueError(
                f"The backbone {info.backbone!r} is made from a loaded model: connect the one it was trained with. "
                f"Only {' and '.join(LATENT_BACKBONES)} stand for themselves."
            )
        trunk = LATENT_BACKBONES[info.backbone](info.channels, info.width, info.depth)
    return Scorer(trunk, info.outputs)


T = TypeVar("T")


def call_with_seed(seed: int, make: Callable[[], T]) -> T:
    """make() with torch's global generator at this seed; its state is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@dataclass
class ScorerEnsemble:
    """A score model: an ensemble of scorers and what is known about them. Scores are in standard deviations of the
    ratings it was trained on, so that different score models can be added."""

    networks: Sequence[nn.Module]
    info: ScoreModelInfo

    def to(self, device):
        self.networks = [network.to(device) for network in self.networks]
        return self

    def member_scores(self, x: Tensor, level: Tensor) -> Tensor:
        """(M, B) the score of each member for noised latents, as `to_scorer_input` gives them. Differentiable in x. A
        model trained on clean images ignores the level and takes everything for clean."""
        level = level if self.info.noisy else torch.zeros_like(level)
        return torch.stack([score_from_outputs(network(x, level), self.info) for network in self.networks])

    def mean_score(self, x: Tensor, level: Tensor) -> Tensor:
        """(B,) the mean score of the members."""
        return self.member_scores(x, level).mean(0)

    @torch.no_grad()
    def ratings(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """((B,) ratings of clean latents on the user's scale, (B,) standard deviation between members)."""
        scores = self.member_scores(x0, torch.zeros(len(x0), device=x0.device))
        ratings = to_rating_scale(scores, self.info)
        return ratings.mean(0), ratings.std(0, unbiased=False)


def to_rating_scale(scores: Tensor, info: ScoreModelInfo) -> Tensor:
    """Calibrated ratings on the user's scale for scores in standard deviations. Binary: the probability; multiclass: 0
    to 1 from the first class to the last; pairwise: the score itself, which has no scale of the user's."""
    if info.task == "binary":
        return scores.sigmoid()
    if info.task == "multiclass":
        return scores
    raw = scores * info.std + info.mean
    if not info.curve:
        return raw * info.line[0] + info.line[1]
    return interpolate_knots(raw, *torch.tensor(info.curve, device=raw.device, dtype=raw.dtype).T)


def interpolate_knots(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation through (knots, values), knots ascending; constant before the first and after the last."""
    if len(knots) == 1:
        return values.expand_as(x)
    right = torch.searchsorted(knots.contiguous(), x.contiguous()).clamp(1, len(knots) - 1)
    share = ((x - knots[right - 1]) / (knots[right] - knots[right - 1])).clamp(0, 1)
    return values[right - 1] + share * (values[right] - values[right - 1])


def score_from_outputs(outputs: Tensor, info: ScoreModelInfo) -> Tensor:
    """(B, outputs) -> (B,): one score, higher is better. Regression and pairwise: the output. Distribution: the mean
    over the bins, standardised. Binary: the logit. Multiclass: the expected class, 0 for the lowest and 1 for the
    highest."""
    if info.task == "distribution":
        centres = torch.linspace(info.low, info.high, NUM_RATING_BINS, device=outputs.device)
        return ((outputs.softmax(1) * centres).sum(1) - info.mean) / info.std
    if info.task == "multiclass":
        return (outputs.softmax(1) * torch.linspace(0, 1, outputs.shape[1], device=outputs.device)).sum(1)
    return outputs[:, 0]


def head_output_size(task: str, classes: int = 0) -> int:
    """How many outputs the head of this task has."""
    return NUM_RATING_BINS if task == "distribution" else classes if task == "multiclass" else 1


SCORING_BATCH_SIZE = 32


def batch_indices_by_shape(shapes: Sequence[tuple]) -> list[list[int]]:
    """Batches of at most SCORING_BATCH_SIZE indices, all of one shape within a batch."""
    by_shape = [[i for i, other in enumerate(shapes) if other == shape] for shape in dict.fromkeys(shapes)]
    return [
        same[start : start + SCORING_BATCH_SIZE]
        for same in by_shape
        for start in range(0, len(same), SCORING_BATCH_SIZE)
    ]
