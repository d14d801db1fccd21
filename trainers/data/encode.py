"""From a dataset to latents and conditionings: each image and clip through the VAE once, each text through the text
encoder once.

What is on disk already is not encoded again, so a stopped encode continues where it was. While the VAE works on one
image a thread opens the next ones; no more than those are in memory. Images go through the VAE one by one: a batch
would round otherwise, and what is in the cache would depend on its neighbours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..settings import LOSS_OF_INPAINT, InpaintSettings, compute_fingerprint
from .buckets import BucketPlacement, BucketSettings, place_control, place_records, resize_and_crop
from .cache import DiskCache, map_tensors
from .caption_variants import (
    CAPTION_MODE_EMPTY,
    CAPTION_MODE_TEXT,
    PRECISION_BF16,
    TRIGGER_PLACEHOLDER,
    CaptionSettings,
    caption_variants,
    has_trigger_placeholder,
    make_record_rng,
)
from .captions.caption_lengths import require_readable_length
from .captions.literal import has_prompt_syntax
from .encoded import EncodedDataset, EncodedItem, mask_to_latent_grid
from .file_endings import is_video_path
from .images import image_to_batch_tensor
from .metadata import format_count, format_first_names
from .readers import require_captions
from .records import WHITE, ImageDataset, ImageRecord, open_image, open_mask

ENCODING_VERSION = 1  # in every key: raise it when the same inputs would give other tensors
CONTROL_STEP_CELLS = 2  # latent cells: networks take them two by two (patches)
PREFETCH_IMAGES = 2  # images that are opened while the VAE works on another
TaskResultT = TypeVar("TaskResultT")


class VaeProtocol(Protocol):
    identity: str  # hash of the weights
    factor: int  # pixels per latent cell, along a side

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, 3) in 0..1 -> mean and std (B, C, ..., h, w) of the unscaled latent; std None where there is no
        posterior. A VAE with a time axis takes them as the frames of one clip."""
        ...

    def fit_frames(self, frames: int) -> int:
        """The largest number of frames up to this one that its latents can hold; 1 where they have no time axis. Asked
        only for clips."""
        ...


class FirstFrameProtocol(Protocol):
    """What an image-to-video model is given beside the text: made from the first frame of each clip."""

    identity: str

    def make_condition(self, first: Tensor, frames: int) -> dict:
        """The entries of a conditioning (tensors, batch of 1) for a first frame (1, H, W, 3) in 0..1 of a clip of so
        many frames."""
        ...


class TextEncoderProtocol(Protocol):
    identity: str

    def encode(self, texts: list[str]) -> list[dict]:
        """One cond per text, read literally: cross_attn (1, T, D), pooled_output (1, P), and whatever else the model
        wants."""
        ...

    def encode_with_images(self, text: str, images: list[Tensor]) -> dict:
        """The cond of a text whose encoder also sees images (1, H, W, 3) in 0..1; asked only where `image_reader` says
        how."""
        ...

    @property
    def image_reader(self) -> str:
        """How the encoder reads control images beside the text; empty where it does not."""
        ...

    def count_tokens(self, text: str) -> Mapping[str, int]:
        """Encoder -> tokens of the text, without start, end and padding."""
        ...

    def on_device(self) -> AbstractContextManager[object]:
        """The encoder stays where it computes while inside."""
        ...


class RoundingTextEncoder:
    """A text encoder whose embeddings of tokens are rounded to what bf16 can hold, so that the cache needs half the
    bytes; their type stays. A model that runs in bf16 rounds them so in every step."""

    def __init__(self, encoder: TextEncoderProtocol):
        self.encoder, self.identity = encoder, compute_fingerprint(PRECISION_BF16, encoder.identity)
        self.image_reader = encoder.image_reader

    def encode(self, texts: list[str]) -> list[dict]:
        return [map_tensors(cond, round_token_embeddings) for cond in self.encoder.encode(texts)]

    def encode_with_images(self, text: str, images: list[Tensor]) -> dict:
        return map_tensors(self.encoder.encode_with_images(text, images), round_token_embeddings)

    def count_tokens(self, text: str) -> Mapping[str, int]:
        return self.encoder.count_tokens(text)

    def on_device(self) -> AbstractContextManager[object]:
        return self.encoder.on_device()


def round_token_embeddings(tensor: Tensor) -> Tensor:
    """A tensor (1, T, D) rounded to bf16, in its own type; pooled embeddings and masks as they are."""
    return tensor.to(torch.bfloat16).to(tensor.dtype) if tensor.ndim > 2 and tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class HolePlan:
    """An image with one of its holes, see inpaint.py."""

    kind: str  # of InpaintSettings.mask_kinds
    number: int  # among the holes of its image
    seed: int
    key: str
    flipped: str | None  # of the mirrored image, whose hole is mirrored too


@dataclass(frozen=True)
class EncodingPlan:
    """What is to be encoded for one record, or for one of its control images."""

    record: ImageRecord
    placement: BucketPlacement
    captions: tuple[str, ...]
    latent: str
    flipped: str | None
    caption_keys: tuple[str, ...]
    controls: tuple[EncodingPlan, ...] = ()
    empty_key: str | None = None  # of the empty caption, where the text encoder sees the control images beside it
    holes: tuple[HolePlan, ...] = ()
    full_hole: str | None = None
    has_loss_mask: bool = True  # where the record has a mask
    first: str | None = None  # what an image-to-video model is given of the first frame
    flipped_first: str | None = None

    def list_texts(self) -> list[tuple[str, str]]:
        """[(key, text)] of all that the text encoder reads for this record."""
        own = zip(self.caption_keys, self.captions, strict=True)
        return [*own, *([(self.empty_key, "")] if self.empty_key else [])]


@dataclass
class EncodingProgress:
    """The counter that the screen sees, and the way out."""

    total: int
    report: Callable[[int, int, str], None] | None
    check_interrupt: Callable[[], None] | None
    done: int = 0

    def advance(self, count: int, text: str):
        self.done += count
        if self.report:
            self.report(self.done, self.total, text)

    def raise_if_interrupted(self):
        if self.check_interrupt:
            self.check_interrupt()


def encode_dataset(
    dataset: ImageDataset,
    captions: CaptionSettings,
    buckets: BucketSettings,
    flip: bool,
    vae: VaeProtocol,
    text: TextEncoderProtocol | None,
    cache_dir,
    report=None,
    check_interrupt=None,
    *,
    seed: int = 0,
    ground=WHITE,
    inpaint: InpaintSettings | None = None,
    first_frame: FirstFrameProtocol | None = None,
) -> EncodedDataset:
    """The dataset as latents and conditionings, kept in cache_dir.

    flip: the mirrored images are encoded too. report(done, total, text); check_interrupt() raises to stop, losing
    nothing.
    seed: of the shuffled captions and the inpaint masks. ground: the colour (red, green, blue) beneath transparent
    images. inpaint: None for no holes.
    text: None for images without any conditioning, as score models need them; the caption mode must be the empty
    one. first_frame: for image-to-video models, what each clip's conditioning holds of its first frame."""
    check_encoding_inputs(dataset, captions, buckets, vae)
    inpaint = inpaint or InpaintSettings()
    is_inpainting = bool(inpaint.mask_kinds()) or inpaint.loss_masks != InpaintSettings().loss_masks
    if is_inpainting:
        from .inpaint import check_inpaint_inputs, plan_holes, require_holes

        check_inpaint_inputs(dataset, inpaint, text)
    if text is None:
        return encode_without_text(
            dataset, captions, buckets, flip, vae, DiskCache(cache_dir), report, check_interrupt, ground
        )
    if captions.text_precision == PRECISION_BF16:
        text = RoundingTextEncoder(text)
    plans = [
        plan_first_frame(plan_record_encoding(record, captions, placement, flip, vae, text, seed, ground), first_frame)
        for record, placement in place_records(dataset, buckets)
    ]
    require_readable_texts(plans, captions.trigger, text, check_interrupt)
    cache = DiskCache(cache_dir)
    if is_inpainting:
        plans = [plan_holes(p, inpaint, vae, seed) for p in plans]
        require_holes(plans, cache, check_interrupt)
    require_trained_pixels(plans, vae.factor, cache, check_interrupt)
    require_unmirrored_texts(plans, text)
    empty_key = caption_key("", text)
    texts: dict[str, tuple[str, EncodingPlan | None]] = {empty_key: ("", None)}
    for p in plans:
        texts |= {key: (caption, p if text.image_reader and p.controls else None) for key, caption in p.list_texts()}
    work = EncodingProgress(len(texts) + len(plans), report, check_interrupt)
    encode_texts(texts, text, cache, work, ground)
    items = encode_images(plans, vae, cache, work, ground, first_frame)
    print_ = compute_fingerprint(
        ENCODING_VERSION,
        dataset.fingerprint(),
        captions,
        buckets,
        bool(flip),
        vae.identity,
        text.identity,
        seed,
        list(ground),
        *list_reading_changes(dataset, [caption for caption, _ in texts.values()]),
        *([text.image_reader] if text.image_reader and any(p.controls for p in plans) else []),
        *([inpaint] if is_inpainting else []),
        *(["first frame", first_frame.identity] if first_frame else []),
    )
    return EncodedDataset(
        items,
        cache,
        count_latent_channels(items),
        print_,
        empty_key,
        captions.dropout,
        captions.trigger.strip(),
        text.image_reader if any(p.controls for p in plans) else "",
        inpaint.full_masks,
        inpaint.loss_masks == LOSS_OF_INPAINT,
    )


def encode_without_text(
    dataset, captions, buckets, flip, vae, cache, report, check_interrupt, ground
) -> EncodedDataset:
    if captions.caption_mode != CAPTION_MODE_EMPTY:
        raise ValueError(
            f"The caption mode is {captions.caption_mode!r} and no CLIP is connected to encode captions with. Connect "
            f"CLIP, or choose {CAPTION_MODE_EMPTY!r} for a score model."
        )
    plans = [
        plan_image_encoding(record, placement, flip, vae, ground)
        for record, placement in place_records(dataset, buckets)
    ]
    require_trained_pixels(plans, vae.factor, cache, check_interrupt)
    items = encode_images(plans, vae, cache, EncodingProgress(len(plans), report, check_interrupt), ground)
    print_ = compute_fingerprint(
        ENCODING_VERSION, "without text", dataset.fingerprint(), buckets, bool(flip), vae.identity, list(ground)
    )
    return EncodedDataset(items, cache, count_latent_channels(items), print_)


def check_encoding_inputs(dataset, captions, buckets, vae):
    if not len(dataset):
        raise ValueError("The dataset has no images. Load a folder with images first.")
    if buckets.step % vae.factor:
        raise ValueError(
            f"step is {buckets.step} px and this VAE makes one latent cell of {vae.factor} px. Choose a step that is a "
            f"multiple of {vae.factor}."
        )
    for record in dataset:
        if record.bucket and (min(record.bucket) < 1 or any(side % vae.factor for side in record.bucket)):
            raise ValueError(
                f"{Path(record.path).name} is to be trained at {record.bucket[0]}x{record.bucket[1]} px and this VAE "
                f"makes one latent cell of {vae.factor} px. Bucket the dataset with a step that is a multiple of "
                f"{vae.factor}."
            )
    require_cut_clips(dataset)
    require_fitting_frames(dataset, vae)
    if captions.caption_mode == CAPTION_MODE_TEXT and not captions.trigger.strip():
        require_captions(dataset)
        check_trigger_placeholders(dataset)


def require_cut_clips(dataset: ImageDataset) -> None:
    whole = [Path(record.path).name for record in dataset if record.video and not record.clip]
    if whole:
        raise ValueError(
            f"{format_count(whole, 'video')} of the dataset {'is' if len(whole) == 1 else 'are'} not cut into clips: "
            f"{format_first_names(whole)}. Connect Cut Clips between Load Dataset and this node, which chooses "
            "their frames; or take them out of the folder to train on its images alone."
        )


def require_fitting_frames(dataset: ImageDataset, vae: VaeProtocol) -> None:
    """ValueError for clips that the VAE would cut, or takes for many images."""
    for frames in sorted({record.frames for record in dataset if record.clip and record.frames > 1}):
        fitting = vae.fit_frames(frames)
        if fitting == 1:
            raise ValueError(
                f"The clips have {frames} frames, and this VAE encodes single images: it belongs to a model that makes "
                "images. Load a video model with its VAE, or set frames to 1 in Cut Clips to train on single frames."
            )
        if fitting != frames:
            above = next(more for more in range(frames + 1, 2 * frames + 64) if vae.fit_frames(more) == more)
            raise ValueError(
                f"The clips have {frames} frames, and this VAE's latents hold {fitting} or {above} of them. Set frames "
                f"to {fitting} or {above} in Cut Clips."
            )


def check_trigger_placeholders(dataset):
    """ValueError for captions that wait for a trigger."""
    waiting = [Path(record.path).name for record in dataset if any(map(has_trigger_placeholder, record.captions))]
    if waiting:
        raise ValueError(
            f"{len(waiting)} of {len(dataset)} captions say {TRIGGER_PLACEHOLDER}, for example that of {waiting[0]}, "
            "and trigger is empty. Write the word that stands for it into trigger, or remove "
            f"{TRIGGER_PLACEHOLDER} from the captions."
        )


def require_readable_texts(plans: list[EncodingPlan], trigger: str, text: TextEncoderProtocol, check_interrupt) -> None:
    """ValueError for the trigger or the first caption that is too long to be trained with."""
    require_readable_length(
        trigger, "The trigger", text.count_tokens, "A trigger is a word or two; write what the image shows in captions."
    )
    remedy = "Shorten it, for example with the line 'truncate: 225' in Edit Captions."
    for plan in plans:
        if check_interrupt:
            check_interrupt()
        for caption in plan.captions:
            require_readable_length(caption, f"The caption of {Path(plan.record.path).name}", text.count_tokens, remedy)


def require_unmirrored_texts(plans: list[EncodingPlan], text: TextEncoderProtocol) -> None:
    """ValueError where mirrored images would be learnt under texts that were read beside the unmirrored ones."""
    if text.image_reader and any(p.flipped and p.controls for p in plans):
        raise ValueError(
            f"flip is on, and this text encoder sees the control images ({text.image_reader}): it would see them "
            "unmirrored. Turn flip off, or add mirrored copies to the dataset."
        )


def require_trained_pixels(plans: list[EncodingPlan], factor: int, cache: DiskCache, check_interrupt=None) -> None:
    """ValueError that names the images whose mask leaves nothing of them: a step on one would teach nothing. The other
    masks are in the cache afterwards. factor: pixels of a latent cell."""
    black = []
    for p in plans:
        if check_interrupt:
            check_interrupt()
        if p.has_loss_mask and p.record.mask is not None and is_mask_black(p, factor, cache):
            black.append(Path(p.record.path).name)
    if black:
        raise ValueError(
            f"The {'mask of 1 image is' if len(black) == 1 else f'masks of {len(black)} images are'} black in all that "
            f"is trained, so nothing of {'it' if len(black) == 1 else 'them'} would be learnt: "
            f"{format_first_names(black)}. White is what is learnt. Paint the masks anew, remove them, or leave these "
            "images out; a mask may also lie in a part that the bucket cuts off."
        )


def is_mask_black(p: EncodingPlan, factor: int, cache: DiskCache) -> bool:
    """Whether the mask is 0 in all of the bucket. One that is not goes into the cache, under the cells that the latent
    has or is expected to have, so that it is opened once. A mask video waits until the frames of the latent are
    known."""
    width, height = p.placement.bucket
    known = cached_latent_shape(cache, p.latent)
    shape = known or (1, height // factor, width // factor)
    key = mask_key(p.record, p.placement, shape)
    if key is None:
        return False
    if known is None and has_mask_video(p.record):
        return all(resize_and_crop(mask, p.placement).getbbox() is None for mask in open_masks(p.record))
    if cache.read_shapes(key) is not None:
        return not cache.load(key)["mask"].any()
    if (mask := encode_latent_mask(p, shape)) is None:
        return False
    if not mask.any():
        return True
    cache.write(key, {"mask": mask})
    return False


def open_masks(record: ImageRecord) -> Iterator[Image.Image]:
    """The mask of a record in L, as large as its image; of a clip that has a mask video, the mask of each frame."""
    if has_mask_video(record):
        from .videos import open_mask_frames

        yield from (mask.crop(record.crop) if record.crop else mask for mask in open_mask_frames(record))
    elif (mask := open_mask(record)) is not None:
        yield mask


def has_mask_video(record: ImageRecord) -> bool:
    return record.clip is not None and record.mask is not None and is_video_path(Path(record.mask))


def plan_record_encoding(record, captions, placement, flip, vae, text, seed, ground) -> EncodingPlan:
    told = caption_variants(record, captions, make_record_rng(record, seed))
    plan = plan_image_encoding(record, placement, flip, vae, ground)
    seen = describe_seen_images(plan, ground) if text.image_reader else ()
    keys = tuple(caption_key(caption, text, seen) for caption in told)
    empty = caption_key("", text, seen) if seen and captions.dropout else None
    return replace(plan, captions=told, caption_keys=keys, empty_key=empty)


def plan_first_frame(plan: EncodingPlan, first_frame: FirstFrameProtocol | None) -> EncodingPlan:
    """The plan with what an image-to-video model is given."""
    if first_frame is None:
        return plan
    first, flipped = (
        key and compute_fingerprint("first frame", ENCODING_VERSION, key, first_frame.identity)
        for key in (plan.latent, plan.flipped)
    )
    return replace(plan, first=first, flipped_first=flipped)


def describe_seen_images(plan: EncodingPlan, ground) -> list:
    """What makes the control images of a record what they are, for the keys of texts that are read beside them."""
    return [[p.record.pixels_id, p.record.crop, vars(p.placement), list(ground)] for p in plan.controls]


def plan_image_encoding(record, placement, flip, vae, ground) -> EncodingPlan:
    keys = [latent_key(record, placement, mirrored, vae, ground) for mirrored in (False, True)]
    controls = tuple(
        plan_image_encoding(
            record.control_record(control),
            place_control(control, record, placement, CONTROL_STEP_CELLS * vae.factor),
            flip,
            vae,
            ground,
        )
        for control in record.controls
    )
    return EncodingPlan(record, placement, (), keys[0], keys[1] if flip else None, (), controls)


def latent_key(record, placement, mirrored, vae, ground) -> str:
    return compute_fingerprint(
        "latent", ENCODING_VERSION, record.pixels_id, record.crop, vars(placement), mirrored, vae.identity, list(ground)
    )


def caption_key(caption, text, seen=()) -> str:
    """`seen`: see `describe_seen_images`."""
    beside = [text.image_reader, list(seen)] if seen else []
    return compute_fingerprint(
        "caption", ENCODING_VERSION, caption, text.identity, *list_literal_marks([caption]), *beside
    )


def list_literal_marks(texts: Iterable[str]) -> list[str]:
    """A mark in the keys of texts that were once read as prompts, with weights; what was encoded then is not used."""
    return ["literal"] if any(map(has_prompt_syntax, texts)) else []


def list_reading_changes(dataset: ImageDataset, texts: Iterable[str]) -> list[str]:
    """What is read otherwise than it once was, so that a run trained before is not taken for this one."""
    placed = any(has_trigger_placeholder(caption) for record in dataset for caption in record.captions)
    return list_literal_marks(texts) + (["placed trigger"] if placed else [])


def mask_key(record, placement, shape) -> str | None:
    """shape: (C, ..., h, w) of the latent."""
    if record.mask is None:
        return None
    alpha, cells, clip = record.mask == record.path, list(shape[-2:]), []
    if has_mask_video(record):
        cells, clip = list(shape[1:]), [vars(record.clip)]
    return compute_fingerprint(
        "mask", ENCODING_VERSION, record.mask_id, alpha, record.crop, vars(placement), cells, *clip
    )


def encode_texts(
    texts: dict[str, tuple[str, EncodingPlan | None]],
    text: TextEncoderProtocol,
    cache: DiskCache,
    work: EncodingProgress,
    ground,
) -> None:
    """Writes the conditioning of every caption that is not on disk, one by one: each can be the last before an
    interrupt. texts: key -> (caption, the record whose control images the encoder sees beside it)."""
    missing = [key for key in texts if cache.read_shapes(key) is None]
    work.advance(len(texts) - len(missing), "captions")
    with text.on_device() if missing else nullcontext():
        for key in missing:
            work.raise_if_interrupted()
            caption, seen = texts[key]
            if seen is None:
                (cond,) = text.encode([caption])
            else:
                cond = text.encode_with_images(caption, open_control_images(seen, ground))
            write_conditioning(cache, key, cond)
            work.advance(1, "captions")


def write_conditioning(cache, key, cond: dict) -> None:
    try:
        cache.write(key, cond)
    except TypeError as error:
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in cond.items())
        raise ValueError(
            f"This text encoder's conditioning cannot be stored: {error}. It holds {kinds}. Encode the captions with "
            "ComfyUI's own nodes and give their CONDITIONING to the Train node."
        ) from error


def encode_images(
    plans: list[EncodingPlan],
    vae: VaeProtocol,
    cache: DiskCache,
    work: EncodingProgress,
    ground,
    first_frame: FirstFrameProtocol | None = None,
) -> list[EncodedItem]:
    """Writes every latent, hole, mask and first frame that is not on disk."""
    opening = (lambda p=p: open_bucketed_frames(p, ground) if is_incomplete(p, cache) else None for p in plans)
    with closing(prefetch_results(opening)) as opened:
        items = [
            encode_record(p, frames, vae, cache, work, ground, first_frame)
            for p, frames in zip(plans, opened, strict=True)
        ]
    opening = [partial(open_control_images, p, ground) if p.controls else None for p in plans]
    return [replace(item, open_controls=opened) for item, opened in zip(items, opening, strict=True)]


def is_incomplete(p: EncodingPlan, cache: DiskCache) -> bool:
    """Whether the image is to be seen by the VAE, whole or with a hole."""
    if list_missing_latents(p, cache):
        return True
    if not p.holes:
        return False
    from .inpaint import list_missing_holes

    return bool(list_missing_holes(p, cache))


def prefetch_results(
    tasks: Iterable[Callable[[], TaskResultT]], count: int = PREFETCH_IMAGES
) -> Generator[TaskResultT, None, None]:
    """What the tasks return, in order. One thread works on the next `count` of them while a result is used, and on no
    more."""
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


def encode_record(
    p: EncodingPlan,
    frames: list[Image.Image] | None,
    vae: VaeProtocol,
    cache: DiskCache,
    work: EncodingProgress,
    ground,
    first_frame: FirstFrameProtocol | None = None,
) -> EncodedItem:
    """frames: None where nothing was missing when they would have been opened."""
    work.raise_if_interrupted()
    write_missing_latents(p, frames, vae, cache, work, ground)
    for control in p.controls:
        write_missing_latents(control, None, vae, cache, work, ground)
    if p.holes:
        from .inpaint import write_missing_holes

        write_missing_holes(p, frames, vae, cache, work, ground)
    if first_frame is not None:
        write_missing_first_frames(p, frames, first_frame, cache, work, ground)
    shape = require_latent_shape(cache, p.latent)
    mask = mask_key(p.record, p.placement, shape) if p.has_loss_mask else None
    if mask and cache.read_shapes(mask) is None and (cells := encode_latent_mask(p, shape)) is not None:
        cache.write(mask, {"mask": cells})
    work.advance(1, Path(p.record.path).name)
    return make_encoded_item(p, shape, mask, cache)


def write_missing_latents(
    p: EncodingPlan,
    frames: list[Image.Image] | None,
    vae: VaeProtocol,
    cache: DiskCache,
    work: EncodingProgress,
    ground,
) -> None:
    """Those of an image, a clip or a control image that are not on disk. frames: its own, where they were opened
    before."""
    name = Path(p.record.path).name
    for key, mirrored in list_missing_latents(p, cache):
        work.advance(0, name)
        work.raise_if_interrupted()
        frames = frames or open_bucketed_frames(p, ground)
        cache.write(key, encode_posterior(mirror_frames(frames) if mirrored else frames, vae, name))


def write_missing_first_frames(
    p: EncodingPlan,
    frames: list[Image.Image] | None,
    first_frame: FirstFrameProtocol,
    cache: DiskCache,
    work: EncodingProgress,
    ground,
) -> None:
    """What an image-to-video model is given of a clip, where it is not on disk."""
    for key, mirrored in ((p.first, False), (p.flipped_first, True)):
        if key is None or cache.read_shapes(key) is not None:
            continue
        work.raise_if_interrupted()
        first = frames[:1] if frames else [next(iterate_bucketed_frames(p, ground))]
        pixels = frames_to_tensor(mirror_frames(first) if mirrored else first)
        cache.write(key, first_frame.make_condition(pixels, p.record.frames if p.record.clip else 1))


def mirror_frames(frames: Sequence[Image.Image]) -> list[Image.Image]:
    return [ImageOps.mirror(frame) for frame in frames]


def open_bucketed_frames(p: EncodingPlan, ground) -> list[Image.Image]:
    """The image, or the frames of the clip, as the bucket shows them."""
    return list(iterate_bucketed_frames(p, ground))


def iterate_bucketed_frames(p: EncodingPlan, ground) -> Iterator[Image.Image]:
    if p.record.clip is None:
        yield open_bucketed_image(p, ground)
        return
    from .videos import open_clip_frames

    yield from (resize_and_crop(frame, p.placement) for frame in open_clip_frames(p.record, ground))


def frames_to_tensor(frames: Sequence[Image.Image]) -> Tensor:
    """(F, H, W, 3) in 0..1 of images of one size."""
    return torch.cat([image_to_batch_tensor(frame) for frame in frames])


def open_bucketed_image(p: EncodingPlan, ground) -> Image.Image:
    """The image as its bucket shows it."""
    return resize_and_crop(open_image(p.record, ground), p.placement)


def open_control_images(p: EncodingPlan, ground) -> list[Tensor]:
    """[(1, H, W, 3)] in 0..1, as their buckets show them."""
    return [image_to_batch_tensor(open_bucketed_image(control, ground)) for control in p.controls]


def list_missing_latents(p: EncodingPlan, cache: DiskCache) -> list[tuple[str, bool]]:
    """[(key, mirrored)] of the latents that are not on disk."""
    wanted = [(key, mirrored) for key, mirrored in ((p.latent, False), (p.flipped, True)) if key]
    return [(key, mirrored) for key, mirrored in wanted if cached_latent_shape(cache, key) is None]


def cached_latent_shape(cache: DiskCache, key: str) -> tuple[int, ...] | None:
    return (cache.read_shapes(key) or {}).get("mean")


def require_latent_shape(cache: DiskCache, key: str) -> tuple[int, ...]:
    """The same of a latent that was written before; ValueError where it is gone."""
    shape = cached_latent_shape(cache, key)
    if shape is None:
        raise ValueError(cache.describe_lost_file(key))
    return shape


def encode_posterior(frames: Sequence[Image.Image], vae: VaeProtocol, name: str) -> dict:
    """{"mean": (C, ..., h, w), "std": the same or None} of an image, or of the frames of a clip."""
    return encode_latent(frames_to_tensor(frames), vae, name)


def encode_latent(frames: Tensor, vae: VaeProtocol, name: str) -> dict:
    """The same of (F, H, W, 3) in 0..1."""
    mean, std = vae.encode(frames)
    if not torch.isfinite(mean).all() or (std is not None and not torch.isfinite(std).all()):
        raise ValueError(
            f"The VAE turned {name} into NaN or infinity. Run it at higher precision: start ComfyUI with --fp32-vae."
        )
    return {"mean": mean[0], "std": None if std is None else std[0]}


def encode_latent_mask(p: EncodingPlan, shape) -> Tensor | None:
    """(1, h, w) in 0..1; (1, T, h, w) of a mask video; None without a mask. shape: of the latent."""
    masks = [
        mask_to_latent_grid(image_to_batch_tensor(resize_and_crop(mask, p.placement)), *shape[-2:])
        for mask in open_masks(p.record)
    ]
    if not masks:
        return None
    return mean_over_latent_frames(torch.cat(masks), shape[1])[None] if has_mask_video(p.record) else masks[0]


def mean_over_latent_frames(frames: Tensor, cells: int) -> Tensor:
    """(F, ...) -> (cells, ...): of video VAEs the first latent frame holds the first frame, and each later one as many
    as there are for it."""
    if cells == 1:
        return frames[:1]
    groups = frames[1:].tensor_split(cells - 1)
    return torch.stack([frames[0], *(group.mean(0) for group in groups)])


def make_encoded_item(p: EncodingPlan, shape, mask, cache: DiskCache) -> EncodedItem:
    left, top = p.placement.crop
    right = (
        p.placement.scaled[0] - p.placement.bucket[0] - left
    )  # what is cut off on the right is cut off on the left of a mirror
    sizes = [size_conditioning(p, crop_w, top) for crop_w in (left, right)]
    return EncodedItem(
        p.record.id,
        p.record.path,
        p.latent,
        shape,
        p.caption_keys,
        p.captions,
        p.placement.bucket,
        p.flipped,
        sizes[0],
        sizes[1] if p.flipped else {},
        p.record.repeats,
        mask,
        p.record.pair,
        p.record.strength,
        p.record.score,
        tuple(control.latent for control in p.controls),
        tuple(control.flipped for control in p.controls if control.flipped),
        p.empty_key,
        sum(math.prod(require_latent_shape(cache, control.latent)) for control in p.controls),
        tuple(hole.key for hole in p.holes),
        tuple(hole.flipped for hole in p.holes if hole.flipped),
        p.full_hole,
        p.first,
        p.flipped_first,
        p.record.frames if p.record.clip else 1,
    )


def size_conditioning(p: EncodingPlan, crop_w: int, crop_h: int) -> dict[str, int]:
    """SDXL's size conditioning: the image's own size, what was cropped after scaling, the size trained on."""
    (width, height), (target_width, target_height) = p.record.cropped_size, p.placement.bucket
    return dict(
        width=width, height=height, crop_w=crop_w, crop_h=crop_h, target_width=target_width, target_height=target_height
    )


def count_latent_channels(items: list[EncodedItem]) -> int:
    counts = sorted({i.shape[0] for i in items})
    if len(counts) > 1:
        raise ValueError(
            f"The VAE gave latents of {' and '.join(map(str, counts))} channels. Empty the cache folder and encode "
            "again."
        )
    return counts[0]
