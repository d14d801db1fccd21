"""Colours are told apart as the eye does, and a subject from its ground."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw
from trainyard.trainers.data.quality.colour import (
    RIM_WIDTH,
    ciede2000,
    dominant_colours,
    erode_and_dilate,
    measure_contrast,
    otsu_threshold,
    rgb_to_lab,
)

# Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula", 2005, table 1
SHARMA = """
50 2.6772 -79.7751 50 0 -82.7485 2.0425
50 3.1571 -77.2803 50 0 -82.7485 2.8615
50 2.8361 -74.0200 50 0 -82.7485 3.4412
50 -1.3802 -84.2814 50 0 -82.7485 1.0000
50 -1.1848 -84.8006 50 0 -82.7485 1.0000
50 -0.9009 -85.5211 50 0 -82.7485 1.0000
50 0 0 50 -1 2 2.3669
50 -1 2 50 0 0 2.3669
50 2.4900 -0.0010 50 -2.4900 0.0009 7.1792
50 2.4900 -0.0010 50 -2.4900 0.0010 7.1792
50 2.4900 -0.0010 50 -2.4900 0.0011 7.2195
50 2.4900 -0.0010 50 -2.4900 0.0012 7.2195
50 -0.0010 2.4900 50 0.0009 -2.4900 4.8045
50 -0.0010 2.4900 50 0.0010 -2.4900 4.8045
50 -0.0010 2.4900 50 0.0011 -2.4900 4.7461
50 2.5 0 50 0 -2.5 4.3065
50 2.5 0 73 25 -18 27.1492
50 2.5 0 61 -5 29 22.8977
50 2.5 0 56 -27 -3 31.9030
50 2.5 0 58 24 15 19.4535
50 2.5 0 50 3.1736 0.5854 1.0000
50 2.5 0 50 3.2972 0 1.0000
50 2.5 0 50 1.8634 0.5757 1.0000
50 2.5 0 50 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""
SKIN = (220, 180, 150)


def test_ciede2000_gives_the_published_differences():
    rows = np.array([line.split() for line in SHARMA.strip().splitlines()], float)
    assert len(rows) == 34
    assert np.abs(ciede2000(rows[:, :3], rows[:, 3:6]) - rows[:, 6]).max() < 1e-4
    assert np.abs(ciede2000(rows[:, 3:6], rows[:, :3]) - rows[:, 6]).max() < 1e-4, "the same both ways"


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_white_black_red_and_blue_in_lab(rgb, lab):
    assert rgb_to_lab(rgb) == pytest.approx(lab, abs=0.05)


def figure(skin, ground, size=(512, 768), seed=0):
    """A standing figure with a little grain, as a scan has."""
    image = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(image)
    w, h = size
    draw.ellipse([w * 0.38, h * 0.12, w * 0.62, h * 0.32], fill=skin)
    draw.rounded_rectangle([w * 0.3, h * 0.32, w * 0.7, h * 0.85], radius=40, fill=skin)
    grain = np.random.default_rng(seed).normal(0, 2, (h, w, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("ground", "expected"),
    [(SKIN, 0), ("#d9c7a8", 9), ("#ffffff", 21), ("#00ff00", 42), ("#2850a0", 53), ("#181818", 63)],
)
def test_a_skin_coloured_figure_stands_out_from_its_ground_by(ground, expected):
    """beige hides it, white is clear enough, green, blue and near-black are far away"""
    image = figure(SKIN, ground)
    assert measure_contrast(image).dE == pytest.approx(expected, abs=2.5)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=80)
    assert measure_contrast(Image.open(jpeg)).dE == pytest.approx(expected, abs=3.5)


def test_lightness_is_told_apart_from_colour():
    """grey 119 has L 50, black L 0"""
    found = measure_contrast(figure((119, 119, 119), "#000000"))
    assert found.dL == pytest.approx(50, abs=2)


def test_a_mask_says_where_the_subject_is():
    """a red disc near the corner, and a blue one in the middle that takes all the attention"""
    image = Image.new("RGB", (400, 400), "#808080")
    mask = Image.new("L", image.size)
    for draw, fill in ((ImageDraw.Draw(image), "#8a7c7c"), (ImageDraw.Draw(mask), 255)):
        draw.ellipse([20, 20, 120, 120], fill=fill)
    ImageDraw.Draw(image).ellipse([150, 150, 300, 300], fill="#0000ff")
    assert measure_contrast(image).dE > 30
    assert measure_contrast(image, mask).dE < 12


def test_without_a_ground_there_is_no_contrast():
    image = figure(SKIN, "#ffffff")
    assert measure_contrast(image, Image.new("L", image.size, 255)) is None
    assert measure_contrast(image, Image.new("L", image.size, 0)) is None


def test_one_colour_all_over_is_a_contrast_of_nothing():
    assert measure_contrast(Image.new("RGB", (64, 64), "#446688")).dE == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 500), (3000, 20)])
def test_the_smallest_and_narrowest_pictures_are_no_error(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    found = measure_contrast(Image.fromarray(noise))
    assert found is None or np.isfinite(found.dE)


def test_otsu_splits_two_heaps_between_them():
    values = np.r_[np.full(900, 1.0), np.full(100, 9.0)]
    assert 1 < otsu_threshold(values) < 9


def test_specks_on_the_border_are_no_main_colour():
    colours = np.r_[np.full((980, 3), 10.0), np.full((20, 3), 90.0)].astype(np.float32)
    assert dominant_colours(colours).max() < 50


def test_a_single_pixel_grows_and_a_single_hole_shrinks_by_the_whole_rim():
    spot = np.zeros((41, 41), bool)
    spot[20, 20] = True
    square = 2 * RIM_WIDTH + 1
    assert erode_and_dilate(spot, RIM_WIDTH)[1].sum() == square**2
    assert (~erode_and_dilate(~spot, RIM_WIDTH)[0]).sum() == square**2
