"""The same picture more than once: saved anew, resized, brightened, mirrored, or hardly changed.

Pictures are compared by a 64-bit perceptual hash of their coarse shapes (Zauner 2010, as ImageHash computes it), by their coarse
colours, and by features of a vision model where one is given. Groups are transitive: a copy of a copy belongs to the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ...settings import Settings, choice, number, switch
from ..readers import printable
from ..records import Dataset, Record
from ..sheets import BAD, GOOD, WARN, Tile, thumbnail
from .colour import rgb_to_lab
from .sharpness import enlargement, tile_sharpness
from .thumbnails import Looking, looked

SIDE, LOW = 32, 8  # px of the reduced picture; its lowest 8 x 8 frequencies make the hash
GRID = 4  # coarse colours: 4 x 4 cells
PLAIN = 2.0  # grey levels of spread; below it a hash is only noise
RECOLOURED = 15.0  # mean distance in a*b*; the same shapes in other colours are another picture
BLOCK = 1024
FLAG, DROP = "flag", "drop"
KEEP_OWN, ADD = "keep its own", "add those of the copies"


@dataclass(frozen=True, kw_only=True)
class DuplicateSettings(Settings):
    """What counts as the same picture, and what happens to the copies."""

    duplicates: str = choice(DROP, (DROP, FLAG), "drop: only the best of each group stays. flag: all stay, the copies are marked.")
    max_bits: int = number(10, 0, 20, "Pictures whose hashes differ in at most this many of 64 bits are the same. 15 also finds light crops.",
                           unit="bits")
    mirrored: bool = switch(True, "Mirror images count as the same picture.")
    min_cosine: float = number(0.95, 0.5, 1.0, "With a clip_vision: pictures whose features are at least this alike are the same, also "
                               "when one is a crop of the other.", step=0.005)
    captions: str = choice(KEEP_OWN, (KEEP_OWN, ADD), "Whether the picture that stays also takes over the captions of its copies, as alternatives.")


@dataclass(frozen=True)
class Print:
    """What one picture is recognised by."""

    hash: int
    mirrored: int  # the hash of the mirror image
    spread: float  # grey levels; how much there is to recognise
    colours: np.ndarray  # (GRID, GRID, 2), a* and b*


@dataclass(frozen=True)
class Pair:
    """Records first < second that are the same picture."""

    first: int
    second: int
    why: str


@dataclass(frozen=True)
class Group:
    """Records that are one picture; the rest are copies of `best`. Indices into the dataset."""

    best: int
    rest: tuple[int, ...]
    why: dict[int, str]  # of each of the rest: the figure that ties it to the group


# -- recognising -----------------------------------------------------------------------------------------------------------------


def fingerprint(picture: Image.Image) -> Print:
    small = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0))
    grey = small @ np.array([0.299, 0.587, 0.114])
    low = cosines() @ grey @ cosines().T
    colours = rgb_to_lab(small.reshape(GRID, SIDE // GRID, GRID, SIDE // GRID, 3).mean((1, 3)).round())[..., 1:]
    return Print(bits(low), bits(low * np.where(np.arange(LOW) % 2, -1, 1)), float(grey.std()), colours)


@lru_cache(maxsize=1)
def cosines() -> np.ndarray:
    """The lowest rows of the discrete cosine transform. Mirroring a picture turns the sign of its odd columns."""
    return np.cos(np.pi / SIDE * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5))


def bits(low) -> int:
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def popcount(values: np.ndarray) -> np.ndarray:
    """Set bits of each uint64."""
    if hasattr(np, "bitwise_count"):  # from numpy 2
        return np.bitwise_count(values)
    return np.unpackbits(values[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.uint8)


def near(prints: Sequence[Print], limit: int, mirrored: bool = True) -> list[Pair]:
    """The pairs at most `limit` bits apart, plain pictures and other colours left out."""
    if len(prints) < 2:
        return []
    plain, flipped = (np.array([getattr(p, name) for p in prints], np.uint64) for name in ("hash", "mirrored"))
    telling = np.array([p.spread >= PLAIN for p in prints])
    found = []
    for way, other in (("", plain), ("mirrored, ", flipped))[: 1 + mirrored]:
        for first, second, apart in closest(plain, other, limit, telling):
            if recoloured(prints[first], prints[second], bool(way)) < RECOLOURED:
                found.append((apart, Pair(first, second, f"{way}{apart} bits <= {limit}")))
    best = {}
    for _, pair in sorted(found, key=lambda pair: pair[0]):
        best.setdefault((pair.first, pair.second), pair)
    return [best[key] for key in sorted(best)]


def closest(hashes, others, limit, telling) -> Iterable[tuple[int, int, int]]:
    """(i, j, bits) with i < j, block by block so that memory stays flat."""
    for top in range(0, len(hashes), BLOCK):
        apart = popcount(hashes[top : top + BLOCK, None] ^ others[None, top:])
        rows, columns = np.nonzero(apart <= limit)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            if row < column and telling[top + row] and telling[top + column]:
                yield top + row, top + column, int(apart[row, column])


def recoloured(one: Print, other: Print, mirrored: bool) -> float:
    colours = other.colours[:, ::-1] if mirrored else other.colours
    return float(np.linalg.norm(one.colours - colours, axis=-1).mean())


def alike(features: np.ndarray | None, least: float) -> list[Pair]:
    """The pairs of normalised features (n, d) with a cosine of at least `least`; rows of zeros are unknown."""
    found = []
    for top in range(0, 0 if features is None else len(features), BLOCK):
        cosine = features[top : top + BLOCK] @ features[top:].T
        for row, column in np.argwhere(cosine >= least).tolist():
            if row < column:
                found.append(Pair(top + row, top + column, f"cosine {cosine[row, column]:.3f} >= {least:g}"))
    return found


def identical(records: Sequence[Record]) -> list[Pair]:
    """The same bytes, cut out at the same place."""
    first, found = {}, []
    for index, record in enumerate(records):
        before = first.setdefault((record.id, record.crop), index)
        if before != index:
            found.append(Pair(before, index, "the same file"))
    return found


def grouped(pairs: Iterable[Pair], order) -> list[Group]:
    """Groups of everything that is tied together, in the order of their best members. order(index): the smallest is the best."""
    parent, why = {}, {}

    def root(index):
        while parent.setdefault(index, index) != index:
            parent[index] = index = parent[parent[index]]
        return index

    for pair in pairs:
        why.setdefault(pair.first, []).append(pair)
        why.setdefault(pair.second, []).append(pair)
        parent[max(root(pair.first), root(pair.second))] = min(root(pair.first), root(pair.second))
    members = {}
    for index in parent:
        members.setdefault(root(index), []).append(index)
    groups = []
    for found in members.values():
        best, *rest = sorted(found, key=order)
        groups.append(Group(best, tuple(rest), {index: reason(why[index], best) for index in rest}))
    return sorted(groups, key=lambda group: group.best)


def reason(pairs, best) -> str:
    """The figure against the best one, else against whoever ties this one to the group."""
    return next((pair.why for pair in pairs if best in (pair.first, pair.second)), pairs[0].why)


# -- choosing --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What the choice among copies needs to know of one picture."""

    print: Print
    detail: float  # megapixels that are really there
    sharpness: float


def see(record: Record, picture: Image.Image, mask=None) -> Seen:
    grey = picture.convert("L")
    factor = enlargement(np.asarray(grey))
    grey.thumbnail((512, 512), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return Seen(fingerprint(picture), real_detail(picture.size, factor), tile_sharpness(np.asarray(grey, np.float32)))


def real_detail(size, factor) -> float:
    """Megapixels, less what an enlargement added. A factor under 1.5 is within its own error, a third; above, that third goes against
    the picture, so that a blown-up copy never beats its original."""
    return size[0] * size[1] / 1e6 / ((4 / 3 * factor) ** 2 if factor >= 1.5 else 1.0)


def preference(record: Record, detail: float, sharpness: float, index: int):
    """Sort key: the largest first, then the sharpest, then those with captions, then the earliest. Sharpness counts in steps of 1.4:
    the noise of a JPEG is no detail."""
    return -round(detail, 2), -round(2 * math.log2(1 + sharpness)), not any(record.captions), index


@dataclass(frozen=True)
class Deduplicated:
    dataset: Dataset
    groups: tuple[tuple[Record, tuple[tuple[Record, str], ...]], ...]  # (kept, ((copy, why), ...))
    broken: tuple[tuple[str, str], ...]  # (path, reason)

    def report(self) -> str:
        copies = sum(len(rest) for _, rest in self.groups)
        lines = [f"{copies} copies of {len(self.groups)} pictures found; {len(self.dataset)} pictures go on."]
        for best, rest in self.groups:
            lines.append(f"- {shown(best)}: " + "; ".join(f"{shown(copy)} ({why})" for copy, why in rest))
        return "\n".join(lines + [f"- {printable(Path(path).name)} could not be compared: {reason}" for path, reason in self.broken])


def deduplicate(dataset: Dataset, settings: DuplicateSettings, looking: Looking = Looking()) -> Deduplicated:  # noqa: B008 - frozen
    """The dataset with one picture of each group, the copies dropped or flagged. Pictures that cannot be read stay as they are."""
    seen, features, broken = looked(dataset.records, see, looking)
    known = [index for index, value in enumerate(seen) if value is not None]
    prints = [seen[index].print for index in known]
    pairs = [replace(pair, first=known[pair.first], second=known[pair.second]) for pair in near(prints, settings.max_bits, settings.mirrored)]
    groups = grouped(
        [*identical(dataset.records), *pairs, *alike(features, settings.min_cosine)],
        lambda index: preference(dataset[index], *((seen[index].detail, seen[index].sharpness) if seen[index] else (0.0, 0.0)), index),
    )
    return Deduplicated(without_copies(dataset, groups, settings), tuple(named(dataset, group) for group in groups),
                        tuple((dataset[index].path, why) for index, why in sorted(broken.items())))  # fmt: skip


def named(dataset, group):
    return dataset[group.best], tuple((dataset[index], group.why[index]) for index in group.rest)


def without_copies(dataset: Dataset, groups: Sequence[Group], settings: DuplicateSettings) -> Dataset:
    records, dropped = list(dataset.records), {}
    for group in groups:
        best = records[group.best]
        if settings.captions == ADD:
            captions = [caption for index in (group.best, *group.rest) for caption in dataset[index].captions]
            records[group.best] = replace(best, captions=tuple(dict.fromkeys(captions)))
        for index in group.rest:
            flag = f"duplicate (of {shown(best)}, {group.why[index]})"
            dropped[index] = flag
            records[index] = replace(records[index], flags=tuple(dict.fromkeys((*records[index].flags, flag))))
    if settings.duplicates == FLAG:
        return replace(dataset, records=tuple(records))
    kept = tuple(record for index, record in enumerate(records) if index not in dropped)
    return Dataset(kept, (*dataset.skipped, *((dataset[index].path, dropped[index]) for index in sorted(dropped))))


def shown(record: Record) -> str:
    return printable(Path(record.path).name)


def tiles(found: Deduplicated, limit: int = 60) -> list[Tile]:
    """The groups one after another: what stays in green, its copies beside it."""
    result = []
    for number_, (best, rest) in enumerate(found.groups, 1):
        result.append(tile(best, f"{number_}: stays", GOOD))
        result += [tile(copy, f"{number_}: {why}", BAD if copy not in found.dataset.records else WARN) for copy, why in rest]
        if len(result) >= limit:
            break
    return result[:limit]


def tile(record: Record, line: str, colour: str) -> Tile:
    try:
        picture = thumbnail(record)
    except (ValueError, OSError):  # gone or broken: its group says so in words
        picture = Image.new("RGB", (8, 8), "#000000")
    return Tile(picture, (line, f"{record.frame[0]}x{record.frame[1]} {shown(record)}"), colour)
