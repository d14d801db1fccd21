"""One image seen in several ways: crops, mirrored, turned, shuffled, grey; each encoded by itself, because a VAE's
latents can be neither turned nor shuffled without a trace. Kept on disk as all latents are."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ..protocols import TensorTreeStore
from ..settings import compute_fingerprint
from .cache import DiskCache
from .encode import EncodingProgress, VaeProtocol, encode_posterior, prefetch_results, require_latent_shape
from .records import WHITE, ImageDataset, ImageRecord, open_image

VIEWS_VERSION = 1
CROP_VIEW, ROTATED_VIEW, SHUFFLED_VIEW, GREY_VIEW = "crop", "turned", "shuffled", "grey"
QUARTER_PERMUTATIONS = tuple(itertools.permutations(range(4)))  # of the four quarters
SHUFFLES_PER_IMAGE = 3  # shuffled ways of each image that are encoded
MIN_CROP_SHARE = 0.7  # of an image's square that a crop shows
BRIGHTNESS_JITTER = 0.15
QUARTER_GAP_SHARE = (
    1 / 32
)  # of the side: the quarters do not touch, else their borders would tell which belong together


@dataclass(frozen=True)
class EncodedView:
    """A latent in the store, and what was done to the image: quarter turns, or the number of the order of its
    quarters."""

    key: str
    label: int = 0


@dataclass(frozen=True)
class ViewDataset:
    """The views of every image by kind; `store.load(view.key)["mean"]` is the latent (C, ..., h, w)."""

    views_by_image: tuple[dict[str, tuple[EncodedView, ...]], ...]
    dataset: ImageDataset
    store: TensorTreeStore
    shape: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.views_by_image)

    def load_latent(self, view: EncodedView) -> Tensor:
        return self.store.load(view.key)["mean"].float()


@dataclass(frozen=True)
class ViewSpec:
    """What is to be done to an image: the square (left, top, side) in shares of the short side's room, then the
    rest."""

    kind: str
    share: float = 1.0
    left: float = 0.5
    top: float = 0.5
    mirrored: bool = False
    light: float = 1.0
    label: int = 0

    def key(self, record: ImageRecord, size: int, vae: VaeProtocol, ground) -> str:
        return compute_fingerprint(
            "view",
            VIEWS_VERSION,
            record.pixels_id,
            list(record.crop or ()),
            vars(self),
            size,
            vae.identity,
            list(ground),
        )


def sample_view_specs(record: ImageRecord, kinds: Sequence[str], crops: int, seed: int) -> list[ViewSpec]:
    """The views of one image, drawn by its content and the seed."""
    rng = random.Random(hashlib.sha1(f"{record.id}/{seed}".encode()).hexdigest())
    made = [
        ViewSpec(
            CROP_VIEW,
            rng.uniform(MIN_CROP_SHARE, 1.0),
            rng.random(),
            rng.random(),
            rng.random() < 0.5,
            rng.uniform(1 - BRIGHTNESS_JITTER, 1 + BRIGHTNESS_JITTER),
        )
        for _ in range(crops)
    ]
    orders = rng.sample(range(len(QUARTER_PERMUTATIONS)), SHUFFLES_PER_IMAGE)
    more = {
        ROTATED_VIEW: [ViewSpec(ROTATED_VIEW, label=turns) for turns in range(4)],
        SHUFFLED_VIEW: [ViewSpec(SHUFFLED_VIEW, label=order) for order in orders],
        GREY_VIEW: [ViewSpec(GREY_VIEW), ViewSpec(CROP_VIEW)],
    }
    return made + [draft for kind in (ROTATED_VIEW, SHUFFLED_VIEW, GREY_VIEW) if kind in kinds for draft in more[kind]]


def render_view(draft: ViewSpec, image: Image.Image, size: int) -> Image.Image:
    """The view as a square of size x size pixels. Nothing is stretched."""
    side = max(1, round(min(image.size) * math.sqrt(draft.share)))
    left, top = round((image.width - side) * draft.left), round((image.height - side) * draft.top)
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    square = ImageOps.mirror(square) if draft.mirrored else square
    square = ImageEnhance.Brightness(square).enhance(draft.light) if draft.light != 1 else square
    if draft.kind == ROTATED_VIEW:
        return square.rotate(90 * draft.label)
    if draft.kind == SHUFFLED_VIEW:
        return shuffle_quarters(square, QUARTER_PERMUTATIONS[draft.label])
    return ImageOps.grayscale(square).convert("RGB") if draft.kind == GREY_VIEW else square


def shuffle_quarters(square: Image.Image, order: Sequence[int]) -> Image.Image:
    """Place i shows quarter order[i], each without its rim."""
    half, rim = square.width // 2, round(square.width * QUARTER_GAP_SHARE)
    page = Image.new("RGB", square.size, (128, 128, 128))
    for position, quarter in enumerate(order):
        x, y = quarter % 2 * half, quarter // 2 * half
        cell = square.crop((x + rim, y + rim, x + half - rim, y + half - rim))
        page.paste(cell, (position % 2 * half + rim, position // 2 * half + rim))
    return page


def encode_views(
    dataset: ImageDataset,
    kinds: Sequence[str],
    *,
    size: int,
    crops: int,
    seed: int,
    vae: VaeProtocol,
    cache_dir,
    report: Callable | None = None,
    check_interrupt: Callable | None = None,
    ground=WHITE,
) -> ViewDataset:
    """Every image's views; what is on disk is not encoded again. ValueError where there is nothing to see or the size
    does not suit."""
    if not len(dataset):
        raise ValueError("The dataset has no images. Load a folder with images first.")
    if size % (2 * vae.factor):
        raise ValueError(
            f"size is {size} px, and this VAE makes one latent cell of {vae.factor} px. Choose a multiple of "
            f"{2 * vae.factor}."
        )
    cache, work = DiskCache(cache_dir), EncodingProgress(len(dataset), report, check_interrupt)
    plans = [(record, sample_view_specs(record, kinds, crops, seed)) for record in dataset]
    opening = (
        lambda r=record, d=todo: open_image(r, ground) if list_missing_views(r, d, size, vae, cache, ground) else None
        for record, todo in plans
    )
    images = []
    for (record, todo), image in zip(plans, prefetch_results(opening), strict=True):
        work.raise_if_interrupted()
        for draft, key in list_missing_views(record, todo, size, vae, cache, ground):
            work.raise_if_interrupted()
            image = image or open_image(record, ground)
            cache.write(key, encode_posterior([render_view(draft, image, size)], vae, Path(record.path).name))
        images.append(group_views_by_kind(todo, [draft.key(record, size, vae, ground) for draft in todo], crops))
        work.advance(1, Path(record.path).name)
    shape = require_latent_shape(cache, images[0][CROP_VIEW][0].key)
    print_ = compute_fingerprint(
        "views", VIEWS_VERSION, dataset.fingerprint(), list(kinds), size, crops, seed, vae.identity
    )
    return ViewDataset(tuple(images), dataset, cache, shape, print_)


def list_missing_views(record, todo, size, vae, cache, ground) -> list[tuple[ViewSpec, str]]:
    keyed = [(draft, draft.key(record, size, vae, ground)) for draft in todo]
    return [(draft, key) for draft, key in keyed if cache.read_shapes(key) is None]


def group_views_by_kind(
    todo: Sequence[ViewSpec], keys: Sequence[str], crops: int
) -> dict[str, tuple[EncodedView, ...]]:
    """`crop`: the crops; the grey view comes with the same image in colour after it."""
    views = [EncodedView(key, draft.label) for draft, key in zip(todo, keys, strict=True)]
    out = {CROP_VIEW: tuple(views[:crops])}
    for draft, view in zip(todo[crops:], views[crops:], strict=True):
        out[kind] = (*out.get(kind := GREY_VIEW if draft.kind == CROP_VIEW else draft.kind, ()), view)
    return out
