"""Self-supervised pretext tasks for a latent backbone, on images without ratings: inpainting, SimCLR, rotation, jigsaw,
colourisation, and class labels. The tasks share the trunk; their losses are summed by weight.

Measured on 600 images and 64 ratings (reference bed of this project): inpainting helps a score most, SimCLR helps image
similarity most.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.encoded import BucketBatchSampler
from ..data.views import (
    CROP_VIEW,
    GREY_VIEW,
    QUARTER_PERMUTATIONS,
    ROTATED_VIEW,
    SHUFFLED_VIEW,
    EncodedView,
    ViewDataset,
)
from ..diffusion import Denoiser
from ..memory.transfer import copy_to_device
from ..settings import Settings, choice_field, number_field
from .networks import LATENT_BACKBONES, squeeze_single_frame
from .objective import EqualBatchElements, noised_scorer_input

MASK_RATIO = 0.6  # share of the blocks that are masked
MASK_BLOCK_SIZE = 2  # latent cells
SIMCLR_TEMPERATURE = 0.2
MAX_PRETEXT_NOISE = 0.7  # as a share of the schedule; beyond it little of the image is left
PROJECTION_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class PretextSettings(Settings):
    """The self-supervised pre-training of a latent backbone."""

    backbone: str = choice_field(
        "latent ResNet",
        tuple(LATENT_BACKBONES),
        "latent ResNet suits some hundred to some thousand images; latent ViT needs tens of thousands.",
    )
    inpaint: float = number_field(
        1.0,
        0.0,
        100.0,
        "Weight of the task: predict the 60 % of the latent that are masked. Helps scores most.",
        step=0.1,
    )
    simclr: float = number_field(
        0.5,
        0.0,
        100.0,
        "Weight of the task: find which two crops show the same image. Helps similarity most.",
        step=0.1,
    )
    steps: int = number_field(
        2000, 1, 10_000_000, "Total training steps, one batch of images each.", unit="optimizer steps"
    )
    batch: int = number_field(32, 2, 1024, "Images per step. simclr improves with more.", unit="images")
    size: int = number_field(
        512, 16, 2048, "Side of the squares that are encoded. Nothing is stretched.", unit="px", step=16
    )
    seed: int = number_field(
        0,
        0,
        2**63 - 1,
        "The same seed, images and settings give the same file: bit for bit on the CPU, nearly so on a GPU.",
    )
    learning_rate: float = number_field(
        1e-3, 1e-7, 1.0, "Learning rate of AdamW; it decays to 0 along a cosine.", step=1e-4, advanced=True
    )
    rotation: float = number_field(
        0.0,
        0.0,
        100.0,
        "Weight of the task: predict by how many quarter turns an image was rotated.",
        step=0.1,
        advanced=True,
    )
    jigsaw: float = number_field(
        0.0,
        0.0,
        100.0,
        "Weight of the task: predict how the four quarters of an image were shuffled.",
        step=0.1,
        advanced=True,
    )
    colours: float = number_field(
        0.0, 0.0, 100.0, "Weight of the task: predict the colours of a grey image.", step=0.1, advanced=True
    )
    classes: float = number_field(
        0.0,
        0.0,
        100.0,
        "Weight of the task: predict an image's class (its folder, or from labels).",
        step=0.1,
        advanced=True,
    )
    crops: int = number_field(
        4,
        2,
        64,
        "Crops encoded per image, each 70 to 100 % of its square, some of them mirrored.",
        unit="crops",
        advanced=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if not any(weight for _, weight in self.tasks()):
            raise ValueError("The weights of all tasks are 0; nothing would be learnt. Set inpaint to 1, for example.")

    def tasks(self) -> list[tuple[str, float]]:
        """(name, weight) of every task."""
        return [
            (name, getattr(self, name)) for name in ("inpaint", "simclr", "rotation", "jigsaw", "colours", "classes")
        ]

    def kinds(self) -> tuple[str, ...]:
        """The kinds of views, beside crops, that the tasks need."""
        weights = {ROTATED_VIEW: self.rotation, SHUFFLED_VIEW: self.jigsaw, GREY_VIEW: self.colours}
        return tuple(kind for kind, weight in weights.items() if weight)


# -- losses, one number per sample -------------------------------------------------------------------------------------


def nt_xent(a: Tensor, b: Tensor, tau: float = SIMCLR_TEMPERATURE) -> Tensor:
    """(B,) normalised temperature-scaled cross entropy of SimCLR: each view must find its partner among all views of
    the batch (Chen et al. 2020)."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = (z @ z.T / tau).fill_diagonal_(float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similarity, partner, reduction="none").view(2, -1).mean(0)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean squared error over the masked cells; mask (B, 1, h, w), 1 = masked."""
    square = (prediction - target).square() * mask
    return square.flatten(1).sum(1) / (mask.flatten(1).sum(1) * target.shape[1]).clamp(min=1)


def sample_block_mask(shape: Sequence[int], rng) -> Tensor:
    """(B, 1, h, w) of 1 where blocks of 2x2 latent cells are masked, the same share in every image."""
    count, (height, width) = shape[0], shape[-2:]
    rows, columns = -(-height // MASK_BLOCK_SIZE), -(-width // MASK_BLOCK_SIZE)
    order = torch.rand(count, rows * columns, generator=rng).argsort(1).argsort(1)
    blocks = (order < round(MASK_RATIO * rows * columns)).float().view(count, 1, rows, columns)
    return blocks.repeat_interleave(MASK_BLOCK_SIZE, 2).repeat_interleave(MASK_BLOCK_SIZE, 3)[..., :height, :width]


# -- heads of the tasks ------------------------------------------------------------------------------------------------


class ReconstructionHead(nn.Module):
    """The trunk's last feature map (B, D, h / factor, w / factor) -> a latent (B, C, h, w), by pixel shuffle."""

    def __init__(self, inputs: int, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, 1, 1), nn.SiLU(), nn.Conv2d(inputs, channels * factor**2, 1)
        )

    def forward(self, state, size):
        return F.pixel_shuffle(self.layers(state), self.factor)[..., : size[0], : size[1]]


def features_and_map(trunk, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(features (B, size), the feature map (B, D, rows, columns) that they are pooled from)."""
    captured = []
    handle = trunk.last.register_forward_hook(lambda module, args, out: captured.append(out))
    try:
        features = trunk(x, level)
    finally:
        handle.remove()
    state = captured[0]
    if state.ndim == 3:  # a ViT's tokens, of 2x2 cells
        state = state.transpose(1, 2).unflatten(2, (-1, -(-x.shape[-1] // 2)))
    return features, state


def make_projection_head(inputs: int) -> nn.Module:
    """SimCLR's projection head, which is dropped after pre-training."""
    return nn.Sequential(nn.Linear(inputs, inputs), nn.SiLU(), nn.Linear(inputs, PROJECTION_WIDTH))


def build_pretext_heads(trunk, shape: Sequence[int], settings: PretextSettings, classes: int) -> nn.ModuleDict:
    """{task: its head} for each task whose weight is not 0. shape: (C, ..., h, w) of a latent."""
    with torch.no_grad():
        _, state = features_and_map(trunk, torch.zeros(1, *shape), torch.zeros(1))
    factor = max(math.ceil(side / cells) for side, cells in zip(shape[-2:], state.shape[-2:], strict=True))
    make = {
        "inpaint": lambda: ReconstructionHead(state.shape[1], shape[0], factor),
        "colours": lambda: ReconstructionHead(state.shape[1], shape[0], factor),
        "simclr": lambda: make_projection_head(trunk.size),
        "rotation": lambda: nn.Linear(trunk.size, 4),
        "jigsaw": lambda: nn.Linear(trunk.size, len(QUARTER_PERMUTATIONS)),
        "classes": lambda: nn.Linear(trunk.size, max(1, classes)),
    }
    return nn.ModuleDict({name: make[name]() for name, weight in settings.tasks() if weight})


@dataclass
class PretextTraining:
    """The pre-training as the loop drives it. `index`: the training images; `labels`: class numbers by image, None
    where there is none."""

    denoiser: Denoiser
    trunk: nn.Module
    heads: nn.ModuleDict
    views: ViewDataset
    index: Sequence[int]
    settings: PretextSettings
    noisy: bool = True
    labels: Sequence[int | None] = ()
    deck: BucketBatchSampler = field(init=False)

    def __post_init__(self):
        self.deck = BucketBatchSampler(EqualBatchElements.of_count(len(self.index)), self.settings.batch)
        self.loss_functions: dict[str, Callable] = {
            "inpaint": self.inpaint,
            "simclr": self.simclr,
            "rotation": self.rotation,
            "jigsaw": self.jigsaw,
            "colours": self.colours,
            "classes": self.classes,
        }

    def parameters(self):
        return [*self.trunk.parameters(), *self.heads.parameters()]

    def state(self):
        return {"deck": self.deck.state()}

    def load_state(self, state):
        self.deck.load_state(state["deck"])

    def loss(self, rng) -> Tensor:
        """(B,) the losses of all tasks, summed by weight."""
        picks = [self.index[i] for i in self.deck.next_batch(rng)]
        losses = [weight * self.loss_functions[name](picks, rng) for name, weight in self.settings.tasks() if weight]
        return functools.reduce(operator.add, losses)  # at least one, as the settings promise

    # -- the tasks -----------------------------------------------------------------------------------------------------

    def inpaint(self, picks, rng):
        """(B,) error of the clean latent's masked cells, reconstructed from the rest of the noised latent."""
        target = self.clean_latents(self.sample_views(picks, CROP_VIEW, rng))
        x, level = self.noised_views(target, rng)
        mask = copy_to_device(sample_block_mask(target.shape, rng), target.device)
        prediction = self.reconstruct_latents("inpaint", squeeze_single_frame(x) * (1 - mask), level)
        return masked_mse(prediction, squeeze_single_frame(target), mask)

    def simclr(self, picks, rng):
        """(B,) contrastive loss of two crops of each image."""
        first, second = zip(*(self.sample_crop_pair(i, rng) for i in picks), strict=True)
        features = self.trunk(*self.noised_views(self.clean_latents([*first, *second]), rng))
        return nt_xent(*self.heads["simclr"](features).chunk(2))

    def rotation(self, picks, rng):
        """(B,) cross entropy of the number of quarter turns."""
        return self.classification_loss("rotation", self.sample_views(picks, ROTATED_VIEW, rng), rng)

    def jigsaw(self, picks, rng):
        """(B,) cross entropy of the permutation of the four quarters."""
        return self.classification_loss("jigsaw", self.sample_views(picks, SHUFFLED_VIEW, rng), rng)

    def colours(self, picks, rng):
        """(B,) mean squared error of the coloured latent, reconstructed from the latent of the grey image."""
        grey, coloured = zip(*(self.views.views_by_image[i][GREY_VIEW] for i in picks), strict=True)
        x, level = self.noised_views(self.clean_latents(grey), rng)
        target = squeeze_single_frame(self.clean_latents(coloured))
        prediction = self.reconstruct_latents("colours", squeeze_single_frame(x), level)
        return (prediction - target).square().flatten(1).mean(1)

    def classes(self, picks, rng):
        """(B,) cross entropy of the images' classes; 0 for images without one."""
        labelled = [
            EncodedView(view.key, -1 if self.labels[i] is None else self.labels[i])
            for i, view in zip(picks, self.sample_views(picks, CROP_VIEW, rng), strict=True)
        ]
        return self.classification_loss("classes", labelled, rng)

    def classification_loss(self, task: str, views, rng):
        """(B,) cross entropy of the views' labels; 0 where the label is -1."""
        out = self.heads[task](self.trunk(*self.noised_views(self.clean_latents(views), rng)))
        return F.cross_entropy(
            out, torch.tensor([view.label for view in views], device=out.device), ignore_index=-1, reduction="none"
        )

    def reconstruct_latents(self, task: str, x, level):
        return self.heads[task](features_and_map(self.trunk, x, level)[1], x.shape[-2:])

    # -- inputs --------------------------------------------------------------------------------------------------------

    def sample_views(self, picks, kind, rng) -> list[EncodedView]:
        """One random view of this kind for each image."""
        draws = torch.rand(len(picks), generator=rng).tolist()
        return [
            views[int(coin * len(views))]
            for views, coin in (
                (self.views.views_by_image[i][kind], coin) for i, coin in zip(picks, draws, strict=True)
            )
        ]

    def sample_crop_pair(self, image: int, rng) -> tuple[EncodedView, EncodedView]:
        """Two different crops of an image."""
        crops = self.views.views_by_image[image][CROP_VIEW]
        first, second = torch.randperm(len(crops), generator=rng)[:2].tolist()
        return crops[first], crops[second]

    def clean_latents(self, views) -> Tensor:
        return self.denoiser.model_space(torch.stack([self.views.load_latent(view) for view in views]))

    def noised_views(self, x0, rng) -> tuple[Tensor, Tensor]:
        """(x, level) for the trunk: half of them clean, the others noised up to MAX_PRETEXT_NOISE of the schedule."""
        u = (
            torch.where(
                torch.rand(len(x0), generator=rng) < 0.5, 0.0, torch.rand(len(x0), generator=rng) * MAX_PRETEXT_NOISE
            )
            * self.noisy
        )
        return noised_scorer_input(self.denoiser, x0, self.denoiser.sigma_at(u), u > 0, rng)
