"""What a frame of several images is called: their captions by position, joined, or with the common tags said once."""

from __future__ import annotations

from collections.abc import Sequence

from ..caption_variants import prepend_trigger
from .plan import CAPTIONS_EMPTY, CAPTIONS_JOINED, CAPTIONS_SHARED, LAYOUT_COLUMNS, LAYOUT_ROWS, Collage

COLUMN_POSITIONS = {
    2: ("left", "right"),
    3: ("left", "middle", "right"),
    4: ("far left", "centre left", "centre right", "far right"),
}
ROW_POSITIONS = {
    2: ("top", "bottom"),
    3: ("top", "middle", "bottom"),
    4: ("top", "upper middle", "lower middle", "bottom"),
}


def describe_cell_positions(collage: Collage) -> tuple[str, ...]:
    """Where each cell is, in words, in the order of the cells; "" for an image that has the frame to itself."""
    count = len(collage.cells)
    if count == 1:
        return ("",)
    if collage.layout in (LAYOUT_COLUMNS, LAYOUT_ROWS):
        return (COLUMN_POSITIONS if collage.layout == LAYOUT_COLUMNS else ROW_POSITIONS)[count]
    first, *stack = collage.cells  # a grid: the first one spans the frame, the others are stacked beside it
    if first.size[1] == collage.frame[1]:
        here, there = ("left", "right") if first.frame_box[0] < stack[0].frame_box[0] else ("right", "left")
        return here, *(f"{name} {there}" for name in ROW_POSITIONS[len(stack)])
    here, there = ("top", "bottom") if first.frame_box[1] < stack[0].frame_box[1] else ("bottom", "top")
    return here, *(f"{there} {name}" for name in COLUMN_POSITIONS[len(stack)])


def combine_collage_captions(
    collage: Collage, captions: Sequence[tuple[str, ...]], mode: str, trigger: str = ""
) -> tuple[str, ...]:
    """The alternatives that describe a collage, from those of its cells (one tuple per cell). The trigger goes first,
    once."""
    if mode == CAPTIONS_EMPTY:
        return ("",)
    count = max(1, *(len(alternatives) for alternatives in captions))
    rows = (
        [alternatives[i % len(alternatives)] if alternatives else "" for alternatives in captions] for i in range(count)
    )
    told = (combine_cell_captions(describe_cell_positions(collage), row, mode, trigger) for row in rows)
    return tuple(dict.fromkeys(text for text in told if text))


def combine_cell_captions(positions, captions, mode: str, trigger: str) -> str:
    bare = [strip_trigger(caption, trigger) for caption in captions]
    if mode == CAPTIONS_JOINED:
        text = ", ".join(dict.fromkeys(tag for caption in bare for tag in split_caption_tags(caption)))
    elif mode == CAPTIONS_SHARED:
        text = format_shared_tags_first(positions, bare)
    else:
        text = format_captions_by_position(positions, bare)
    named = trigger if any(bare) or any(caption.strip() for caption in captions) else ""
    return prepend_trigger(text, named)


def format_captions_by_position(positions, captions) -> str:
    """left: a cat; right: a dog"""
    said = [(position, caption.strip().rstrip(".;,")) for position, caption in zip(positions, captions, strict=True)]
    return "; ".join(f"{position}: {caption}" if position else caption for position, caption in said if caption)


def format_shared_tags_first(positions, captions) -> str:
    """indoors, left: cat; right: dog, sleeping"""
    lists = [split_caption_tags(caption) for caption in captions]
    common = [tag for tag in lists[0] if all(tag in other for other in lists[1:])]
    rest = format_captions_by_position(positions, [", ".join(tag for tag in own if tag not in common) for own in lists])
    return ", ".join(filter(None, (*common, rest)))


def split_caption_tags(caption: str) -> list[str]:
    return [tag for tag in map(str.strip, caption.split(",")) if tag]


def strip_trigger(caption: str, trigger: str) -> str:
    caption = caption.strip()
    if not trigger or not caption.startswith(trigger) or caption[len(trigger) :][:1].isalnum():
        return caption
    return caption[len(trigger) :].lstrip(" ,")


def find_common_trigger(captions: Sequence[tuple[str, ...]]) -> str:
    """The tag that every caption begins with, or "". One caption alone proves nothing."""
    firsts = [
        split_caption_tags(caption)[:1] for alternatives in captions for caption in alternatives if caption.strip()
    ]
    alike = len(firsts) > 1 and all(first == firsts[0] for first in firsts)
    return firsts[0][0] if alike and firsts[0] else ""
