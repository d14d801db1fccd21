"""What is wrong with the control images of a set: missing, of another shape, too small, nothing changed, told twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..findings import SEVERITY_WARN, Finding
from ..readers import make_printable
from ..records import ImageRecord, open_image

COMPARED_SIDE_PX = 192
COMPARED_TILES = 8  # along a side; within one, the errors of JPEG cancel and those of an edit do not
SAME_LEVELS = 5.0  # of 255; drawn pictures saved as JPEG of quality 75 are 1.9 apart, with an area of pure red 4.2
LEAST_SIDE_SHARE = 0.5  # of the image's side, for a control image that is laid over it


def measure_controls(record: ImageRecord, image: Image.Image) -> tuple[float | str, ...]:
    """For each control image how far it is from the image, in levels of 255: the largest mean difference of a tile in a
    colour. Infinite where it is of another shape, and a text where it cannot be read."""
    return tuple(measure_control(record, image, control) for control in record.controls)


def measure_control(record: ImageRecord, image: Image.Image, control) -> float | str:
    if not record.is_aligned(control):
        return float("inf")
    if control.id == record.id:
        return 0.0
    try:
        shown = open_image(record.control_record(control))
    except ValueError as error:
        return str(error)
    scale = min(1.0, COMPARED_SIDE_PX / max(image.size))
    side = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = [np.asarray(one.convert("RGB").resize(side, Image.Resampling.BOX), np.float32) for one in (image, shown)]
    tiles = COMPARED_TILES, COMPARED_TILES
    colours = [Image.fromarray(colour) for colour in np.moveaxis(small[0] - small[1], -1, 0).copy()]
    return max(float(np.abs(np.asarray(colour.resize(tiles, Image.Resampling.BOX))).max()) for colour in colours)


def check_controls(
    records: Sequence[ImageRecord], differences: Sequence[tuple[float | str, ...]]
) -> Iterator[tuple[int, Finding]]:
    """(index, finding) over a whole set. differences: of `measure_controls`, empty for images that cannot be read."""
    having = sum(bool(record.controls) for record in records)
    if not having:
        return
    aligned = [record.is_aligned(control) for record in records for control in record.controls]
    tell_shapes = sum(aligned) * 2 > len(aligned)  # else they are references of their own shapes
    first_told: dict[tuple, int] = {}
    for index, (record, different) in enumerate(zip(records, differences, strict=True)):
        if not record.controls:
            yield index, warn("control", f"no control image, and {having} of {len(records)} images have one")
            continue
        for control, difference in zip(
            record.controls, different or [float("inf")] * len(record.controls), strict=True
        ):
            name = make_printable(Path(control.path).name)
            yield from ((index, finding) for finding in check_control(record, control, name, difference, tell_shapes))
        told = (tuple(control.id for control in record.controls), tuple(sorted(record.captions)))
        if (first := first_told.setdefault(told, index)) != index:
            other = make_printable(Path(records[first].path).name)
            yield index, warn("control", f"the same control images and the same caption as {other}: two answers to one")


def check_control(record: ImageRecord, control, name: str, difference: float | str, tell_shapes: bool):
    """Findings on one control image."""
    (width, height), (own_width, own_height) = control.size, record.size
    if isinstance(difference, str):
        yield warn("control", f"{name} cannot be read: {difference}")
    elif difference < SAME_LEVELS:
        yield warn("control", f"{name} shows the same as its image ({difference:.1f} levels apart < {SAME_LEVELS:g})")
    if not record.is_aligned(control):
        if tell_shapes:
            yield warn("control", f"{name} is {width}x{height} px, another shape than {own_width}x{own_height}")
    elif width < LEAST_SIDE_SHARE * own_width:
        yield warn("control", f"{name} is {width}x{height} px < {LEAST_SIDE_SHARE:g} of {own_width}x{own_height}")
    if sum(other.id == control.id for other in record.controls) > 1:
        yield warn("control", f"{name} is shown twice")


def warn(kind: str, text: str) -> Finding:
    return Finding(SEVERITY_WARN, kind, text)
