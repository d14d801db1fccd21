"""One picture seen in several ways: crops, mirrored, turned, shuffled, grey; each encoded by itself, because a VAE's latents can be neither
turned nor shuffled without a trace. Kept on disk as all latents are."""

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

from ..settings import fingerprint
from .cache import Cache
from .encode import Vae, Work, ahead, posterior
from .records import WHITE, Dataset, Record, open_image

VERSION = 1
CROP, TURNED, SHUFFLED, GREY = "crop", "turned", "shuffled", "grey"
ORDERS = tuple(itertools.permutations(range(4)))  # of the four quarters
QUARTER_ROWS = 3  # shuffled ways of each picture that are encoded
LEAST_SHARE = 0.7  # of a picture's square that a crop shows
LIGHTER = 0.15
GAP = 1 / 32  # of the side: the quarters do not touch, else their borders would tell which belong together


@dataclass(frozen=True)
class View:
    """A latent in the store, and what was done to the picture: quarter turns, or the number of the order of its quarters."""

    key: str
    label: int = 0


@dataclass(frozen=True)
class Views:
    """The views of every picture by kind; `store.load(view.key)["mean"]` is the latent (C, ..., h, w)."""

    pictures: tuple[dict[str, tuple[View, ...]], ...]
    dataset: Dataset
    store: object
    shape: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.pictures)

    def latent(self, view: View) -> Tensor:
        return self.store.load(view.key)["mean"].float()


@dataclass(frozen=True)
class Draft:
    """What is to be done to a picture: the square (left, top, side) in shares of the short side's room, then the rest."""

    kind: str
    share: float = 1.0
    left: float = 0.5
    top: float = 0.5
    mirrored: bool = False
    light: float = 1.0
    label: int = 0

    def key(self, record: Record, size: int, vae: Vae, ground) -> str:
        return fingerprint("view", VERSION, record.id, list(record.crop or ()), vars(self), size, vae.identity, list(ground))


def drafts(record: Record, kinds: Sequence[str], crops: int, seed: int) -> list[Draft]:
    """The views of one picture, drawn by its content and the seed."""
    rng = random.Random(hashlib.sha1(f"{record.id}/{seed}".encode()).hexdigest())
    made = [Draft(CROP, rng.uniform(LEAST_SHARE, 1.0), rng.random(), rng.random(), rng.random() < 0.5, rng.uniform(1 - LIGHTER, 1 + LIGHTER))
            for _ in range(crops)]  # fmt: skip
    orders = rng.sample(range(len(ORDERS)), QUARTER_ROWS)
    more = {TURNED: [Draft(TURNED, label=turns) for turns in range(4)], SHUFFLED: [Draft(SHUFFLED, label=order) for order in orders],
            GREY: [Draft(GREY), Draft(CROP)]}  # fmt: skip
    return made + [draft for kind in (TURNED, SHUFFLED, GREY) if kind in kinds for draft in more[kind]]


def drawn(draft: Draft, picture: Image.Image, size: int) -> Image.Image:
    """The view as a square of size x size pixels. Nothing is stretched."""
    side = max(1, round(min(picture.size) * math.sqrt(draft.share)))
    left, top = round((picture.width - side) * draft.left), round((picture.height - side) * draft.top)
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    square = ImageOps.mirror(square) if draft.mirrored else square
    square = ImageEnhance.Brightness(square).enhance(draft.light) if draft.light != 1 else square
    if draft.kind == TURNED:
        return square.rotate(90 * draft.label)
    if draft.kind == SHUFFLED:
        return shuffled(square, ORDERS[draft.label])
    return ImageOps.grayscale(square).convert("RGB") if draft.kind == GREY else square


def shuffled(square: Image.Image, order: Sequence[int]) -> Image.Image:
    """Place i shows quarter order[i], each without its rim."""
    half, rim = square.width // 2, round(square.width * GAP)
    page = Image.new("RGB", square.size, (128, 128, 128))
    for place, quarter in enumerate(order):
        x, y = quarter % 2 * half, quarter // 2 * half
        cell = square.crop((x + rim, y + rim, x + half - rim, y + half - rim))
        page.paste(cell, (place % 2 * half + rim, place // 2 * half + rim))
    return page


def encode_views(dataset: Dataset, kinds: Sequence[str], *, size: int, crops: int, seed: int, vae: Vae, cache_dir,
                 report: Callable | None = None, check_interrupt: Callable | None = None, ground=WHITE) -> Views:
    """Every picture's views; what is on disk is not encoded again. ValueError where there is nothing to see or the size does not suit."""
    if not len(dataset):
        raise ValueError("The dataset has no images. Load a folder with images first.")
    if size % (2 * vae.factor):
        raise ValueError(f"size is {size} px, and this VAE makes one latent cell of {vae.factor} px. Choose a multiple of {2 * vae.factor}.")
    cache, work = Cache(cache_dir), Work(len(dataset), report, check_interrupt)
    plans = [(record, drafts(record, kinds, crops, seed)) for record in dataset]
    opening = (lambda r=record, d=todo: open_image(r, ground) if missing(r, d, size, vae, cache, ground) else None for record, todo in plans)
    pictures = []
    for (record, todo), picture in zip(plans, ahead(opening), strict=True):
        work.may_go_on()
        for draft, key in missing(record, todo, size, vae, cache, ground):
            work.may_go_on()
            cache.write(key, posterior(drawn(draft, picture, size), vae, Path(record.path).name))
        pictures.append(by_kind(todo, [draft.key(record, size, vae, ground) for draft in todo], crops))
        work.step(1, Path(record.path).name)
    shape = cache.shapes(pictures[0][CROP][0].key)["mean"]
    print_ = fingerprint("views", VERSION, dataset.fingerprint(), list(kinds), size, crops, seed, vae.identity)
    return Views(tuple(pictures), dataset, cache, shape, print_)


def missing(record, todo, size, vae, cache, ground) -> list[tuple[Draft, str]]:
    keyed = [(draft, draft.key(record, size, vae, ground)) for draft in todo]
    return [(draft, key) for draft, key in keyed if cache.shapes(key) is None]


def by_kind(todo: Sequence[Draft], keys: Sequence[str], crops: int) -> dict[str, tuple[View, ...]]:
    """`crop`: the crops; the grey view comes with the same picture in colour after it."""
    views = [View(key, draft.label) for draft, key in zip(todo, keys, strict=True)]
    out = {CROP: tuple(views[:crops])}
    for draft, view in zip(todo[crops:], views[crops:], strict=True):
        out[kind] = (*out.get(kind := GREY if draft.kind == CROP else draft.kind, ()), view)
    return out
