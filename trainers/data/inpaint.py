"""The images with holes of a dataset, encoded ahead: an inpainting model is shown the latent of an image whose hole is
grey, so a hole that was drawn anew in every step would need the VAE beside the model in every step.

A few holes for each image are drawn by the seed and the image alone, and a step takes one of them. All of them are
names in the cache, so a run that is continued sees the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from ..rng import derive_generator
from ..settings import INPAINT_NONE, LOSS_OF_INPAINT, MASK_OF_DATASET, InpaintSettings, compute_fingerprint
from .buckets import resize_and_crop
from .cache import DiskCache
from .encode import (
    ENCODING_VERSION,
    EncodingPlan,
    EncodingProgress,
    HolePlan,
    VaeProtocol,
    encode_latent,
    open_bucketed_image,
)
from .images import image_to_batch_tensor
from .inpaint_masks import cut_hole, draw_mask, list_mask_kinds, pack_mask, threshold_mask
from .metadata import format_count, format_first_names
from .records import open_mask

if TYPE_CHECKING:
    from .records import ImageDataset


def check_inpaint_inputs(dataset: ImageDataset, inpaint: InpaintSettings, text) -> None:
    """ValueError where no hole can be drawn, or where it would say nothing."""
    kinds = inpaint.mask_kinds()
    if kinds and text is None:
        raise ValueError(
            f"inpaint_masks is {inpaint.inpaint_masks!r}, and no CLIP is connected: a score model sees whole images. "
            f"Choose {INPAINT_NONE!r}, or connect CLIP to train an inpainting model."
        )
    if not kinds and inpaint.loss_masks == LOSS_OF_INPAINT:
        raise ValueError(
            f"loss_masks is {LOSS_OF_INPAINT!r} and inpaint_masks is {INPAINT_NONE!r}, so there is no hole for the "
            "loss. Choose masks for inpaint_masks, or another loss_masks."
        )
    clips = [Path(record.path).name for record in dataset if record.clip is not None]
    if kinds and clips:
        raise ValueError(
            f"inpaint_masks is {inpaint.inpaint_masks!r}, and {len(clips)} of {len(dataset)} are clips, such as "
            f"{clips[0]}: holes are cut into images alone. Leave the clips out, or choose {INPAINT_NONE!r}."
        )
    bare = [Path(record.path).name for record in dataset if record.mask is None]
    if MASK_OF_DATASET in kinds and bare and (len(kinds) == 1 or len(bare) == len(dataset)):
        raise ValueError(
            f"inpaint_masks is {inpaint.inpaint_masks!r}, and {len(bare)} of {format_count(dataset, 'image')} have no "
            f"mask: {format_first_names(bare)}. Give each a mask in Load Dataset (white is the hole), or choose boxes "
            "or strokes."
        )


def plan_holes(plan: EncodingPlan, inpaint: InpaintSettings, vae: VaeProtocol, seed: int) -> EncodingPlan:
    """The plan with the holes of its image, and without its loss mask where the settings say so."""
    record = plan.record
    rng = derive_generator("inpaint", seed, record.id)
    kinds = list_mask_kinds(inpaint, rng, record.mask is not None)
    holes = tuple(make_hole_plan(plan, kind, number, seed) for number, kind in enumerate(kinds))
    full = compute_fingerprint("full hole", ENCODING_VERSION, plan.placement.bucket, vae.identity)
    return replace(
        plan,
        holes=holes,
        full_hole=full if holes and inpaint.full_masks else None,
        has_loss_mask=inpaint.loss_masks == MASK_OF_DATASET,
    )


def make_hole_plan(plan: EncodingPlan, kind: str, number: int, seed: int) -> HolePlan:
    record = plan.record
    mask = [record.mask_id, record.mask == record.path] if kind == MASK_OF_DATASET else [number, seed, record.id]
    key = lambda latent: compute_fingerprint("hole", ENCODING_VERSION, latent, kind, mask)
    return HolePlan(kind, number, seed, key(plan.latent), plan.flipped and key(plan.flipped))


def make_mask(plan: EncodingPlan, hole: HolePlan) -> np.ndarray:
    """(H, W) bool, as large as the bucket."""
    if hole.kind == MASK_OF_DATASET and (opened := open_mask(plan.record)) is not None:
        return threshold_mask(resize_and_crop(opened, plan.placement))
    rng = derive_generator("inpaint", hole.seed, plan.record.id, hole.number)
    return draw_mask(hole.kind, plan.placement.bucket, rng)


def require_holes(plans: list[EncodingPlan], cache: DiskCache, check_interrupt=None) -> None:
    """ValueError that names the images whose own mask has no white in it: there would be nothing to fill."""
    black = []
    for p in plans:
        for hole in p.holes:
            if check_interrupt:
                check_interrupt()
            is_new = hole.kind == MASK_OF_DATASET and cache.read_shapes(hole.key) is None
            if is_new and not make_mask(p, hole).any():
                black.append(Path(p.record.path).name)
    if black:
        raise ValueError(
            f"{format_count(black, 'mask')} that should be the hole of an image {'is' if len(black) == 1 else 'are'} "
            f"black in all that is trained: {format_first_names(black)}. White is the hole. Paint these masks anew, or "
            "choose boxes or strokes for inpaint_masks; a mask may also lie in a part that the bucket cuts off."
        )


def list_missing_holes(plan: EncodingPlan, cache: DiskCache) -> list[tuple[str, HolePlan | None, bool]]:
    """[(key, hole or None for all of the image, mirrored)] of what is not on disk."""
    wanted = [(key, hole, key == hole.flipped) for hole in plan.holes for key in (hole.key, hole.flipped) if key]
    whole = [(plan.full_hole, None, False)] if plan.full_hole else []
    return [(key, hole, mirrored) for key, hole, mirrored in (*wanted, *whole) if cache.read_shapes(key) is None]


def write_missing_holes(
    plan: EncodingPlan,
    frames: Sequence[Image.Image] | None,
    vae: VaeProtocol,
    cache: DiskCache,
    work: EncodingProgress,
    ground,
) -> None:
    """frames: see `write_missing_latents`."""
    name, image = Path(plan.record.path).name, frames[0] if frames else None
    for key, hole, mirrored in list_missing_holes(plan, cache):
        work.advance(0, name)
        work.raise_if_interrupted()
        image = image or open_bucketed_image(plan, ground)
        mask = np.ones(image.size[::-1], bool) if hole is None else make_mask(plan, hole)
        shown = image_to_batch_tensor(ImageOps.mirror(image) if mirrored else image)
        mask = np.ascontiguousarray(mask[:, ::-1]) if mirrored else mask
        latent = encode_latent(cut_hole(shown, mask), vae, name)["mean"]
        cache.write(key, {"image": latent, "mask": pack_mask(mask), "width": mask.shape[1]})
