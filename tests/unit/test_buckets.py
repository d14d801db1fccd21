"""Buckets by kohya's rules, worked by hand."""

import numpy as np
import pytest
from PIL import Image
from trainyard.trainers.data.buckets import BucketSettings, Placement, assign, fit, kohya


def test_the_bucket_list_by_hand():
    """area 512*512 = 262144; width 256 -> 1024; 320 -> 819.2 -> 768; 384 -> 682.7 -> 640; 448 -> 585.1 -> 576; 512 -> 512;
    576 -> 455.1 -> 448; ... 768 -> 341.3 -> 320; 832 -> 315.1 -> 256; 896 -> 292.6 -> 256; 960 -> 273.1 -> 256; 1024 -> 256.
    Each also the other way round."""
    upright = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)]
    lying = [(h, w) for w, h in upright]
    assert kohya(512, 256, 1024, 64) == tuple(sorted([*upright, (512, 512), *lying]))


def test_the_longest_side_is_capped():
    """width 256 wants 1024 of height and gets 768"""
    assert (256, 768) in kohya(512, 256, 768, 64) and (256, 1024) not in kohya(512, 256, 768, 64)


def test_buckets_below_the_shortest_side_are_left_out():
    """area 64*64: width 256 would be 16 high"""
    assert kohya(64, 256, 2048, 8) == ((64, 64),)


SIZES = {  # size: (bucket, scaled, crop) with upscale, resolution 512, sides 256 to 1024, step 64
    (512, 512): ((512, 512), (512, 512), (0, 0)),
    (1000, 1000): ((512, 512), (512, 512), (0, 0)),
    (100, 100): ((512, 512), (512, 512), (0, 0)),  # enlarged
    (900, 600): ((640, 384), (640, 427), (0, 21)),  # 1.5: 640/384 = 1.667 off by .167, 576/448 = 1.286 by .214; 600*640/900 = 426.67
    (600, 900): ((384, 640), (427, 640), (21, 0)),  # .667: 384/640 = .6 off by .067, 448/576 = .778 by .111
    (1920, 1080): ((640, 384), (683, 384), (21, 0)),  # 1.778: 1.667 off by .111, 704/320 = 2.2 by .42; match height: 682.67
    (5000, 100): ((1024, 256), (12800, 256), (5888, 0)),
    (768, 320): ((768, 320), (768, 320), (0, 0)),  # its own size is a bucket
}


@pytest.mark.parametrize("size", SIZES)
def test_images_cover_the_bucket_of_nearest_aspect(size):
    settings = BucketSettings(resolution=512, upscale=True, min_side=256, max_side=1024)
    assert assign(size, settings) == Placement(*SIZES[size])


def test_of_two_equally_near_buckets_the_first_is_taken():
    """aspect 1.25 lies midway between 320/320 = 1 and 384/256 = 1.5"""
    settings = BucketSettings(resolution=320, upscale=True, min_side=256, max_side=384)
    assert kohya(320, 256, 384, 64) == ((256, 384), (320, 320), (384, 256))
    assert assign((500, 400), settings).bucket == (320, 320)


TIGHT = {  # size: (bucket, scaled, crop) without upscale, resolution 1024, step 64
    (1024, 1024): ((1024, 1024), (1024, 1024), (0, 0)),
    (1000, 700): ((960, 640), (1000, 700), (20, 30)),  # 700000 px fit: kept, cropped to multiples of 64
    (64, 100): ((64, 64), (64, 100), (0, 18)),
    # 1.5: 1254.1 x 836.1 -> by width 1216 / 768 = 1.583, by height 1216 / 832 = 1.462: height is nearer, 832 * 1.5 = 1248
    (3000, 2000): ((1216, 832), (1248, 832), (16, 0)),
    # .75: 886.8 x 1182.4 -> by width 832 / 1088 = .7647 (off .0147), by height 1152 * .75 = 864 -> 832 / 1152 = .7222 (off .0278)
    (1500, 2000): ((832, 1088), (832, 1109), (0, 10)),
}


@pytest.mark.parametrize("size", TIGHT)
def test_without_upscale_images_only_shrink(size):
    assert assign(size, BucketSettings()) == Placement(*TIGHT[size])


@pytest.mark.parametrize("upscale", [False, True])
def test_toy_images_of_64_px_stay_as_they_are(upscale):
    assert assign((64, 64), BucketSettings(resolution=64, step=8, upscale=upscale)) == Placement((64, 64), (64, 64), (0, 0))


@pytest.mark.parametrize("size", [(30, 30), (63, 2000), (100_000, 110)])
def test_an_image_below_one_step_is_refused_with_the_remedy(size):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} px does not fill one step of 64 px\. Turn upscale on"):
        assign(size, BucketSettings())


@pytest.mark.parametrize("upscale", [False, True])
def test_every_size_is_covered_and_never_stretched(upscale):
    """the bucket lies inside the scaled picture, is centred, and the scaled picture is within a pixel of the original's aspect"""
    settings = BucketSettings(resolution=512, upscale=upscale, max_side=1024)
    for width in range(64, 3000, 171):
        for height in range(64, 3000, 133):
            try:
                place = assign((width, height), settings)
            except ValueError:
                assert not upscale and max(width, height) / min(width, height) > 8, (width, height)
                continue
            slack = [place.scaled[i] - place.bucket[i] for i in (0, 1)]
            assert min(slack) >= 0 and place.crop == (slack[0] // 2, slack[1] // 2), (width, height, place)
            assert not place.bucket[0] % 64 and not place.bucket[1] % 64
            factor = place.scaled[0] / width
            assert abs(place.scaled[1] - height * factor) <= 0.5 + 0.5 * height / width + 1e-6, (width, height, place)
            assert upscale or factor <= 1


def test_fit_cuts_the_middle():
    """4x2 px, bucket 2x2: the two columns in the middle"""
    image = Image.new("RGB", (4, 2))
    image.putdata([(i % 4, 0, 0) for i in range(8)])
    cut = fit(image, Placement((2, 2), (4, 2), (1, 0)))
    assert np.asarray(cut)[..., 0].tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize("size", [(40, 30), (300, 200)])
def test_fit_scales_without_shifting(size):
    """a ramp and its mirror add up to 255 everywhere; cutting an odd number of columns may shift it by half of one"""
    ramp = np.tile(np.rint(np.linspace(0, 255, size[0]))[None, :, None], (size[1], 1, 3)).astype(np.uint8)
    place = assign(size, BucketSettings(resolution=64, step=8, upscale=True, min_side=16, max_side=256))
    shown = np.asarray(fit(Image.fromarray(ramp), place)).astype(float)[..., 0]
    assert shown.shape == place.bucket[::-1]
    assert (shown + shown[:, ::-1]).mean() == pytest.approx(255, abs=1 + 255 / place.scaled[0])


@pytest.mark.parametrize("bad, message", [
    (dict(resolution=32), "step must not be larger"),
    (dict(resolution=1024, upscale=True, max_side=512), "max_side must be at least"),
    (dict(step=4), "step is 4"),
])
def test_settings_that_contradict_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        BucketSettings(**bad)
