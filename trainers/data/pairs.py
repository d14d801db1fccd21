"""Images that belong together: the same scene at different strengths of one attribute.

A record's `pair` names the scene and its `strength` the side: +1 and -1, or graded as 2, 1, -1, -2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .encoded import EncodedDataset
from .records import ImageDataset, ImageRecord


@dataclass(frozen=True)
class ImagePair:
    """The items of one scene. `index_by_strength`: strength -> index of the encoded item; a strength and its opposite
    are always both there."""

    name: str
    index_by_strength: dict[float, int]
    latent: tuple[int, ...]  # (C, ..., h, w)
    repeats: int = 1

    @property
    def shape(self) -> tuple:
        """Pairs of one batch have latents of one shape, and the same strengths."""
        return self.latent, self.strengths

    @property
    def strengths(self) -> tuple[float, ...]:
        return tuple(sorted(self.index_by_strength, reverse=True))

    @property
    def magnitudes(self) -> tuple[float, ...]:
        return tuple(sorted({abs(strength) for strength in self.index_by_strength}))


def pair_datasets(
    positive: ImageDataset, negative: ImageDataset, strength: float = 1.0, others: ImageDataset | None = None
) -> ImageDataset:
    """Both datasets as one, images of the same file name (its ending aside) as the two sides of a scene. `others`:
    pairs at other strengths.

    The two sides are trained at the same size: the negative image takes the bucket of the positive one.
    Raises ValueError naming the images without a partner, and pairs of different shape."""
    sides = [index_records_by_stem(positive, "positive"), index_records_by_stem(negative, "negative")]
    lonely = sorted(sides[0].keys() ^ sides[1].keys())
    if lonely or not sides[0]:
        raise ValueError(
            f"{len(positive)} positive and {len(negative)} negative images do not pair up: "
            f"{format_unpaired_images(lonely, sides)}. Give both images of a pair the same file name, in two "
            "folders."
        )
    for name in sides[0]:
        require_same_aspect(name, sides[0][name], sides[1][name])
    records = [
        replace(side[name], pair=name, strength=sign * strength)
        for sign, side in ((1, sides[0]), (-1, sides[1]))
        for name in side
    ]
    before = others or ImageDataset(())
    if twice := sorted({(r.pair, r.strength) for r in before} & {(r.pair, r.strength) for r in records}):
        raise ValueError(
            f"The pair {twice[0][0]!r} has an image at strength {twice[0][1]:g} already. Give each grade a strength "
            "of its own."
        )
    return ImageDataset((*before.records, *records), (*before.skipped, *positive.skipped, *negative.skipped))


def index_records_by_stem(dataset: ImageDataset, side: str) -> dict[str, ImageRecord]:
    """Record by file name without its ending. ValueError for two images of one name."""
    found: dict[str, ImageRecord] = {}
    for record in dataset:
        name = Path(record.path).stem
        if name in found:
            raise ValueError(
                f"Two {side} images are named {name!r}: {found[name].path} and {record.path}. Rename one of each pair."
            )
        found[name] = record
    return found


def format_unpaired_images(lonely, sides) -> str:
    if not lonely:
        return "there are none"
    shown = [f"{name} (only {'positive' if name in sides[0] else 'negative'})" for name in lonely[:5]]
    return f"{len(lonely)} have no partner, {', '.join(shown)}{', ...' if len(lonely) > 5 else ''}"


def require_same_aspect(name, one: ImageRecord, other: ImageRecord) -> None:
    (w, h), (v, g) = one.cropped_size, other.cropped_size
    if abs(w * g - v * h) > 0.02 * w * g:
        raise ValueError(
            f"The pair {name!r} has images of different shape, {w}x{h} and {v}x{g} px: the change cannot be "
            "separated from the crop. Crop both alike."
        )


def collect_image_pairs(data: EncodedDataset) -> list[ImagePair]:
    """The pairs among encoded items. Raises ValueError for items without a pair, sides without their opposite, and
    unequal latents."""
    scenes: dict[str, dict[float, int]] = {}
    for index, item in enumerate(data.items):
        if item.pair is None or not item.strength:
            raise ValueError(
                f"{item.path or f'picture {index}'} belongs to no pair. Put Image Pairs between Load Dataset and "
                "Encode Dataset."
            )
        scenes.setdefault(item.pair, {})[item.strength] = index
    return [make_image_pair(name, at, data) for name, at in scenes.items()]


def make_image_pair(name, at, data) -> ImagePair:
    if alone := [s for s in at if -s not in at]:
        raise ValueError(
            f"The pair {name!r} has an image at strength {alone[0]:g} and none at {-alone[0]:g}. Give both sides."
        )
    items = [data.items[index] for index in at.values()]
    shapes = {item.shape for item in items}
    if len(shapes) > 1:
        sizes = ", ".join(f"{item.path} {item.bucket}" for item in items)
        raise ValueError(
            f"The images of the pair {name!r} fell into different buckets: {sizes}. Crop them alike, or use the "
            "same size."
        )
    return ImagePair(name, at, shapes.pop(), max(item.repeats for item in items))
