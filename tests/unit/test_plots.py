"""The loss of a run as an image: where the curve is, what the axes say, and runs that are hard to draw."""

import math

import pytest
from PIL import Image, ImageDraw
from trainyard.trainers.monitor.plots import (
    PLOT_BACKGROUND,
    PLOT_MARGIN_LEFT,
    PLOT_MARGIN_RIGHT,
    PLOT_MARGIN_TOP,
    PLOT_SMOOTH_COLOUR,
    axis_limits,
    axis_ticks,
    draw_image_grid,
    draw_loss_plot,
    exponential_moving_average,
)


def colour(text):
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def rows_of(image, x, wanted):
    """y of the pixels of one colour in column x, below the heading."""
    return [y for y in range(PLOT_MARGIN_TOP, image.height) if image.getpixel((x, y)) == colour(wanted)]


def step_labels(monkeypatch, losses):
    """The texts below the axis of steps."""
    seen = []
    real = ImageDraw.ImageDraw.text

    def text(self, xy, text, *rest, anchor=None, **more):
        seen.extend([text] if anchor == "mt" else [])
        return real(self, xy, text, *rest, anchor=anchor, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    draw_loss_plot(losses)
    return seen


def test_a_falling_loss_falls_on_the_picture():
    image = draw_loss_plot([1 - i / 200 for i in range(200)])
    heights = [
        sum(rows) / len(rows)
        for x in range(PLOT_MARGIN_LEFT + 5, image.width - PLOT_MARGIN_RIGHT - 5, 50)
        if (rows := rows_of(image, x, PLOT_SMOOTH_COLOUR))
    ]
    assert len(heights) > 10 and heights == sorted(heights), "y grows downward"


def test_the_smoothed_curve_by_hand():
    """Span 3: half of the old, half of the new, without the pull of a start at 0: 4; (4/4 + 8/2) / (1/4 + 1/2) =
    6.667."""
    assert exponential_moving_average([4.0, 8.0], span=3) == pytest.approx([4.0, 5 / 0.75])
    assert exponential_moving_average([2.0] * 50) == pytest.approx([2.0] * 50)


def test_ticks_are_round_numbers_within_the_range():
    assert axis_ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert axis_ticks(1, 1000) == [200, 400, 600, 800, 1000]
    for low, high in ((0.031, 0.032), (1e-9, 3e-9), (-5, 7), (0, 1e6)):
        assert 2 <= len(axis_ticks(low, high)) <= 7 and all(
            low <= t <= high * (1 + 1e-9) for t in axis_ticks(low, high)
        )


@pytest.mark.parametrize(
    "steps, texts", [(1, "1"), (2, "1 2"), (3, "1 2 3"), (4, "1 2 3 4"), (7, "1 2 3 4 5 6 7"), (30, "5 10 15 20 25 30")]
)
def test_the_axis_of_steps_has_every_step_at_most_once(steps, texts, monkeypatch):
    assert step_labels(monkeypatch, [1.0] * (steps - 1) + [2.0]) == texts.split()


def test_one_huge_step_does_not_flatten_the_run():
    """1 of 1000 losses is a million: the image shows the other 999, from 1 to 2 and a bit of air."""
    low, high = axis_limits([1 + i / 1000 for i in range(999)] + [1e6])
    assert 0.9 < low < 1 and 2 < high < 2.1


@pytest.mark.parametrize("losses", [[0.5], [0.5] * 10, [0.0] * 3, [1e-12, 2e-12], [1e30, 1.0], [-1.0, 1.0]])
def test_runs_that_are_hard_to_draw_are_drawn(losses):
    image = draw_loss_plot(losses)
    assert image.size == (960, 540) and len(image.getcolors(1 << 20)) > 3
    assert any(
        rows_of(image, x, PLOT_SMOOTH_COLOUR) for x in range(PLOT_MARGIN_LEFT - 2, image.width - PLOT_MARGIN_RIGHT + 3)
    ), "no curve on the image"


def test_values_that_are_no_numbers_leave_a_gap():
    """The raw curve breaks off; 100 of 300 values in the middle are NaN."""
    losses = [float(i % 2) for i in range(100)] + [math.nan] * 100 + [float(i % 2) for i in range(100)]
    image, middle = draw_loss_plot(losses), (PLOT_MARGIN_LEFT + 960 - PLOT_MARGIN_RIGHT) // 2
    raw = "#b7c9e2"
    assert rows_of(image, middle, raw) == [] and rows_of(image, PLOT_MARGIN_LEFT + 100, raw) != []


@pytest.mark.parametrize("losses", [[], [math.nan], [math.inf, math.nan]])
def test_nothing_to_draw_is_an_error_that_says_so(losses):
    with pytest.raises(
        ValueError, match=f"There is no loss to plot: {len(losses)} values, none of them a finite number"
    ):
        draw_loss_plot(losses)


def test_the_picture_is_written_where_asked_and_is_the_same_every_time(tmp_path):
    first = draw_loss_plot([3.0, 2.0, 1.0], tmp_path / "loss.png", title="star")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.tobytes() == first.tobytes() == draw_loss_plot([3.0, 2.0, 1.0], title="star").tobytes()
    assert draw_loss_plot([3.0, 2.0, 1.0], title="moon").tobytes() != first.tobytes()


def test_a_sheet_puts_every_picture_in_its_row_and_column():
    colours = [["#ff0000", "#00ff00"], ["#0000ff", "#ffff00"]]
    made = draw_image_grid(
        [[Image.new("RGB", (8, 8), c) for c in row] for row in colours],
        ["before", "after"],
        ["seed 0", "seed 1"],
        cell=40,
    )
    left = made.width - 2 * 48
    for r, row in enumerate(colours):
        for c, expected in enumerate(row):
            assert made.getpixel((left + c * 48 + 20, 40 + r * 48 + 20)) == colour(expected)
    assert made.getpixel((2, 2)) == colour(PLOT_BACKGROUND)
