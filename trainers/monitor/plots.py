"""Pictures of a run, drawn with Pillow alone."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, GRID, RAW, SMOOTH, PAPER = "#222222", "#dddddd", "#b7c9e2", "#1f5fbf", "#ffffff"
LEFT, TOP, RIGHT, BOTTOM = 88, 46, 24, 56


def smoothed(values, span=None):
    """Exponential moving average without the pull of its start; `span` in steps, a twentieth of the run when not given."""
    keep = 1 - 2 / ((span or max(2.0, len(values) / 20)) + 1)
    out, total, weight = [], 0.0, 0.0
    for v in values:
        total, weight = keep * total + (1 - keep) * v, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def loss_plot(losses, path=None, title="Training loss", size=(960, 540)):
    """A PIL picture of the loss over optimizer steps, raw and smoothed; written to `path` when given. Values that are no numbers
    leave a gap. Raises ValueError when there is nothing to draw."""
    finite = [v for v in losses if math.isfinite(v)]
    if not finite:
        raise ValueError(f"There is no loss to plot: {len(losses)} values, none of them a finite number.")
    image = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=16)
    low, high = limits(finite)
    x = lambda step: LEFT + (size[0] - LEFT - RIGHT) * (step / max(1, len(losses) - 1))
    y = lambda value: TOP + (size[1] - TOP - BOTTOM) * (1 - (value - low) / (high - low))
    for value in ticks(low, high):
        draw.line([(LEFT, y(value)), (size[0] - RIGHT, y(value))], fill=GRID)
        draw.text((LEFT - 10, y(value)), f"{value:.4g}", fill=INK, font=font, anchor="rm")
    for step in whole(ticks(1, max(2, len(losses))), len(losses)):
        draw.text((x(step - 1), size[1] - BOTTOM + 10), str(step), fill=INK, font=font, anchor="mt")
    curve(draw, x, y, losses, RAW, 1, low, high)
    curve(draw, x, y, smoothed([v if math.isfinite(v) else finite[0] for v in losses]), SMOOTH, 3, low, high)
    draw.text((LEFT, 14), title, fill=INK, font=ImageFont.load_default(size=20))
    draw.text((size[0] - RIGHT, 16), f"last {smoothed(finite)[-1]:.4g} smoothed", fill=SMOOTH, font=font, anchor="ra")
    draw.text(((LEFT + size[0] - RIGHT) / 2, size[1] - 10), "optimizer steps", fill=INK, font=font, anchor="ms")
    if path is not None:
        image.save(Path(path))
    return image


def limits(values):
    """A range that shows the run and not its one worst step; never empty, also for a constant loss."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.995 * len(ordered)))]
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - pad, high + pad


def ticks(low, high, about=6):
    """Round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= about)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step) + 1)]


def whole(steps, last):
    """The steps a run has: a tick between two of them would be labelled with one of them again."""
    return [round(step) for step in steps if abs(step - round(step)) < 1e-6 and step <= last]


def curve(draw, x, y, values, colour, width, low, high):
    points: list = []
    for step, value in enumerate(values):
        if math.isfinite(value):
            points.append((x(step), y(min(max(value, low), high))))
            continue
        stroke(draw, points, colour, width)
        points = []
    stroke(draw, points, colour, width)


def stroke(draw, points, colour, width):
    if len(points) > 1:
        draw.line(points, fill=colour, width=width, joint="curve")
    elif points:
        draw.ellipse([points[0][0] - 2, points[0][1] - 2, points[0][0] + 2, points[0][1] + 2], fill=colour)


def sheet(rows, labels_left, labels_top, cell=192):
    """A grid of pictures: rows of PIL images with a label per row and per column."""
    font = ImageFont.load_default(size=16)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 24 + max(int(probe.textlength(t, font=font)) for t in labels_left)
    image = Image.new("RGB", (left + len(labels_top) * (cell + 8), 40 + len(rows) * (cell + 8)), PAPER)
    draw = ImageDraw.Draw(image)
    for column, text in enumerate(labels_top):
        draw.text((left + column * (cell + 8) + cell / 2, 20), text, fill=INK, font=font, anchor="mm")
    for index, (row, text) in enumerate(zip(rows, labels_left, strict=True)):
        top = 40 + index * (cell + 8)
        draw.text((left - 12, top + cell / 2), text, fill=INK, font=font, anchor="rm")
        for column, picture in enumerate(row):
            image.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST), (left + column * (cell + 8), top))
    return image


def sweep_sheet(rows, labels, strengths, effect, drift=(), unit="", cell=192):
    """Pictures at rising strengths, a row per prompt and seed, with the curve of effect (and drift) under their columns."""
    grid = sheet(rows, labels, [f"{s:+g}" if s else "0" for s in strengths], cell)
    left, height = grid.width - len(strengths) * (cell + 8), 220
    image = Image.new("RGB", (grid.width, grid.height + height), PAPER)
    image.paste(grid, (0, 0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    low, high = limits([0.0, *effect, *drift])
    x = lambda column: left + column * (cell + 8) + cell / 2
    y = lambda value: grid.height + 30 + (height - 60) * (1 - (value - low) / (high - low))
    for value in ticks(low, high, 5):
        draw.line([(x(0), y(value)), (x(len(strengths) - 1), y(value))], fill=INK if value == 0 else GRID)
        draw.text((left - 4, y(value)), f"{value:.3g}", fill=INK, font=font, anchor="rm")
    for values, colour, width in ((drift, RAW, 2), (effect, SMOOTH, 3)):
        curve(draw, x, y, list(values), colour, width, low, high)
        for column, value in enumerate(values):
            draw.ellipse([x(column) - 4, y(value) - 4, x(column) + 4, y(value) + 4], fill=colour)
    draw.text((left, grid.height + 6), f"effect: 1 is {unit}" if unit else "effect", fill=SMOOTH, font=font)
    if drift:
        draw.text((left, image.height - 8), "drift: 1 is another picture", fill=RAW, font=font, anchor="ls")
    return image
