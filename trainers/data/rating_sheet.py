"""The best and the worst images of a set side by side, which shows at a glance what a score is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from .contact_sheet import BAD_COLOUR, GOOD_COLOUR, NEUTRAL_COLOUR, SheetTile, draw_contact_sheet

RATING_SHEET_COLUMNS = 6


def draw_best_and_worst_sheet(
    scores: Sequence[float],
    image: Callable[[int], Image.Image],
    names: Sequence[str],
    each: int = 12,
    spreads: Sequence[float] | None = None,
    title: str = "",
) -> Image.Image:
    """The `each` best in green, then the `each` worst in red; of fewer images every one once, the best first.
    image(index) opens one."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    shown = order if len(order) <= 2 * each else [*order[:each], *order[-each:]]
    half = len(shown) / 2
    tiles = [
        make_score_tile(
            image(i),
            scores[i],
            spreads[i] if spreads else 0.0,
            names[i],
            GOOD_COLOUR if rank < half else BAD_COLOUR if len(shown) > 1 else NEUTRAL_COLOUR,
        )
        for rank, i in enumerate(shown)
    ]
    return draw_contact_sheet(tiles, columns=min(RATING_SHEET_COLUMNS, len(tiles)), title=title)


def make_score_tile(image, score, spread, name, colour) -> SheetTile:
    return SheetTile(image, (f"{score:.3g}" + (f" +-{spread:.2g}" if spread else ""), name), colour)
