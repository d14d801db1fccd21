"""Which images share a frame and where they stand in it: sizes in, a plan out, before any image is opened.

A pattern is learnt relative to the frame that the model sees, so every image spans its frame from end to end along
one axis and is neither stretched nor enlarged. All sizes and boxes are in pixels; sizes are (width, height), boxes
(left, top, right, bottom).
"""

from __future__ import annotations

import heapq
import math
import random
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

from ...settings import Settings, choice_field, number_field, switch_field, text_field

COLLAGE_AUTO, LAYOUT_COLUMNS, LAYOUT_ROWS, LAYOUT_SINGLE, LAYOUT_GRID = COLLAGE_LAYOUTS = (
    "auto",
    "columns",
    "rows",
    "single",
    "grid",
)
CAPTIONS_POSITIONAL, CAPTIONS_JOINED, CAPTIONS_SHARED, CAPTIONS_EMPTY = COLLAGE_CAPTION_MODES = (
    "positional",
    "joined",
    "shared + differences",
    "empty",
)
CONTRAST_OFF, CONTRAST_WARN, CONTRAST_DROP = ("off", "warn", "drop")
MIN_FRAME_AREA_SHARE = 0.75  # frames below this share of the largest one that an image can span are for smaller images
PARTNER_SAMPLE_SIZE = 24  # how many middle partners are tried for a frame of three
CLOSE_FIT_SHARE = 0.03  # a crop that is not worth a longer search
ROUNDING_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class CollageSettings(Settings):
    """How images are put together in frames."""

    width: int = number_field(1024, 64, 8192, "Width of a frame: the size the model is trained at.", unit="px", step=8)
    height: int = number_field(1024, 64, 8192, "Height of a frame.", unit="px", step=8)
    frames: str = text_field(
        "",
        "Several frame sizes instead, such as 1024x1024, 832x1216. Each group of images takes the one it fills best.",
    )
    layout: str = choice_field(
        COLLAGE_AUTO,
        COLLAGE_LAYOUTS,
        "auto: portrait images stand side by side at full height, landscape images are stacked at full width. "
        "grid: one image spans the frame and the others are stacked beside it.",
    )
    per_frame: int = number_field(
        3, 2, 4, "Maximum number of images in one frame; fewer if fewer fill it.", unit="images"
    )
    uses: int = number_field(2, 1, 64, "How often each image is used, with different neighbours each time if possible.")
    max_crop: float = number_field(
        0.12, 0.0, 0.5, "Largest share of an image that may be cropped to make it fit.", step=0.01
    )
    captions: str = choice_field(
        CAPTIONS_POSITIONAL,
        COLLAGE_CAPTION_MODES,
        "positional: left: ...; right: .... joined: one after the other. shared + differences: common tags once, "
        "then the rest by position. empty: no text.",
    )
    mix: float = number_field(
        0.3, 0.0, 0.9, "Share of an epoch that shows the original images alone. 0 shows collages only.", step=0.05
    )
    seed: int = number_field(0, 0, 2**63 - 1, "The same seed, images and settings give the same collages.")
    max_upscale: float = number_field(
        1.0,
        1.0,
        4.0,
        "Largest enlargement of small images. At 1 they are left out, because enlarging adds no detail.",
        step=0.05,
        advanced=True,
    )
    ground: str = text_field(
        "#181818",
        "Background colour where no image covers the frame, as #rrggbb. It is masked and not trained.",
        advanced=True,
    )
    gutter: int = number_field(
        0, 0, 512, "Background between neighbours; a multiple of snap.", unit="px", step=8, advanced=True
    )
    snap: str = choice_field(
        COLLAGE_AUTO,
        (COLLAGE_AUTO, "8", "16"),
        "Borders between images lie on multiples of this many px, so that no latent cell covers two images. 16 "
        "suits every model; auto is 16, or 8 if a frame is not a multiple of 16.",
        advanced=True,
    )
    feather: int = number_field(
        0,
        0,
        8,
        "The mask ramps up over this many latent cells from a border inside the frame. 0 trains up to the border.",
        unit="latent cells",
        advanced=True,
    )
    contrast: str = choice_field(
        CONTRAST_WARN,
        (CONTRAST_OFF, CONTRAST_WARN, CONTRAST_DROP),
        "What to do with images whose subject hardly differs from its background.",
        advanced=True,
    )
    min_contrast: float = number_field(
        12.0,
        0.0,
        100.0,
        "With contrast: smallest accepted colour difference (CIEDE2000). Skin on beige has about 9, on white 21.",
        step=0.5,
        advanced=True,
    )
    trim: bool = switch_field(True, "First cut off solid borders at the edges of an image.", advanced=True)
    trigger: str = text_field(
        "",
        "A word placed once at the start instead of in every position. Empty: the tag that all captions begin with.",
        advanced=True,
    )

    def __post_init__(self):
        super().__post_init__()
        _ = self.frame_list, self.step, self.ground_rgb  # each raises for values that make no sense
        if self.gutter % self.step:
            raise ValueError(
                f"gutter is {self.gutter} px and borders lie on multiples of {self.step} px. Choose a gutter of "
                f"{-(-self.gutter // self.step) * self.step} px, or another snap."
            )

    @property
    def frame_list(self) -> tuple[tuple[int, int], ...]:
        """The frame sizes, largest first."""
        named = [part.strip() for part in re.split(r"[,;\n]", self.frames) if part.strip()]
        sizes = {parse_frame_size(part) for part in named} or {(self.width, self.height)}
        return tuple(sorted(sizes, key=lambda size: (-size[0] * size[1], size)))

    @property
    def step(self) -> int:
        """Pixels that borders are snapped to."""
        sides = [side for frame in self.frame_list for side in frame]
        step = int(self.snap) if self.snap != COLLAGE_AUTO else 16 if all(side % 16 == 0 for side in sides) else 8
        if wrong := next((frame for frame in self.frame_list if frame[0] % step or frame[1] % step), None):
            near = "x".join(str(max(1, round(side / step)) * step) for side in wrong)
            raise ValueError(
                f"The frame {wrong[0]}x{wrong[1]} is not a multiple of {step} px in both sides. Use {near}."
            )
        return step

    @property
    def ground_rgb(self) -> tuple[int, int, int]:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", self.ground):
            raise ValueError(f"ground is {self.ground!r}; write a colour as #rrggbb, for example #181818.")
        red, green, blue = (int(self.ground[i : i + 2], 16) for i in (1, 3, 5))
        return red, green, blue


def parse_frame_size(words: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})\s*[x×*]\s*(\d{1,5})", words)
    if not match or not all(64 <= int(side) <= 8192 for side in match.groups()):
        raise ValueError(f"frames has {words!r}; write sizes of 64 to 8192 px as 1024x1024, 832x1216.")
    return int(match[1]), int(match[2])


# -- what a plan is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollageCell:
    """One image in a frame: `box` is cut out of it, scaled, and put at `frame_box`."""

    source: int  # index into the sizes that were planned
    box: tuple[float, float, float, float]  # in the image; fractions of a pixel keep the shape exact
    scale: float
    frame_box: tuple[int, int, int, int]  # in the frame
    crop: float  # share of the image that is cut off

    @property
    def size(self) -> tuple[int, int]:
        return self.frame_box[2] - self.frame_box[0], self.frame_box[3] - self.frame_box[1]


@dataclass(frozen=True)
class Collage:
    frame: tuple[int, int]
    layout: str  # columns, rows, single or grid
    cells: tuple[CollageCell, ...]

    @property
    def fill(self) -> float:
        """Share of the frame that images cover."""
        return sum(w * h for w, h in (cell.size for cell in self.cells)) / (self.frame[0] * self.frame[1])


@dataclass(frozen=True)
class CollagePlan:
    collages: tuple[Collage, ...]
    sizes: tuple[tuple[int, int], ...]
    excluded: tuple[tuple[int, str], ...] = ()  # (index, why)

    def count_uses(self) -> Counter:
        return Counter(cell.source for collage in self.collages for cell in collage.cells)

    @property
    def fill(self) -> float:
        return sum(collage.fill for collage in self.collages) / max(1, len(self.collages))

    @property
    def crops(self) -> list[float]:
        return sorted(cell.crop for collage in self.collages for cell in collage.cells)


# -- one image in one frame ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackingAxis:
    """Columns lie along x and span y; rows lie along y and span x. Everything below speaks of `along` and `across`."""

    name: str
    along: int  # 0: x, 1: y

    def split(self, size):
        """(along, across)"""
        return size[self.along], size[1 - self.along]

    def to_xy(self, along, across):
        """(x, y)"""
        return (along, across) if self.along == 0 else (across, along)


X_AXIS, Y_AXIS = PackingAxis(LAYOUT_COLUMNS, 0), PackingAxis(LAYOUT_ROWS, 1)


@dataclass(frozen=True)
class LengthRange:
    """How long an image may be along the axis when it spans the other one: uncut, and at least and at most, on the
    grid."""

    source: int
    uncut_length: float
    min_length: int
    max_length: int


def fit_along_axis(
    source: int, size, frame, axis: PackingAxis, settings: CollageSettings, step: int
) -> LengthRange | str:
    """The Fit of an image that spans the frame across the axis, or why it cannot."""
    along, across = axis.split(size)
    space, span = axis.split(frame)
    scale = span / across
    if scale > settings.max_upscale + ROUNDING_EPSILON:
        side = ("height", "width")[axis.along]
        return (
            f"is {size[0]}x{size[1]} px and would be enlarged {scale:.2f} times to span the {side} of "
            f"{frame[0]}x{frame[1]}"
        )
    natural, keep = along * scale, 1 - settings.max_crop
    low = math.ceil(natural * keep / step - ROUNDING_EPSILON) * step
    high = math.floor(min(natural / keep, along * settings.max_upscale) / step + ROUNDING_EPSILON) * step
    if max(low, step) > min(high, space):
        loss = 1 - space / natural if natural > space else 1.0 - (natural // step * step) / natural
        return f"is {size[0]}x{size[1]} px and would lose {loss:.0%} in {frame[0]}x{frame[1]}"
    return LengthRange(source, natural, max(low, step), min(high, space))


def allowed_axes(size, settings: CollageSettings) -> tuple[PackingAxis, ...]:
    """Along which axes an image of this size may stand."""
    if settings.layout in (LAYOUT_COLUMNS, LAYOUT_ROWS):
        return (X_AXIS,) if settings.layout == LAYOUT_COLUMNS else (Y_AXIS,)
    if settings.layout == LAYOUT_SINGLE or size[0] == size[1]:
        return X_AXIS, Y_AXIS
    return (X_AXIS,) if size[0] < size[1] else (Y_AXIS,)


def make_cell(it: LengthRange, size, frame, axis: PackingAxis, start: int, length: int, offset: int = 0) -> CollageCell:
    """The image from start to start + length along the axis, spanning the frame across it from offset on; cut at its
    middle."""
    along, across = axis.split(size)
    span = axis.split(frame)[1]
    scale = max(span / across, length / along)
    cut = length / scale, span / scale
    left, top = axis.to_xy(
        *(int((side - part) / 2 + ROUNDING_EPSILON) for side, part in zip((along, across), cut, strict=True))
    )
    width, height = axis.to_xy(*cut)  # the box begins on a whole pixel: at scale 1 nothing is resampled
    (x, y), (w, h) = axis.to_xy(start, offset), axis.to_xy(length, span)
    crop = 1 - width * height / (size[0] * size[1])
    return CollageCell(
        it.source, (left, top, left + width, top + height), scale, (x, y, x + w, y + h), max(0.0, round(crop, 9))
    )


# -- several images along one axis -----------------------------------------------------------------------------------


def distribute_lengths(fits, space: int, step: int) -> list[int]:
    """Lengths on the grid, within each image's limits, that fill the space if they can; near the uncut lengths."""
    sizes = [min(max(int(it.uncut_length / step) * step, it.min_length), it.max_length) for it in fits]
    if sum(it.max_length for it in fits) < space and sum(sizes) <= space:
        return sizes  # the ground shows in any case: nothing is gained by cutting more
    while (gap := space - sum(sizes)) != 0:
        turn = step if gap > 0 else -step
        free = [i for i, it in enumerate(fits) if it.min_length <= sizes[i] + turn <= it.max_length]
        if not free:
            return sizes
        worst = min(free, key=lambda i: abs(math.log((sizes[i] + turn) / fits[i].uncut_length)))
        sizes[worst] += turn
    return sizes


def pack_cells(fits, sizes, frame, axis: PackingAxis, settings, step, offset=0) -> list[CollageCell]:
    """Cells side by side along the axis, centred in the space that is left over."""
    space = axis.split(frame)[0]
    given = distribute_lengths(fits, space - settings.gutter * (len(fits) - 1), step)
    at = (space - sum(given) - settings.gutter * (len(fits) - 1)) // 2 // step * step
    cells = []
    for it, length in zip(fits, given, strict=True):
        cells.append(make_cell(it, sizes[it.source], frame, axis, at, length, offset))
        at += length + settings.gutter
    return cells


# -- the search --------------------------------------------------------------------------------------------------------


class CandidatePool:
    """The images that are still to be placed and can stand in one frame along one axis, sorted by their uncut
    length."""

    def __init__(self, frame, axis: PackingAxis, fits: dict[int, LengthRange], rank: list[int]):
        self.frame, self.axis, self.fits, self.rank = frame, axis, fits, rank
        self.by_length = sorted((it.uncut_length, rank[source], source) for source, it in fits.items())

    def remove(self, source: int):
        if source in self.fits:
            it = self.fits.pop(source)
            del self.by_length[bisect_left(self.by_length, (it.uncut_length, self.rank[source], source))]

    def candidates_near_length(self, target: float, offset: int, without, count: int) -> list[LengthRange]:
        """Up to 2 * count images whose uncut lengths are next to the target."""
        at = bisect_left(self.by_length, (target, offset))
        around = self.by_length[max(0, at - count) : at + count]
        return [self.fits[source] for _, _, source in around if source not in without]

    def candidates_of_all_lengths(self, offset: int, count: int) -> list[LengthRange]:
        """About `count` images of all lengths."""
        stride = max(1, len(self.by_length) // count)
        return [self.fits[source] for _, _, source in self.by_length[offset % stride :: stride]]


class CollagePlanner:
    """Best-fit decreasing: the longest image that is needed most often takes the neighbours that fill its frame
    best."""

    def __init__(self, sizes, settings: CollageSettings):
        self.sizes, self.settings, self.step = sizes, settings, settings.step
        self.rng = random.Random(settings.seed)
        self.rank = list(range(len(sizes)))
        self.rng.shuffle(self.rank)
        self.pools, self.anchor_pools, self.excluded = self.build_candidate_pools()
        self.remaining_uses = {source: settings.uses for source in self.anchor_pools}
        self.pair_counts, self.used_orders = Counter(), set()

    def build_candidate_pools(self):
        """(rooms by frame and axis, the rooms' keys that each image may anchor, [(image, why it is left out)])"""
        fits, homes, excluded = {}, {}, []
        for source, size in enumerate(self.sizes):
            why = []
            for frame in self.settings.frame_list:
                for axis in allowed_axes(size, self.settings):
                    it = fit_along_axis(source, size, frame, axis, self.settings, self.step)
                    if isinstance(it, str):
                        why.append(it)
                    else:
                        fits.setdefault((frame, axis), {})[source] = it
                        homes.setdefault(source, []).append((frame, axis))
            if source not in homes:
                excluded.append((source, why[-1]))  # the smallest frame says it best
        homes = {
            source: [key for key in keys if pixel_area(key[0]) >= MIN_FRAME_AREA_SHARE * pixel_area(keys[0][0])]
            for source, keys in homes.items()
        }
        pools = {key: CandidatePool(key[0], key[1], members, self.rank) for key, members in fits.items()}
        return pools, homes, excluded

    def iterate_collages(self):
        """Yields one collage after the other until every image has been used as often as it must."""
        queue = [self.queue_entry(source) for source in self.remaining_uses]
        heapq.heapify(queue)
        while queue:
            entry = heapq.heappop(queue)
            source = entry[-1]
            if entry != self.queue_entry(source):
                if self.remaining_uses[source]:
                    heapq.heappush(queue, self.queue_entry(source))
                continue
            collage = self.best_collage_with(source)
            for used in (cell.source for cell in collage.cells):
                self.mark_used(used)
            yield collage
            if self.remaining_uses[source]:
                heapq.heappush(queue, self.queue_entry(source))

    def queue_entry(self, source):
        """What comes first: often needed, then long."""
        frame, axis = self.anchor_pools[source][0]
        along, across = axis.split(self.sizes[source])
        return -self.remaining_uses[source], -along / across, self.rank[source], source

    def mark_used(self, source):
        self.remaining_uses[source] -= 1
        if not self.remaining_uses[source]:
            for room in self.pools.values():
                room.remove(source)

    def best_collage_with(self, source) -> Collage:
        """The best collage with this image in it."""
        rooms = [self.pools[key] for key in self.anchor_pools[source]]
        if self.settings.layout == LAYOUT_GRID:
            grids = filter(None, (self.find_grid_collage(room, room.fits[source]) for room in rooms))
            if best := next(grids, None):
                return self.count_pairs(best)
        best_by_room = [
            (
                *min((self.group_cost(group, room), group) for group in self.candidate_groups(room, room.fits[source])),
                room,
            )
            for room in rooms
        ]
        _, group, room = min(best_by_room, key=lambda found: found[0])
        return self.count_pairs(self.make_line_collage(room, [room.fits[i] for i in group]))

    def candidate_groups(self, room: CandidatePool, anchor: LengthRange):
        """Candidates: the image alone, and with the neighbours that come near to filling the frame. As tuples of
        sources."""
        yield (anchor.source,)
        if self.settings.layout == LAYOUT_SINGLE:
            return
        space, gutter = room.axis.split(room.frame)[0], self.settings.gutter
        rest, offset, mine = space - gutter - anchor.uncut_length, self.rng.randrange(len(self.sizes)), anchor.source
        good = False
        for second in room.candidates_near_length(rest, offset, (mine,), 6):
            good = good or (
                abs(second.uncut_length - rest) < CLOSE_FIT_SHARE * space
                and not self.pair_counts[sorted_pair(mine, second.source)]
            )
            yield mine, second.source
        if good or self.settings.per_frame < 3:
            return
        some = [
            it
            for it in room.candidates_of_all_lengths(offset, PARTNER_SAMPLE_SIZE)
            if it.source != mine and it.min_length <= rest
        ]
        for second in some:
            for third in room.candidates_near_length(
                rest - gutter - second.uncut_length, offset, (mine, second.source), 2
            ):
                yield mine, second.source, third.source
        if self.settings.per_frame < 4:
            return
        for second, third in combinations(some[::3], 2):
            for fourth in room.candidates_near_length(
                rest - 2 * gutter - second.uncut_length - third.uncut_length,
                offset,
                (mine, second.source, third.source),
                1,
            ):
                yield mine, second.source, third.source, fourth.source

    def group_cost(self, group, room: CandidatePool):
        """Less is better: ground that shows, being alone, neighbours that have met before, what is cut off. What is too
        long comes last."""
        fits = [room.fits[source] for source in group]
        space = room.axis.split(room.frame)[0] - self.settings.gutter * (len(group) - 1)
        natural = sum(it.uncut_length for it in fits)
        if sum(it.min_length for it in fits) > space:
            return 2.0, False, 0, 0.0, 0
        filled = sum(it.max_length for it in fits) >= space
        bare = 0.0 if filled else max(0.0, 1 - natural / space)
        crop = abs(natural - space) / max(natural, space) if filled else 0.0
        met = sum(self.pair_counts[sorted_pair(a, b)] for a, b in combinations(group, 2))
        return round(bare, 2), len(group) == 1, met, round(crop, 3), -pixel_area(room.frame)

    def make_line_collage(self, room: CandidatePool, fits) -> Collage:
        self.rng.shuffle(fits)
        if tuple(it.source for it in fits) in self.used_orders:
            fits.reverse()
        self.used_orders.add(tuple(it.source for it in fits))
        cells = pack_cells(fits, self.sizes, room.frame, room.axis, self.settings, self.step)
        return Collage(room.frame, room.axis.name if len(cells) > 1 else LAYOUT_SINGLE, tuple(cells))

    def find_grid_collage(self, room: CandidatePool, anchor: LengthRange) -> Collage | None:
        """The image spans the frame, and two or three others fill what is left beside it, stacked. None if nothing
        fits exactly."""
        space, span = room.axis.split(room.frame)
        other, gutter = (Y_AXIS, X_AXIS)[room.axis.along], self.settings.gutter
        some = [s for s in self.remaining_uses if self.remaining_uses[s] and s != anchor.source]
        some = sorted(self.rng.sample(some, min(len(some), PARTNER_SAMPLE_SIZE)))
        best = None
        for length in range(anchor.min_length, anchor.max_length + 1, self.step):
            frame = room.axis.to_xy(space - length - gutter, span)
            if min(frame) < self.step:
                continue
            found = (fit_along_axis(s, self.sizes[s], frame, other, self.settings, self.step) for s in some)
            inner = CandidatePool(
                frame, other, {it.source: it for it in found if isinstance(it, LengthRange)}, self.rank
            )
            for group in self.stack_candidates(inner):
                score = self.group_cost(group, inner)
                total = (score[2], score[3] + abs(length - anchor.uncut_length) / anchor.uncut_length, length, group)
                if score[0] == 0.0 and (best is None or total < best[0]):
                    best = total, length, inner, group
        return None if best is None else self.make_grid_collage(room, anchor, *best[1:])

    def stack_candidates(self, inner: CandidatePool):
        gutter, space = self.settings.gutter, inner.axis.split(inner.frame)[0]
        for first in list(inner.fits.values()):
            for second in inner.candidates_near_length(space - gutter - first.uncut_length, 0, (first.source,), 1):
                yield first.source, second.source
        if self.settings.per_frame < 4:
            return
        for first, second in combinations(list(inner.fits.values())[::2], 2):
            for third in inner.candidates_near_length(
                space - 2 * gutter - first.uncut_length - second.uncut_length, 0, (first.source, second.source), 1
            ):
                yield first.source, second.source, third.source

    def make_grid_collage(self, room, anchor, length, inner, group) -> Collage:
        first = self.rng.random() < 0.5
        rest = room.axis.split(room.frame)[0] - length
        one = make_cell(anchor, self.sizes[anchor.source], room.frame, room.axis, 0 if first else rest, length)
        offset = length + self.settings.gutter if first else 0
        stack = pack_cells(
            [inner.fits[i] for i in group], self.sizes, inner.frame, inner.axis, self.settings, self.step, offset=offset
        )
        return Collage(room.frame, LAYOUT_GRID, (one, *stack))

    def count_pairs(self, collage: Collage) -> Collage:
        self.pair_counts.update(sorted_pair(a.source, b.source) for a, b in combinations(collage.cells, 2))
        return collage


def sorted_pair(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


def pixel_area(size) -> int:
    return size[0] * size[1]


def plan_collages(sizes, settings: CollageSettings) -> CollagePlan:
    """The collages of images of these sizes: each used exactly settings.uses times, or left out with the reason."""
    sizes = tuple(tuple(size) for size in sizes)
    planner = CollagePlanner(sizes, settings)
    made = CollagePlan(tuple(planner.iterate_collages()), sizes, tuple(planner.excluded))
    check_collage_plan(made, settings)
    return made


# -- the rules, checked ------------------------------------------------------------------------------------------------


def check_collage_plan(made: CollagePlan, settings: CollageSettings) -> None:
    """ValueError for a plan that breaks a rule of collage training; says which collage and how."""
    for number_, collage in enumerate(made.collages, 1):
        if wrong := find_collage_fault(collage, made.sizes, settings):
            raise ValueError(f"Collage {number_} ({collage.layout}, {collage.frame[0]}x{collage.frame[1]}): {wrong}")
    left_out = {source for source, _ in made.excluded}
    uses = made.count_uses()
    uneven = {
        source: uses[source]
        for source in range(len(made.sizes))
        if source not in left_out and uses[source] != settings.uses
    }
    if uneven or left_out & uses.keys():
        raise ValueError(f"Every image must be used {settings.uses} times; {uneven or 'one that is left out'} is not.")


def find_collage_fault(collage: Collage, sizes, settings: CollageSettings) -> str | None:
    """What is wrong with one collage, or None."""
    if not collage.cells:
        return "it has no images."
    if len({cell.source for cell in collage.cells}) < len(collage.cells):
        return "it shows one image twice."
    spanning = [spans_frame(cell, collage.frame) for cell in collage.cells]
    if not any(spanning):
        return (
            "no image spans the frame from end to end, so none is learnt relative to it. Use the layout auto, "
            "columns or rows."
        )
    if not all(spanning) and not (collage.layout == LAYOUT_GRID and settings.layout == LAYOUT_GRID):
        return "an image spans neither the width nor the height. Only the layout grid allows that."
    for a, b in combinations(collage.cells, 2):
        if min(a.frame_box[2], b.frame_box[2]) > max(a.frame_box[0], b.frame_box[0]) and min(
            a.frame_box[3], b.frame_box[3]
        ) > max(a.frame_box[1], b.frame_box[1]):
            return "two images overlap."
    return next(
        filter(None, (find_cell_fault(cell, collage.frame, sizes[cell.source], settings) for cell in collage.cells)),
        None,
    )


def spans_frame(cell: CollageCell, frame) -> bool:
    return cell.size[0] == frame[0] or cell.size[1] == frame[1]


def find_cell_fault(cell: CollageCell, frame, size, settings: CollageSettings) -> str | None:
    left, top, right, bottom = cell.frame_box
    x0, y0, x1, y1 = cell.box
    stretch = max(abs((x1 - x0) * cell.scale - (right - left)), abs((y1 - y0) * cell.scale - (bottom - top)))
    if not (0 <= left < right <= frame[0] and 0 <= top < bottom <= frame[1]):
        return f"an image stands outside at {cell.frame_box}."
    if any(edge % settings.step for edge in cell.frame_box):
        return f"a border at {cell.frame_box} is no multiple of {settings.step} px."
    if min(x0, y0) < -ROUNDING_EPSILON or x1 > size[0] + ROUNDING_EPSILON or y1 > size[1] + ROUNDING_EPSILON:
        return f"a picture of {size[0]}x{size[1]} px has no part {cell.box}."
    if stretch > 1:
        return f"an image is stretched by {stretch:.1f} px."
    if cell.scale > settings.max_upscale + ROUNDING_EPSILON:
        return f"an image is enlarged {cell.scale:.2f} times, more than {settings.max_upscale:g}."
    if cell.crop > settings.max_crop + ROUNDING_EPSILON:
        return f"{cell.crop:.0%} of an image is cut off, more than {settings.max_crop:.0%}."
    return None
