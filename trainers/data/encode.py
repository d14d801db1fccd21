"""From a dataset to latents and conditionings: each picture through the VAE once, each text through the text encoder once.

What is on disk already is not encoded again, so a stopped encode continues where it was. While the VAE works on one picture a thread
opens the next ones; no more than those are in memory. Pictures go through the VAE one by one: a batch would round otherwise, and what
is in the cache would depend on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..settings import fingerprint
from .buckets import BucketSettings, Placement, fit, placements
from .cache import Cache
from .captions.variants import CAPTIONS, EMPTY, CaptionSettings, record_rng, variants
from .encoded import Encoded, EncodedItem, latent_mask
from .readers import require_captions
from .records import WHITE, Dataset, Record, open_image, open_mask

VERSION = 1  # in every key: raise it when the same inputs would give other tensors
TEXTS_AT_ONCE = 16
AHEAD = 2  # pictures that are opened while the VAE works on another


class Vae(Protocol):
    identity: str  # hash of the weights
    factor: int  # pixels per latent cell, along a side

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, 3) in 0..1 -> mean and std (B, C, ..., h, w) of the unscaled latent; std None where there is no posterior."""


class Text(Protocol):
    identity: str

    def encode(self, texts: list[str]) -> list[dict]:
        """One cond per text: cross_attn (1, T, D), pooled_output (1, P), and whatever else the model wants."""


@dataclass(frozen=True)
class Plan:
    """What is to be encoded for one record."""

    record: Record
    placement: Placement
    captions: tuple[str, ...]
    latent: str
    flipped: str | None
    caption_keys: tuple[str, ...]


@dataclass
class Work:
    """The counter that the screen sees, and the way out."""

    total: int
    report: Callable[[int, int, str], None] | None
    check_interrupt: Callable[[], None] | None
    done: int = 0

    def step(self, count: int, text: str):
        self.done += count
        if self.report:
            self.report(self.done, self.total, text)

    def may_go_on(self):
        if self.check_interrupt:
            self.check_interrupt()


def encode(dataset: Dataset, captions: CaptionSettings, buckets: BucketSettings, flip: bool, vae: Vae, text: Text | None, cache_dir,
           report=None, check_interrupt=None, *, seed: int = 0, ground=WHITE) -> Encoded:
    """The dataset as latents and conditionings, kept in cache_dir.

    flip: the mirrored pictures are encoded too. report(done, total, text); check_interrupt() raises to stop, losing nothing.
    seed: of the shuffled captions. ground: the colour (red, green, blue) beneath transparent pictures.
    text: None for pictures without any conditioning, as score models need them; the caption mode must be the empty one."""
    check(dataset, captions, buckets, vae)
    if text is None:
        return encode_without_text(dataset, captions, buckets, flip, vae, Cache(cache_dir), report, check_interrupt, ground)
    plans = [plan(record, captions, placement, flip, vae, text, seed, ground) for record, placement in placements(dataset, buckets)]
    cache = Cache(cache_dir)
    texts = {"": caption_key("", text)} | {c: k for p in plans for c, k in zip(p.captions, p.caption_keys, strict=True)}
    work = Work(len(texts) + len(plans), report, check_interrupt)
    encode_texts(texts, text, cache, work)
    items = encode_pictures(plans, vae, cache, work, ground)
    print_ = fingerprint(VERSION, dataset.fingerprint(), captions, buckets, bool(flip), vae.identity, text.identity, seed, list(ground))
    return Encoded(items, cache, channels(items), print_, texts[""], captions.dropout)


def encode_without_text(dataset, captions, buckets, flip, vae, cache, report, check_interrupt, ground) -> Encoded:
    if captions.caption_mode != EMPTY:
        raise ValueError(f"The caption mode is {captions.caption_mode!r} and no CLIP is connected to encode captions with. Connect CLIP, or "
                         f"choose {EMPTY!r} for a score model.")
    plans = [plan_picture(record, placement, flip, vae, ground) for record, placement in placements(dataset, buckets)]
    items = encode_pictures(plans, vae, cache, Work(len(plans), report, check_interrupt), ground)
    print_ = fingerprint(VERSION, "without text", dataset.fingerprint(), buckets, bool(flip), vae.identity, list(ground))
    return Encoded(items, cache, channels(items), print_)


def check(dataset, captions, buckets, vae):
    if not len(dataset):
        raise ValueError("The dataset has no images. Load a folder with images first.")
    if buckets.step % vae.factor:
        raise ValueError(f"step is {buckets.step} px and this VAE makes one latent cell of {vae.factor} px. "
                         f"Choose a step that is a multiple of {vae.factor}.")
    for record in dataset:
        if record.bucket and (min(record.bucket) < 1 or any(side % vae.factor for side in record.bucket)):
            raise ValueError(f"{Path(record.path).name} is to be trained at {record.bucket[0]}x{record.bucket[1]} px and this VAE makes one "
                             f"latent cell of {vae.factor} px. Bucket the dataset with a step that is a multiple of {vae.factor}.")
    if captions.caption_mode == CAPTIONS and not captions.trigger.strip():
        require_captions(dataset)


def plan(record, captions, placement, flip, vae, text, seed, ground) -> Plan:
    told = variants(record, captions, record_rng(record, seed))
    keys = tuple(caption_key(caption, text) for caption in told)
    return replace(plan_picture(record, placement, flip, vae, ground), captions=told, caption_keys=keys)


def plan_picture(record, placement, flip, vae, ground) -> Plan:
    keys = [latent_key(record, placement, mirrored, vae, ground) for mirrored in (False, True)]
    return Plan(record, placement, (), keys[0], keys[1] if flip else None, ())


def latent_key(record, placement, mirrored, vae, ground) -> str:
    return fingerprint("latent", VERSION, record.id, record.crop, vars(placement), mirrored, vae.identity, list(ground))


def caption_key(caption, text) -> str:
    return fingerprint("caption", VERSION, caption, text.identity)


def mask_key(record, placement, cells) -> str | None:
    if record.mask is None:
        return None
    alpha = record.mask == record.path
    return fingerprint("mask", VERSION, record.mask_id, alpha, record.crop, vars(placement), list(cells))


def encode_texts(texts: dict[str, str], text: Text, cache: Cache, work: Work) -> None:
    """Writes the conditioning of every caption that is not on disk."""
    missing = [caption for caption, key in texts.items() if cache.shapes(key) is None]
    work.step(len(texts) - len(missing), "captions")
    for start in range(0, len(missing), TEXTS_AT_ONCE):
        work.may_go_on()
        some = missing[start : start + TEXTS_AT_ONCE]
        for caption, cond in zip(some, text.encode(some), strict=True):
            write_cond(cache, texts[caption], cond)
        work.step(len(some), "captions")


def write_cond(cache, key, cond: dict) -> None:
    try:
        cache.write(key, cond)
    except TypeError as error:
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in cond.items())
        raise ValueError(f"This text encoder's conditioning cannot be stored: {error}. It holds {kinds}. "
                         "Encode the captions with ComfyUI's own nodes and give their CONDITIONING to the Train node.") from error


def encode_pictures(plans: list[Plan], vae: Vae, cache: Cache, work: Work, ground) -> list[EncodedItem]:
    """Writes every latent and mask that is not on disk."""
    opening = (lambda p=p: opened(p, ground) if missing(p, cache) else None for p in plans)
    with closing(ahead(opening)) as pictures:
        return [encode_record(p, picture, vae, cache, work, ground) for p, picture in zip(plans, pictures, strict=True)]


def ahead(tasks: Iterable[Callable[[], object]], count: int = AHEAD) -> Iterator:
    """What the tasks return, in order. One thread works on the next `count` of them while a result is used, and on no more."""
    with ThreadPoolExecutor(1, "trainyard-open") as thread:
        waiting = deque()
        try:
            for task in tasks:
                waiting.append(thread.submit(task))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def encode_record(p: Plan, picture: Image.Image | None, vae: Vae, cache: Cache, work: Work, ground) -> EncodedItem:
    """picture: None where nothing was missing when it would have been opened."""
    name = Path(p.record.path).name
    work.may_go_on()
    for key, mirrored in missing(p, cache):
        work.step(0, name)
        work.may_go_on()
        picture = picture or opened(p, ground)
        cache.write(key, posterior(ImageOps.mirror(picture) if mirrored else picture, vae, name))
    shape = latent_shape(cache, p.latent)
    mask = mask_key(p.record, p.placement, shape[-2:])
    if mask and cache.shapes(mask) is None:
        cache.write(mask, {"mask": encode_mask(p, shape)})
    work.step(1, name)
    return item(p, shape, mask)


def opened(p: Plan, ground) -> Image.Image:
    """The picture as its bucket shows it."""
    return fit(open_image(p.record, ground), p.placement)


def missing(p: Plan, cache: Cache) -> list[tuple[str, bool]]:
    """[(key, mirrored)] of the latents that are not on disk."""
    wanted = [(key, mirrored) for key, mirrored in ((p.latent, False), (p.flipped, True)) if key]
    return [(key, mirrored) for key, mirrored in wanted if latent_shape(cache, key) is None]


def latent_shape(cache: Cache, key: str) -> tuple[int, ...] | None:
    return (cache.shapes(key) or {}).get("mean")


def posterior(picture: Image.Image, vae: Vae, name: str) -> dict:
    """{"mean": (C, ..., h, w), "std": the same or None}"""
    mean, std = vae.encode(pixels(picture))
    if not torch.isfinite(mean).all() or (std is not None and not torch.isfinite(std).all()):
        raise ValueError(f"The VAE turned {name} into NaN or infinity. Run it in more exact arithmetic: start ComfyUI with --fp32-vae.")
    return {"mean": mean[0], "std": None if std is None else std[0]}


def pixels(picture: Image.Image) -> Tensor:
    """(1, H, W, channels) in 0..1"""
    array = np.asarray(picture, dtype=np.float32) / 255.0
    return torch.from_numpy(array.reshape(1, picture.height, picture.width, -1))


def encode_mask(p: Plan, shape) -> Tensor:
    """(1, h, w) in 0..1"""
    return latent_mask(pixels(fit(open_mask(p.record), p.placement))[..., 0], *shape[-2:])


def item(p: Plan, shape, mask) -> EncodedItem:
    left, top = p.placement.crop
    right = p.placement.scaled[0] - p.placement.bucket[0] - left  # what is cut off on the right is cut off on the left of a mirror
    sizes = [sizes_of(p, crop_w, top) for crop_w in (left, right)]
    return EncodedItem(p.record.id, p.record.path, p.latent, shape, p.caption_keys, p.captions, p.placement.bucket, p.flipped,
                       sizes[0], sizes[1] if p.flipped else {}, p.record.repeats, mask, p.record.pair, p.record.strength, p.record.score)


def sizes_of(p: Plan, crop_w: int, crop_h: int) -> dict[str, int]:
    """SDXL's size conditioning: the picture's own size, what was cropped after scaling, the size trained on."""
    (width, height), (target_width, target_height) = p.record.frame, p.placement.bucket
    return dict(width=width, height=height, crop_w=crop_w, crop_h=crop_h, target_width=target_width, target_height=target_height)


def channels(items: list[EncodedItem]) -> int:
    counts = sorted({i.shape[0] for i in items})
    if len(counts) > 1:
        raise ValueError(f"The VAE gave latents of {' and '.join(map(str, counts))} channels. Empty the cache folder and encode again.")
    return counts[0]
