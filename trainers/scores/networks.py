"""Networks that look at latents and say how good they are, at any noise level.

A network sees x scaled to unit size and a level in [0, 1]: 0 clean, 1 noise, whatever the family's sigma means. What it
says is read by
its task: a rating, a distribution over ten bins, a class, or which of two is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion import Denoiser, per_sample
from ..settings import Settings, choice_field, number_field, switch_field

BACKBONES = ("latent ResNet", "latent ViT", "model features", "decode + image scorer")
ADAPTABLE_BACKBONE = BACKBONES[2]
SCORE_TASKS = ("regression", "distribution", "binary", "multiclass", "pairwise")
PRETRAINING_TASK = "pretraining"  # the task of a backbone that has no head yet
NUM_RATING_BINS = 10


@dataclass(frozen=True, kw_only=True)
class ScorerSettings(Settings):
    """What looks at the latents."""

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
        if self.rank and self.backbone != ADAPTABLE_BACKBONE:
            raise ValueError(
                f"rank is {self.rank} and backbone is {self.backbone!r}, which looks through no diffusion model that a "
                f"LoRA could adapt. Set rank to 0, or choose {ADAPTABLE_BACKBONE!r}."
            )


def noising_coefficients(denoiser: Denoiser, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), each (B,), of x = a * x0 + b * noise."""
    one, zero = torch.ones(len(sigma), 1, device=sigma.device), torch.zeros(len(sigma), 1, device=sigma.device)
    return denoiser.noised(one, zero, sigma).flatten(), denoiser.noised(zero, one, sigma).flatten()


def sigma_to_level(denoiser: Denoiser, sigma: Tensor) -> Tensor:
    """(B,) the level of `unit_view`: the share of noise in x."""
    a, b = noising_coefficients(denoiser, sigma)
    return b / (a + b)


def to_scorer_input(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x of about unit size, level in [0, 1]) of noised latents of any family: with x = a * x0 + b * noise, x /
    sqrt(a^2 + b^2) and b / (a + b)."""
    a, b = noising_coefficients(denoiser, sigma.to(x.device))
    return x / per_sample((a.square() + b.square()).sqrt(), x), b / (a + b)


def level_to_sigma(denoiser: Denoiser, level: Tensor) -> Tensor:
    """(B,) the sigma at which `unit_view` gives this level, below 1."""
    return level if denoiser.flow else level / (1 - level)


class NoiseLevelEmbedding(nn.Module):
    """A level (B,) as features (B, width): sines of several speeds, then two layers."""

    def __init__(self, width: int, speeds: int = 16):
        super().__init__()
        self.register_buffer("speed", torch.exp(torch.linspace(0, math.log(1000.0), speeds)), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * speeds, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, level):
        angle = level[:, None].float() * self.speed
        return self.layers(torch.cat([angle.sin(), angle.cos()], 1))


class FiLM(nn.Module):
    """Scale and shift per channel from the level (Perez et al. 2018); does nothing at the start."""

    def __init__(self, features: int, channels: int):
        super().__init__()
        self.layer = nn.Linear(features, 2 * channels)
        nn.init.zeros_(self.layer.weight), nn.init.zeros_(self.layer.bias)

    def forward(self, h, features):
        scale, shift = self.layer(features)[..., None, None].chunk(2, 1)
        return h * (1 + scale) + shift


def make_group_norm(channels):
    """Groups of 16 channels or more: with one channel each, the norm would take away how bright or colourful a picture
    is."""
    return nn.GroupNorm(math.gcd(max(1, channels // 16), channels), channels)


class ResBlock(nn.Module):
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
    """(B, C, h, w), (B,) -> (B, size): four stages, the first at full latent size, mean and maximum over what is
    left."""

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
    """Attention and an MLP, each scaled, shifted and gated by the level (Peebles and Xie 2023); does nothing at the
    start."""

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
    """(B, C, h, w), (B,) -> (B, size): patches of 2x2 cells as tokens, for any h and w; mean and maximum over the
    tokens."""

    HEADS = 6

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
    """(width, rows, columns) sines and cosines of the distance from the middle, half of them for the row and half for
    the column."""
    speed = 1000.0 ** -(torch.arange(width // 4) / (width // 4))

    def line(count):
        angle = (torch.arange(count) - (count - 1) / 2)[:, None] * speed
        return torch.cat([angle.sin(), angle.cos()], 1).T  # (width / 2, count)

    return torch.cat([line(rows)[:, :, None].expand(-1, -1, columns), line(columns)[:, None].expand(-1, rows, -1)])


def squeeze_single_frame(x: Tensor) -> Tensor:
    """(B, C, h, w) of pictures that a video model holds as (B, C, 1, h, w)."""
    if x.ndim == 4:
        return x
    if x.ndim != 5 or x.shape[2] != 1:
        raise ValueError(
            f"A score model judges pictures, and got latents of shape {tuple(x.shape)}. Give it single frames."
        )
    return x.squeeze(2)


class Scorer(nn.Module):
    """A trunk (x, level) -> features (B, size), and a head to the numbers that the task wants."""

    def __init__(self, trunk: nn.Module, outputs: int):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(nn.LayerNorm(trunk.size, bias=False), nn.Linear(trunk.size, outputs))

    def forward(self, x, level, keep: Tensor | None = None):
        """(B, outputs). keep (B, size): the features are multiplied with it, for dropout by a generator of one's
        own."""
        features = self.trunk(x, level)
        return self.head(features if keep is None else features * keep)


@dataclass(frozen=True)
class ScoreModelInfo:
    """What a score model is and was trained on: everything but its weights, JSON-able, kept in its file."""

    backbone: str = "latent ResNet"
    task: str = "regression"
    latent_format: str = ""  # the host's name of the latents' kind; another kind is refused
    channels: int = 4
    width: int = 64
    depth: int = 2
    noisy: bool = True
    outputs: int = 1
    classes: tuple[str, ...] = ()
    mean: float = 0.0  # of the ratings, in the user's own scale
    std: float = 1.0
    low: float = 0.0  # the user's scale
    high: float = 1.0
    line: tuple[float, float] = (1.0, 0.0)  # calibration: rating = line[0] * prediction + line[1], in the user's scale
    curve: tuple[
        tuple[float, float], ...
    ] = ()  # calibration by knots (said, rating) in the user's scale, instead of the line
    members: int = 1
    resolution: int = (
        0  # side in pixels of a square as large as the pictures it was trained on; 0 where only latents were given
    )
    trained: bool = True  # False: what it says cannot be told from chance
    metrics: dict = field(default_factory=dict)
    dataset: str = ""  # hash of what it was trained on
    rank: int = 0  # of the LoRA through which it looks at the model's own states

    def to_dict(self) -> dict:
        """Without a rank of 0: files of frozen features are as they always were."""
        return {name: value for name, value in asdict(self).items() if name != "rank" or value}

    @classmethod
    def from_dict(cls, values: dict) -> ScoreModelInfo:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"This score model was made by a newer version: it says {', '.join(unknown)}. Update Trainyard."
            )
        return cls(**{k: lists_to_tuples(v) for k, v in values.items()})


def check_trained_head(about: ScoreModelInfo) -> None:
    """ValueError for a backbone that has learnt to see and not yet to rate: its head says 0 to everything."""
    if about.task == PRETRAINING_TASK:
        raise ValueError(
            f"This is a pre-trained backbone ({about.backbone}, from Pretrain Score Backbone): it has no trained head, "
            "so it can rate nothing yet. Connect it to Train Score Model as pretrained, with rated pictures, and use "
            "the score model that comes out."
        )


def lists_to_tuples(value):
    """JSON's lists as the tuples they were."""
    return tuple(map(lists_to_tuples, value)) if isinstance(value, list) else value


LATENT_BACKBONES = {"latent ResNet": LatentResNet, "latent ViT": LatentViT}


def build_scorer(about: ScoreModelInfo, trunk: nn.Module | None = None) -> Scorer:
    """A new network of this kind, its weights drawn from torch's own generator. `trunk`: of the backbones that are made
    from a loaded model, which this room knows nothing of. Its state_dict must leave the loaded model's own weights
    out."""
    if trunk is None:
        if about.backbone not in LATENT_BACKBONES:
            raise ValueError(
                f"The backbone {about.backbone!r} is made from a loaded model: connect the one it was trained with. "
                f"Only {' and '.join(LATENT_BACKBONES)} stand for themselves."
            )
        trunk = LATENT_BACKBONES[about.backbone](about.channels, about.width, about.depth)
    return Scorer(trunk, about.outputs)


def call_with_seed(seed: int, make):
    """make() with torch's own generator at this seed; it is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@dataclass
class ScorerEnsemble:
    """An ensemble of scorers with what is known about them. Values are in standard deviations of the ratings it was
    trained on, so that different scores can be added."""

    networks: list[nn.Module]
    about: ScoreModelInfo

    def to(self, device):
        self.networks = [network.to(device) for network in self.networks]
        return self

    def members(self, x: Tensor, level: Tensor) -> Tensor:
        """(M, B) what each member says of noised latents, as `unit_view` gives them. Differentiable in x. A model of
        clean pictures knows no levels and takes everything for clean."""
        level = level if self.about.noisy else torch.zeros_like(level)
        return torch.stack([score_from_outputs(network(x, level), self.about) for network in self.networks])

    def value(self, x: Tensor, level: Tensor) -> Tensor:
        """(B,) the mean of the members."""
        return self.members(x, level).mean(0)

    @torch.no_grad()
    def ratings(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """((B,) ratings of clean latents in the user's own scale, (B,) standard deviation between members)."""
        said = self.members(x0, torch.zeros(len(x0), device=x0.device))
        rated = to_rating_scale(said, self.about)
        return rated.mean(0), rated.std(0, unbiased=False)


def to_rating_scale(said: Tensor, about: ScoreModelInfo) -> Tensor:
    """Ratings for what a scorer says. Probability for binary, 0 to 1 over the classes, and for pairs the scorer's own
    scale: it has no other."""
    if about.task == "binary":
        return said.sigmoid()
    if about.task == "multiclass":
        return said
    said = said * about.std + about.mean
    if not about.curve:
        return said * about.line[0] + about.line[1]
    return interpolate_knots(said, *torch.tensor(about.curve, device=said.device, dtype=said.dtype).T)


def interpolate_knots(x: Tensor, at: Tensor, y: Tensor) -> Tensor:
    """Straight lines through the knots (at, y), at rising; level beyond the first and the last."""
    if len(at) == 1:
        return y.expand_as(x)
    right = torch.searchsorted(at.contiguous(), x.contiguous()).clamp(1, len(at) - 1)
    share = ((x - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return y[right - 1] + share * (y[right] - y[right - 1])


def score_from_outputs(out: Tensor, about: ScoreModelInfo) -> Tensor:
    """(B, outputs) -> (B,): one number to go up. Regression and pairs: the output; bins: their mean, standardised;
    binary: the logit;
    classes: the expected class, first to last as low to high."""
    if about.task == "distribution":
        centres = torch.linspace(about.low, about.high, NUM_RATING_BINS, device=out.device)
        return ((out.softmax(1) * centres).sum(1) - about.mean) / about.std
    if about.task == "multiclass":
        return (out.softmax(1) * torch.linspace(0, 1, out.shape[1], device=out.device)).sum(1)
    return out[:, 0]


def head_output_size(task: str, classes: int = 0) -> int:
    return NUM_RATING_BINS if task == "distribution" else classes if task == "multiclass" else 1


SCORING_BATCH_SIZE = 32


def batch_indices_by_shape(shapes: Sequence[tuple]) -> list[list[int]]:
    """Batches of indices with one shape each."""
    places = [[i for i, other in enumerate(shapes) if other == shape] for shape in dict.fromkeys(shapes)]
    return [
        same[start : start + SCORING_BATCH_SIZE] for same in places for start in range(0, len(same), SCORING_BATCH_SIZE)
    ]
