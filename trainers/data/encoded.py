"""What training sees of a dataset: latents and conditionings, drawn in batches of one shape.

Everything a step chooses (which images, mirrored or not, which caption, the sample of the VAE's posterior) comes from
the generator that it is given. Tensors come from a store when they are needed, so memory does not grow with the
dataset.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..protocols import BatchElements, ReadingAhead, TensorTreeStore
from .cache import MemoryStore, map_tensors

# Keys of a conditioning, in the words of ComfyUI.
REFERENCE_LATENTS = "reference_latents"  # latents of images that an edit model is shown
CONCAT_IMAGE, CONCAT_MASK = "concat_latent_image", "concat_mask"  # what stands beside the noise, channel by channel
CLIP_VISION_OUTPUT = "clip_vision_output"  # an image as CLIP vision sees it
IMAGE_KEYS = (REFERENCE_LATENTS, CONCAT_IMAGE, CONCAT_MASK, CLIP_VISION_OUTPUT)
SIZE_CONDITIONING = ("width", "height", "crop_w", "crop_h", "target_width", "target_height")
IMAGE_CONDITIONING = (*SIZE_CONDITIONING, *IMAGE_KEYS)


def image_conditioning(cond: dict) -> dict:
    """What of a conditioning comes from an image and not from its text: size, and what a model is shown."""
    return {k: v for k, v in cond.items() if k in IMAGE_CONDITIONING}


@dataclass(frozen=True)
class EncodedItem:
    """One image. Keys name values in the store; pixels are (width, height)."""

    id: str
    path: str
    latent: str  # key of {"mean": (C, ..., h, w), "std": the same or None}
    shape: tuple[int, ...]  # (C, ..., h, w)
    caption_keys: tuple[str, ...]
    captions: tuple[str, ...]
    bucket: tuple[int, int] | None = None  # pixels trained on; None where only latents were given
    flipped: str | None = None  # latent of the mirrored image
    size: dict[str, int] = field(
        default_factory=dict
    )  # width, height, crop_w, crop_h, target_width, target_height in pixels
    flipped_size: dict[str, int] = field(default_factory=dict)
    repeats: int = 1
    mask: str | None = None  # key of {"mask": (1, h, w)}, 1 = counts
    pair: str | None = None  # see pairs.py
    strength: float | None = None
    score: float | None = None  # the user's rating
    controls: tuple[str, ...] = ()  # latents of the control images
    flipped_controls: tuple[str, ...] = ()  # the same of the mirrored ones
    empty_key: str | None = None  # of the empty caption, where its conditioning is the image's own
    control_numel: int = 0  # numbers in the latents of all control images
    holes: tuple[str, ...] = ()  # keys of {"image": (C, ..., h, w) with a hole, "mask": packed, "width": pixels of it}
    flipped_holes: tuple[str, ...] = ()  # the same of the mirrored image
    full_hole: str | None = None  # the same where the hole is all of the image
    first: str | None = None  # entries of its conditioning that an image-to-video model is given of the first frame
    flipped_first: str | None = None
    frames: int = 1  # of the clip, before the VAE
    # the control images, (1, H, W, 3) in 0..1
    open_controls: Callable[[], list[Tensor]] | None = field(default=None, compare=False)

    def keys_to_read(self) -> list[str]:
        """What a draw of this item needs of the store, as far as it is known before the draw: one of several captions
        or holes is not."""
        captions, holes = (keys if len(keys) == 1 else () for keys in (self.caption_keys, self.holes))
        shown = *self.controls, *self.flipped_controls, *holes, self.first, self.flipped_first
        known = [self.latent, self.flipped, self.mask, *captions, *shown]
        return [key for key in known if key is not None]


@dataclass
class Batch:
    x0: Tensor  # (B, C, ..., h, w) fp32, unscaled, as the VAE gives it
    conds: list[
        dict
    ]  # one dict of tensors (batch of 1), numbers and text per sample; tensors are shared, do not write into them
    captions: list[str]
    mask: Tensor | None  # (B, 1, ..., h, w), 1 = counts
    index: list[int]
    dropped: list[bool] = field(default_factory=list)  # whether the caption gave way to the empty one


@dataclass
class EncodedDataset:
    """A dataset ready for training. `store.load(key)` gives a latent, a conditioning or a mask."""

    items: list[EncodedItem]
    store: TensorTreeStore
    channels: int
    fingerprint: str  # changes with the images, the captions, every setting and the models that encoded them
    empty_key: str | None = None  # key of the empty caption's conditioning
    dropout: float = 0.0
    trigger: str = ""  # the word that stands for [trigger] in captions and sample prompts
    image_reader: str = ""  # how the text encoder read control images beside the captions; "" where it did not
    full_masks: float = 0.0  # share of draws in which an image with holes is all hole
    loss_in_holes: bool = False  # the loss counts in the hole that was drawn, and no image has a mask of its own for it

    def __post_init__(self):
        if self.dropout and self.empty_key is None:
            raise ValueError(
                f"dropout is {self.dropout}, and nothing was given for the empty caption. Give it, or set dropout to 0."
            )

    def __len__(self) -> int:
        return len(self.items)

    def make_batch(self, picks: Sequence[int], rng: torch.Generator) -> Batch:
        """The items at these indices, which must have latents of one shape."""
        draws = torch.rand(len(picks), 3, generator=rng).tolist()
        flips = [self.items[i].flipped is not None and coin < 0.5 for i, (coin, _, _) in zip(picks, draws, strict=True)]
        captions = [self.choose_caption(self.items[i], *rest) for i, (_, *rest) in zip(picks, draws, strict=True)]
        x0 = torch.stack([self.sample_latent(self.items[i], flip, rng) for i, flip in zip(picks, flips, strict=True)])
        sizes = [
            self.items[i].flipped_size if flip else self.items[i].size for i, flip in zip(picks, flips, strict=True)
        ]
        controls = [self.load_controls(self.items[i], flip) for i, flip in zip(picks, flips, strict=True)]
        holes = [self.load_hole(self.choose_hole(self.items[i], f, rng)) for i, f in zip(picks, flips, strict=True)]
        conds = [
            {**self.store.load(key), **size, **control, **hole}
            for (key, _), size, control, hole in zip(captions, sizes, controls, holes, strict=True)
        ]
        mask = self.stack_masks(picks, flips, holes, x0)
        empty = [key == self.empty_key_of(self.items[i]) for i, (key, _) in zip(picks, captions, strict=True)]
        return Batch(x0, conds, [caption for _, caption in captions], mask, list(picks), empty)

    def empty_key_of(self, item: EncodedItem) -> str | None:
        """The empty caption's conditioning for this image."""
        return item.empty_key or self.empty_key

    def empty_conds(self, batch: Batch) -> list[dict]:
        """The conditionings of a batch with the empty caption in place of its own. There must be one."""
        keys = [self.empty_key_of(self.items[i]) for i in batch.index]
        return [
            {**self.store.load(str(key)), **image_conditioning(cond)}
            for key, cond in zip(keys, batch.conds, strict=True)
        ]

    def read_ahead(self, picks: Sequence[int]) -> None:
        """Begins to read what the items at these indices need, where the store can: they come next."""
        if isinstance(self.store, ReadingAhead):
            self.store.read_ahead(dict.fromkeys(key for pick in picks for key in self.items[pick].keys_to_read()))

    def choose_caption(self, item: EncodedItem, which: float, drop: float) -> tuple[str, str]:
        """(key, text) of one of the item's captions or of the empty one; both numbers are uniform in [0, 1)."""
        if not item.caption_keys:
            self.require_conditionings()
        if self.empty_key is not None and drop < self.dropout:  # without that key dropout is 0
            return str(self.empty_key_of(item)), ""
        index = int(which * len(item.caption_keys))
        return item.caption_keys[index], item.captions[index]

    def named_conds(self) -> Iterator[tuple[str, dict]]:
        """(where it is from, for a person; conditioning) of all that a batch may hold. Each is loaded when it is asked
        for, once."""
        seen: set[tuple[str, bool, bool, bool]] = set()
        empty = [self.empty_key] if self.empty_key is not None and self.dropout else []
        for number, item in enumerate(self.items, 1):
            for key in (*item.caption_keys, *empty):
                if (about := (key, bool(item.controls), bool(item.holes), bool(item.first))) in seen:
                    continue
                seen.add(about)
                name = "the empty caption" if key == self.empty_key else item.path or f"latent {number}"
                yield f"the conditioning of {name}", {**self.store.load(key), **self.load_images(item)}

    def require_conditionings(self) -> None:
        """ValueError where the images were encoded without a text encoder."""
        if self.empty_key is None and not all(item.caption_keys for item in self.items):
            raise ValueError(
                "These images were encoded without CLIP, which is enough for score models and for nothing else: "
                "there is no conditioning to train under, not even the empty one. Connect CLIP to Encode Dataset."
            )

    def sample_latent(self, item: EncodedItem, flip: bool, rng: torch.Generator) -> Tensor:
        """(C, ..., h, w): a sample of the VAE's posterior, or its mean where that is all there is."""
        posterior = self.store.load(item.flipped if flip and item.flipped is not None else item.latent)
        mean = posterior["mean"].float()
        if posterior["std"] is None:
            return mean
        return mean + posterior["std"].float() * torch.randn(mean.shape, generator=rng)

    def load_controls(self, item: EncodedItem, flip: bool = False) -> dict[str, list[Tensor]]:
        """What an item's conditioning holds beside the text, as the host's nodes write it: {"reference_latents": [(1,
        C, ..., h, w)]} of its control images, and what an image-to-video model is given of the first frame."""
        keys, first = (item.flipped_controls, item.flipped_first) if flip else (item.controls, item.first)
        references = {REFERENCE_LATENTS: [self.store.load(key)["mean"].float()[None] for key in keys]} if keys else {}
        return {**references, **(self.store.load(first) if first else {})}

    def choose_hole(self, item: EncodedItem, flip: bool, rng: torch.Generator) -> str | None:
        """The key of one of the item's holes; None where it has none, and then nothing is drawn."""
        if not item.holes:
            return None
        which, full = torch.rand(2, generator=rng).tolist()
        keys = item.flipped_holes if flip else item.holes
        return item.full_hole if item.full_hole and full < self.full_masks else keys[int(which * len(keys))]

    def load_hole(self, key: str | None) -> dict[str, Tensor]:
        """{"concat_latent_image": (1, C, ..., h, w), "concat_mask": (1, 1, H, W)} as the host's
        InpaintModelConditioning writes them into a conditioning; empty without a key."""
        if key is None:
            return {}
        from .inpaint_masks import unpack_mask

        hole = self.store.load(key)
        return {CONCAT_IMAGE: hole["image"].float()[None], CONCAT_MASK: unpack_mask(hole["mask"], hole["width"])}

    def load_shown(self, item: EncodedItem) -> dict:
        """The conditioning of an item's first caption, with what a model is shown beside it: control images, or the
        image with its first hole."""
        return {**self.store.load(item.caption_keys[0]), **self.load_images(item)}

    def load_images(self, item: EncodedItem) -> dict:
        return {**self.load_controls(item), **self.load_hole(next(iter(item.holes), None))}

    def stack_masks(self, picks, flips, holes, x0: Tensor) -> Tensor | None:
        """(B, 1, ..., h, w): where the loss counts, which is not what the model is told; None: everywhere."""
        if self.loss_in_holes:
            found = [mask_to_latent_grid(hole[CONCAT_MASK][0], *x0.shape[-2:]) for hole in holes]
        elif all(self.items[i].mask is None for i in picks):
            return None
        else:
            found = [self.load_mask(self.items[i], flip) for i, flip in zip(picks, flips, strict=True)]
        if any(mask.ndim == 4 for mask in found):  # a mask for each latent frame
            found = [mask.view(1, -1, *mask.shape[-2:]).expand(1, *x0.shape[2:]) for mask in found]
        stacked = torch.stack(found)
        return stacked.view(len(picks), *[1] * (x0.ndim - stacked.ndim), *stacked.shape[1:])

    def load_mask(self, item: EncodedItem, flip: bool) -> Tensor:
        """(1, h, w), or (1, T, h, w) where each frame has its own."""
        if item.mask is None:
            return torch.ones(1, *item.shape[-2:])
        mask = self.store.load(item.mask)["mask"]
        return mask.flip(-1) if flip else mask

    @classmethod
    def from_core(cls, latents, conditioning, empty=None, dropout: float = 0.0) -> EncodedDataset:
        """From ComfyUI's own LATENT[] ({"samples", "noise_mask"}) and CONDITIONING[] ([[tensor, extras], ...]).

        Stacks are split into single samples; one conditioning may serve them all. `empty` is a CONDITIONING for caption
        dropout."""
        with torch.inference_mode(False):  # nodes run in inference mode, and autograd refuses tensors made there
            return encoded_from_core(latents, conditioning, empty, dropout)


def encoded_from_core(latents, conditioning, empty, dropout) -> EncodedDataset:
    conds = [cond for entry in conditioning for cond in split_conditioning(entry)]
    samples = [sample for number, latent in enumerate(latents) for sample in split_latent(latent, number)]
    if len(conds) not in (1, len(samples)) or not samples:
        raise ValueError(
            f"{len(samples)} latents and {len(conds)} conditionings do not pair up. Give one conditioning for each "
            "latent, or a single one for all of them."
        )
    if len({sample.shape[0] for sample, _ in samples}) > 1:
        counts = sorted({sample.shape[0] for sample, _ in samples})
        raise ValueError(
            f"The latents have {' and '.join(map(str, counts))} channels. Encode all images with the same VAE."
        )
    store = MemoryStore({f"cond/{i}": cond for i, cond in enumerate(conds)})
    items = [make_core_item(store, i, i if len(conds) > 1 else 0, *pair) for i, pair in enumerate(samples)]
    if empty is not None:
        store["empty"] = split_conditioning(empty)[0]
    print_ = content_hash([dict(store), len(items), dropout])
    return EncodedDataset(items, store, samples[0][0].shape[0], print_, "empty" if empty is not None else None, dropout)


def make_core_item(store: MemoryStore, index: int, cond: int, sample: Tensor, mask: Tensor | None) -> EncodedItem:
    latent, mask_key = f"latent/{index}", None
    store[latent] = {"mean": sample, "std": None}
    if mask is not None:
        mask_key = f"mask/{index}"
        store[mask_key] = {"mask": mask_to_latent_grid(mask, *sample.shape[-2:])}
    return EncodedItem(str(index), "", latent, tuple(sample.shape), (f"cond/{cond}",), ("",), mask=mask_key)


def split_latent(latent: dict, number: int) -> list[tuple[Tensor, Tensor | None]]:
    """[(sample (C, ..., h, w), mask (1, H, W) or None)] of one LATENT."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, Tensor) or samples.ndim < 3:
        found = f"a tensor of shape {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(
            f"Latent {number} holds {found}; training needs (batch, channels, height, width), (batch, channels, "
            "frames, height, width), or (batch, channels, length) for sound."
        )
    samples = samples.detach().cpu().clone()
    mask = latent.get("noise_mask")
    if mask is None:
        return [(sample, None) for sample in samples]
    if samples.ndim == 3:
        raise ValueError(
            f"Latent {number} has no height and width, and a noise_mask, which is of images. Remove Set Latent Noise "
            "Mask."
        )
    if not isinstance(mask, Tensor) or mask.ndim < 2 or not torch.isfinite(mask).all():
        raise ValueError(f"The noise_mask of latent {number} is no mask: numbers from 0 to 1, of shape (..., H, W).")
    mask = mask.detach().cpu().float().reshape(-1, 1, *mask.shape[-2:])
    if black := [index for index, one in enumerate(mask) if not one.any()]:
        raise ValueError(
            f"The noise_mask of latent {number} is black everywhere in sample {black[0] + 1} of {len(mask)}, so "
            "nothing of it would be learnt. White is what is learnt; remove the mask, or paint it anew."
        )
    if len(mask) not in (1, len(samples)):
        raise ValueError(
            f"Latent {number} has {len(samples)} samples and {len(mask)} masks. Give one mask per sample, or one for "
            "all."
        )
    return [(sample, mask[i % len(mask)]) for i, sample in enumerate(samples)]


def split_conditioning(conditioning) -> list[dict]:
    """One cond dict (batch of 1) per row of each [tensor, extras] pair."""
    conds = []
    for pair in conditioning:
        cross_attn, extras = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
        if not isinstance(cross_attn, Tensor) or not isinstance(extras, dict):
            raise ValueError("The conditioning is not pairs of a tensor and its extras; connect a CONDITIONING.")
        whole = map_tensors({**extras, "cross_attn": cross_attn}, lambda tensor: tensor.detach().cpu().clone())
        conds += [conditioning_row(whole, i, len(cross_attn)) for i in range(len(cross_attn))]
    return conds


def conditioning_row(cond: dict, index: int, count: int) -> dict:
    """Row `index` of a cond of `count` rows: tensors with as many rows are cut, all else is common to them."""
    return map_tensors(cond, lambda t: t[index : index + 1].clone() if count > 1 and t.ndim and len(t) == count else t)


def mask_to_latent_grid(mask: Tensor, height: int, width: int) -> Tensor:
    """(1, H, W) -> (1, height, width): the mean over the area of each latent cell."""
    return F.interpolate(mask[None].float(), (height, width), mode="area")[0]


def content_hash(tree) -> str:
    """32 hex digits over every tensor's bytes and everything around them."""
    digest = hashlib.blake2b(digest_size=16)

    def add(tensor):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())

    digest.update(repr(map_tensors(tree, add)).encode())
    return digest.hexdigest()


class BucketBatchSampler:
    """Batches of item indices with equal latent shape, without replacement: in one epoch each item comes `repeats`
    times.

    The last batch of a shape may be smaller. The state is a seed and a position, so a resumed run draws the same
    cards."""

    def __init__(self, data: BatchElements, batch: int):
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1.")
        self.batch_size, self.indices_by_shape = batch, {}
        self.data = data
        for index, item in enumerate(data.items):
            self.indices_by_shape.setdefault(item.shape, []).extend([index] * item.repeats)
        if not any(self.indices_by_shape.values()):
            raise ValueError(
                f"The dataset has {len(data.items)} images and every one is repeated 0 times. Give it images to learn "
                "from."
            )
        self.seed, self.position, self.epoch, self.epoch_batches = None, 0, 0, []

    def __len__(self) -> int:
        """Batches in one epoch."""
        return sum(-(-len(cards) // self.batch_size) for cards in self.indices_by_shape.values())

    def next_batch(self, rng: torch.Generator) -> list[int]:
        """The next batch; rng is asked only when a new epoch is dealt. What the batch after it needs is read while this
        one is trained on."""
        if self.position == len(self.epoch_batches):
            self.seed, self.position, self.epoch = int(torch.randint(2**62, (1,), generator=rng)), 0, self.epoch + 1
            self.epoch_batches = self.shuffle_epoch(self.seed)
        self.position += 1
        if isinstance(self.data, EncodedDataset) and self.position < len(self.epoch_batches):
            self.data.read_ahead(self.epoch_batches[self.position])
        return list(self.epoch_batches[self.position - 1])

    def shuffle_epoch(self, seed: int) -> list[list[int]]:
        rng = torch.Generator().manual_seed(seed)
        batches = []
        for cards in self.indices_by_shape.values():
            mixed = shuffle_list(cards, rng)
            batches += [mixed[i : i + self.batch_size] for i in range(0, len(mixed), self.batch_size)]
        return shuffle_list(batches, rng)

    def state(self) -> dict:
        return {"seed": self.seed, "position": self.position, "epoch": self.epoch, "batches": len(self)}

    def load_state(self, state: dict) -> None:
        if state["batches"] != len(self):
            raise ValueError(
                f"The saved run drew {state['batches']} batches per epoch and this one draws {len(self)}: the dataset "
                "or the batch size has changed. Put them back, or start a run with a new name."
            )
        self.seed, self.position, self.epoch = state["seed"], state["position"], state["epoch"]
        self.epoch_batches = [] if self.seed is None else self.shuffle_epoch(self.seed)


def shuffle_list(values: list, rng: torch.Generator) -> list:
    return [values[i] for i in torch.randperm(len(values), generator=rng).tolist()]


def most_common_bucket(data: EncodedDataset) -> tuple[int, int] | None:
    """The size that most images are trained at, pixels (width, height); None where only latents were given."""
    buckets = Counter(item.bucket for item in data.items if item.bucket)
    return buckets.most_common(1)[0][0] if buckets else None
