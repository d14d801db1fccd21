"""Images of a run, drawn with Pillow alone."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PLOT_TEXT_COLOUR, PLOT_GRID_COLOUR, PLOT_RAW_COLOUR, PLOT_SMOOTH_COLOUR, PLOT_BACKGROUND = (
    "#222222",
    "#dddddd",
    "#b7c9e2",
    "#1f5fbf",
    "#ffffff",
)
PLOT_MARGIN_LEFT, PLOT_MARGIN_TOP, PLOT_MARGIN_RIGHT, PLOT_MARGIN_BOTTOM = 88, 46, 24, 56


def exponential_moving_average(values, span=None):
    """Exponential moving average without the pull of its start; `span` in steps, a twentieth of the run when not
    given."""
    keep = 1 - 2 / ((span or max(2.0, len(values) / 20)) + 1)
    out, total, weight = [], 0.0, 0.0
    for v in values:
        total, weight = keep * total + (1 - keep) * v, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def draw_loss_plot(losses, path=None, title="Training loss", size=(960, 540)):
    """A PIL image of the loss over optimizer steps, raw and smoothed; written to `path` when given. Values that are
    no numbers leave a gap. Raises ValueError when there is nothing to draw."""
    finite = [v for v in losses if math.isfinite(v)]
    if not finite:
        raise ValueError(f"There is no loss to plot: {len(losses)} values, none of them a finite number.")
    image = Image.new("RGB", size, PLOT_BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=16)
    low, high = axis_limits(finite)
    x = lambda step: (
        PLOT_MARGIN_LEFT + (size[0] - PLOT_MARGIN_LEFT - PLOT_MARGIN_RIGHT) * (step / max(1, len(losses) - 1))
    )
    y = lambda value: (
        PLOT_MARGIN_TOP + (size[1] - PLOT_MARGIN_TOP - PLOT_MARGIN_BOTTOM) * (1 - (value - low) / (high - low))
    )
    for value in axis_ticks(low, high):
        draw.line([(PLOT_MARGIN_LEFT, y(value)), (size[0] - PLOT_MARGIN_RIGHT, y(value))], fill=PLOT_GRID_COLOUR)
        draw.text((PLOT_MARGIN_LEFT - 10, y(value)), f"{value:.4g}", fill=PLOT_TEXT_COLOUR, font=font, anchor="rm")
    for step in whole_step_ticks(axis_ticks(1, max(2, len(losses))), len(losses)):
        draw.text(
            (x(step - 1), size[1] - PLOT_MARGIN_BOTTOM + 10), str(step), fill=PLOT_TEXT_COLOUR, font=font, anchor="mt"
        )
    draw_curve(draw, x, y, losses, PLOT_RAW_COLOUR, 1, low, high)
    draw_curve(
        draw,
        x,
        y,
        exponential_moving_average([v if math.isfinite(v) else finite[0] for v in losses]),
        PLOT_SMOOTH_COLOUR,
        3,
        low,
        high,
    )
    draw.text((PLOT_MARGIN_LEFT, 14), title, fill=PLOT_TEXT_COLOUR, font=ImageFont.load_default(size=20))
    draw.text(
        (size[0] - PLOT_MARGIN_RIGHT, 16),
        f"last {exponential_moving_average(finite)[-1]:.4g} smoothed",
        fill=PLOT_SMOOTH_COLOUR,
        font=font,
        anchor="ra",
    )
    draw.text(
        ((PLOT_MARGIN_LEFT + size[0] - PLOT_MARGIN_RIGHT) / 2, size[1] - 10),
        "optimizer steps",
        fill=PLOT_TEXT_COLOUR,
        font=font,
        anchor="ms",
    )
    if path is not None:
        image.save(Path(path))
    return image


def axis_limits(values):
    """A range that shows the run and not its one worst step; never empty, also for a constant loss."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.995 * len(ordered)))]
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - pad, high + pad


def axis_ticks(low, high, about=6):
    """Round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= about)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step) + 1)]


def whole_step_ticks(steps, last):
    """The steps a run has: a tick between two of them would be labelled with one of them again."""
    return [round(step) for step in steps if abs(step - round(step)) < 1e-6 and step <= last]


def draw_curve(draw, x, y, values, colour, width, low, high):
    points: list = []
    for step, value in enumerate(values):
        if math.isfinite(value):
            points.append((x(step), y(min(max(value, low), high))))
            continue
        draw_polyline(draw, points, colour, width)
        points = []
    draw_polyline(draw, points, colour, width)


def draw_polyline(draw, points, colour, width):
    if len(points) > 1:
        draw.line(points, fill=colour, width=width, joint="curve")
    elif points:
        draw.ellipse([points[0][0] - 2, points[0][1] - 2, points[0][0] + 2, points[0][1] + 2], fill=colour)


def draw_image_grid(rows, labels_left, labels_top, cell=192):
    """A grid of images: rows of PIL images with a label per row and per column."""
    font = ImageFont.load_default(size=16)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 24 + max(int(probe.textlength(t, font=font)) for t in labels_left)
    image = Image.new("RGB", (left + len(labels_top) * (cell + 8), 40 + len(rows) * (cell + 8)), PLOT_BACKGROUND)
    draw = ImageDraw.Draw(image)
    for column, text in enumerate(labels_top):
        draw.text((left + column * (cell + 8) + cell / 2, 20), text, fill=PLOT_TEXT_COLOUR, font=font, anchor="mm")
    for index, (row, text) in enumerate(zip(rows, labels_left, strict=True)):
        top = 40 + index * (cell + 8)
        draw.text((left - 12, top + cell / 2), text, fill=PLOT_TEXT_COLOUR, font=font, anchor="rm")
        for column, tile in enumerate(row):
            image.paste(
                tile.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST), (left + column * (cell + 8), top)
            )
    return image


def draw_sweep_sheet(rows, labels, strengths, effect, drift=(), unit="", cell=192):
    """Images at rising strengths, a row per prompt and seed, with the curve of effect (and drift) under their
    columns."""
    grid = draw_image_grid(rows, labels, [f"{s:+g}" if s else "0" for s in strengths], cell)
    left, height = grid.width - len(strengths) * (cell + 8), 220
    image = Image.new("RGB", (grid.width, grid.height + height), PLOT_BACKGROUND)
    image.paste(grid, (0, 0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    low, high = axis_limits([0.0, *effect, *drift])
    x = lambda column: left + column * (cell + 8) + cell / 2
    y = lambda value: grid.height + 30 + (height - 60) * (1 - (value - low) / (high - low))
    for value in axis_ticks(low, high, 5):
        draw.line(
            [(x(0), y(value)), (x(len(strengths) - 1), y(value))],
            fill=PLOT_TEXT_COLOUR if value == 0 else PLOT_GRID_COLOUR,
        )
        draw.text((left - 4, y(value)), f"{value:.3g}", fill=PLOT_TEXT_COLOUR, font=font, anchor="rm")
    for values, colour, width in ((drift, PLOT_RAW_COLOUR, 2), (effect, PLOT_SMOOTH_COLOUR, 3)):
        draw_curve(draw, x, y, list(values), colour, width, low, high)
        for column, value in enumerate(values):
            draw.ellipse([x(column) - 4, y(value) - 4, x(column) + 4, y(value) + 4], fill=colour)
    draw.text((left, grid.height + 6), f"effect: 1 is {unit}" if unit else "effect", fill=PLOT_SMOOTH_COLOUR, font=font)
    if drift:
        draw.text((left, image.height - 8), "drift: 1 is another picture", fill=PLOT_RAW_COLOUR, font=font, anchor="ls")
    return image
