"""The best and the worst pictures of a set side by side, which shows at a glance what a score is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from .sheets import BAD, EDGE, GOOD, Tile, contact_sheet

COLUMNS = 6


def best_and_worst(scores: Sequence[float], picture: Callable[[int], Image.Image], names: Sequence[str], each: int = 12,
                   spreads: Sequence[float] | None = None, title: str = "") -> Image.Image:  # fmt: skip
    """The `each` best in green, then the `each` worst in red; of fewer pictures every one once, the best first. picture(index) opens one."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    shown = order if len(order) <= 2 * each else [*order[:each], *order[-each:]]
    half = len(shown) / 2
    tiles = [
        tile(picture(i), scores[i], spreads[i] if spreads else 0.0, names[i], GOOD if place < half else BAD if len(shown) > 1 else EDGE)
        for place, i in enumerate(shown)
    ]
    return contact_sheet(tiles, columns=min(COLUMNS, len(tiles)), title=title)


def tile(picture, score, spread, name, colour) -> Tile:
    return Tile(picture, (f"{score:.3g}" + (f" +-{spread:.2g}" if spread else ""), name), colour)
