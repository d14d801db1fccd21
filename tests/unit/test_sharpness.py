"""How much detail there is, and where bars begin: on drawn images, on both sides of every threshold."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from trainyard.tests.drawn import BICUBIC, BILINEAR, LANCZOS, barred, enlarged, grey, jpeg, softened, texture
from trainyard.trainers.data.quality.bars import detect_bars
from trainyard.trainers.data.quality.sharpness import (
    MAX_SPECTRUM_WINDOWS,
    estimate_enlargement,
    fine_detail_share,
    select_detailed_windows,
    tile_sharpness,
)

SLOPES = (0.8, 1.0, 1.2)  # from gravel to clouds


def at_512(image):
    small = image.copy()
    small.thumbnail((512, 512), LANCZOS)
    return grey(small)


@pytest.mark.parametrize("slope", SLOPES)
def test_sharp_textures_have_fine_detail_and_blurred_ones_do_not(slope):
    sharp = texture((512, 512), slope=slope)
    assert fine_detail_share(at_512(sharp)) > 0.007 or tile_sharpness(at_512(sharp)) > 400
    for radius in (1.5, 3):
        blurred = at_512(softened(sharp, radius))
        assert fine_detail_share(blurred) < 0.007
        assert tile_sharpness(blurred) < 400


def test_one_sharp_subject_before_a_soft_background_is_sharp_by_its_tiles():
    image = softened(texture((512, 512)), 6)
    image.paste(texture((160, 160), seed=1), (180, 180))
    assert tile_sharpness(grey(image)) > 400


def test_the_fine_share_of_one_wave_is_all_or_nothing():
    """0.4 cycles per pixel lies above a quarter, 0.1 below"""
    x = np.arange(256)
    wave = lambda cycles: np.tile(128 + 60 * np.sin(2 * np.pi * cycles * x), (256, 1)).astype(np.float32)
    assert fine_detail_share(wave(0.4)) > 0.99
    assert fine_detail_share(wave(0.1)) < 0.01
    assert fine_detail_share(wave(0.4).T) > 0.99


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("quality", [100, 90, 75])
def test_a_native_picture_was_not_enlarged(slope, quality):
    assert estimate_enlargement(grey(jpeg(texture(slope=slope), quality))) < 1.5


@pytest.mark.parametrize("how", [BILINEAR, BICUBIC, LANCZOS])
@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("slope", SLOPES)
def test_an_enlarged_picture_tells_its_factor_within_a_third(slope, factor, how):
    found = estimate_enlargement(grey(enlarged(texture(slope=slope), factor, how)))
    assert found >= 1.3
    assert 2 / 3 * factor - 0.1 <= found <= 4 / 3 * factor, found


def test_very_large_pictures_are_read_from_evenly_spread_windows():
    """the enlarged texture tiled to 3200 px, 25 x 25 windows"""
    large = np.tile(grey(enlarged(texture(), 3)).astype(np.uint8), (5, 5))
    assert 2 <= estimate_enlargement(large) <= 4
    assert len(select_detailed_windows(large)) == MAX_SPECTRUM_WINDOWS


def test_an_enlarged_jpeg_is_still_found():
    found = estimate_enlargement(grey(jpeg(enlarged(texture(), 3, BICUBIC), 85)))
    assert 2 <= found <= 4


def test_motion_blur_along_one_axis_is_no_enlargement():
    image = grey(texture())
    moved = np.mean([np.roll(image, shift, axis=1) for shift in range(6)], axis=0).astype(np.float32)
    assert estimate_enlargement(moved) < 1.5


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (100, 100), (129, 128)])
def test_small_and_plain_pictures_say_nothing(size):
    assert estimate_enlargement(np.full(size, 80, np.float32)) == 1
    assert tile_sharpness(np.full(size, 80, np.float32)) == 0
    assert fine_detail_share(np.full(size, 80, np.float32)) < 1e-3


# -- bars --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", [(0, 60, 0, 60), (40, 0, 0, 0), (8, 90, 8, 90), (0, 0, 0, 3)])
@pytest.mark.parametrize("colour", ["#000000", "#ffffff", "#a03050"])
def test_bars_are_found_to_the_pixel(edges, colour):
    framed = barred(texture((400, 300)), *edges, colour=colour)
    assert detect_bars(np.asarray(framed)) == edges


def test_bars_are_found_through_jpeg_within_its_blocks():
    found = detect_bars(np.asarray(jpeg(barred(texture((400, 300)), 0, 61, 0, 61), 80)))
    assert found[0] == found[2] == 0
    assert found[1] == pytest.approx(61, abs=8)
    assert found[3] == pytest.approx(61, abs=8)


def test_a_plain_ground_around_a_subject_is_no_bar():
    image = Image.new("RGB", (400, 400), "#ffffff")
    ImageDraw.Draw(image).ellipse([100, 60, 300, 340], fill="#cc3333")
    assert detect_bars(np.asarray(image)) == (0, 0, 0, 0)


@pytest.mark.parametrize("image", [Image.new("RGB", (50, 50), "#123456"), Image.new("RGB", (1, 1)), texture((64, 64))])
def test_plain_and_full_pictures_have_no_bars(image):
    assert detect_bars(np.asarray(image)) == (0, 0, 0, 0)
