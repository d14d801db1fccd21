"""Images are seen in sRGB, whatever their colour profile; what was in sRGB stays bit for bit."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from trainyard.tests import profiles
from trainyard.tests.fakes_data import FakeText, FakeVae, encoded
from trainyard.trainers.captioners import CaptionResult
from trainyard.trainers.captioners.caption_dataset import CaptionCache, caption_dataset
from trainyard.trainers.data.captions.manual_edits import build_caption_cards
from trainyard.trainers.data.contact_sheet import make_thumbnail
from trainyard.trainers.data.images import record_to_tensors
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, describe_colour_profiles, describe_left_out, open_image
from trainyard.trainers.data.writers import SaveSettings, save_dataset

COLOUR = (200, 60, 40)
SWAPPED_PRIMARIES = (profiles.SRGB_PRIMARIES[1], profiles.SRGB_PRIMARIES[0], profiles.SRGB_PRIMARIES[2])
WIDE_PROFILE = profiles.rgb_profile(profiles.P3_PRIMARIES, name="Wide colours")
SRGB_PROFILE = profiles.rgb_profile(profiles.SRGB_PRIMARIES)


def expected_srgb(colour, primaries, decode):
    """sRGB of a colour by the matrices of its primaries and the formula of sRGB's tone curve: an oracle without ICC."""
    to_xyz = lambda x, y: np.array([x / y, 1, (1 - x - y) / y])
    scaled = lambda columns: columns * np.linalg.solve(columns, to_xyz(*profiles.D65))
    matrix = lambda points: scaled(np.stack([to_xyz(*point) for point in points], 1))
    linear = np.linalg.solve(matrix(profiles.SRGB_PRIMARIES), matrix(primaries) @ decode(np.array(colour) / 255))
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


def srgb_decode(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def saved(file, image=None, profile=None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (16, 16), COLOUR)).save(file, icc_profile=profile, **options)
    return file


def embedded_profile(file):
    with Image.open(file) as image:
        return image.info.get("icc_profile")


def colours(path, index=0, **options):
    return np.asarray(open_image(read_folder(path)[index], **options))[0, 0]


@pytest.mark.parametrize(
    ("primaries", "gamma"),
    [
        (profiles.P3_PRIMARIES, None),
        (profiles.ADOBE_PRIMARIES, 2.2),
        (SWAPPED_PRIMARIES, None),
        (profiles.SRGB_PRIMARIES, 1.8),
    ],
)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "avif"])
def test_a_profile_of_other_colours_becomes_srgb(tmp_path, primaries, gamma, ending):
    profile = profiles.rgb_profile(primaries, gamma and profiles.curve(gamma))
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}, "avif": {"quality": 100}}
    file = saved(tmp_path / f"a.{ending}", profile=profile, **lossless.get(ending, {}))
    with Image.open(file) as image:
        stored = image.convert("RGB").getpixel((0, 0))  # a JPEG's own rounding is not what is asked here
    expected = expected_srgb(stored, primaries, srgb_decode if gamma is None else lambda values: values**gamma)
    assert np.abs(colours(tmp_path) - expected).max() <= 1


def noise(mode="RGB", size=(16, 16)):
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(0).integers(0, 256, (*size[::-1], channels), dtype=np.uint8)
    return Image.fromarray(array if channels > 1 else array[..., 0], mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_images_in_srgb_stay_bit_for_bit(tmp_path, mode):
    """with a profile that says so, or with none; ids, fingerprints and the keys of the cache are as before"""
    image = noise("RGB").quantize(64) if mode == "P" else noise(mode)
    profile = profiles.grey_profile() if mode == "L" else SRGB_PROFILE
    plain, tagged = saved(tmp_path / "plain.png", image), saved(tmp_path / "tagged.png", image, profile)
    assert embedded_profile(tagged) == profile
    for record in read_folder(tmp_path):
        assert open_image(record).tobytes() == open_image(replace(record, path=str(plain), id=None)).tobytes()
        assert record.icc_profile is None and record.pixels_id == record.id


def test_the_fingerprint_of_a_dataset_without_profiles_is_as_before(tmp_path):
    """the value is of a time at which no record knew of profiles"""
    saved(tmp_path / "a.bmp", Image.new("RGB", (16, 16), COLOUR))
    assert read_folder(tmp_path).fingerprint() == "a868d46a62c3a4c0fec9584199aaf20b"


def test_srgb_by_another_name_is_srgb(tmp_path):
    """the profile that LittleCMS makes has its own name and a curve by formula"""
    saved(tmp_path / "a.png", noise(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (record,) = read_folder(tmp_path)
    assert record.icc_profile is None and open_image(record).tobytes() == noise().tobytes()


def test_transparency_is_the_same_after_a_conversion(tmp_path):
    glass = noise("RGBA")
    saved(tmp_path / "a.png", glass, WIDE_PROFILE)
    saved(tmp_path / "b.png", noise("RGB").quantize(16), WIDE_PROFILE, transparency=0)
    first, second = read_folder(tmp_path, alpha_mask=True)
    alpha = np.asarray(record_to_tensors(first)[2][0] * 255).round()
    assert (alpha == np.asarray(glass.getchannel("A"))).all()
    opened = open_image(second, ground=(1, 2, 3))
    hidden = np.asarray(noise("RGB").quantize(16)) == 0
    assert hidden.any() and (np.asarray(opened)[hidden] == (1, 2, 3)).all()
    assert second.icc_profile and (np.asarray(opened)[~hidden] != (1, 2, 3)).any(-1).all()


def test_a_grey_profile_changes_the_tone(tmp_path):
    """linear grey: 55 of 255 is 0.2157 of white, which sRGB writes as 128"""
    linear = profiles.grey_profile(profiles.curve(1.0))
    saved(tmp_path / "a.png", Image.new("L", (4, 4), 55), linear)
    saved(tmp_path / "b.png", Image.new("LA", (4, 4), (55, 255)), linear)
    saved(tmp_path / "c.tif", Image.new("I;16", (4, 4), 55 * 257), linear)
    assert [colours(tmp_path, index).tolist() for index in range(3)] == [[128] * 3] * 3


def test_sixteen_bits_of_linear_grey_keep_their_dark_tones(tmp_path):
    """below 1/255 of white sRGB has 13 levels, of which 8 bits of linear grey tell two"""
    ramp = Image.fromarray(np.arange(0, 257, 8, dtype=np.uint16)[None].repeat(2, 0))
    saved(tmp_path / "a.png", ramp, profiles.grey_profile(profiles.curve(1.0)))
    assert len(np.unique(np.asarray(open_image(read_folder(tmp_path)[0])))) >= 12


def test_inks_are_converted_by_their_profile(tmp_path):
    """the profile says that cyan looks red; without a profile Pillow's arithmetic makes it cyan"""
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    saved(tmp_path / "a.tif", cyan, profiles.ink_profile())
    saved(tmp_path / "b.tif", cyan)
    red, plain = (colours(tmp_path, index).tolist() for index in (0, 1))
    assert red[0] > 240 and red[1] < 20 and red[2] < 20 and plain == [0, 255, 255]


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"no profile at all"),
        ("RGB", WIDE_PROFILE[:200]),
        ("RGB", WIDE_PROFILE[:128] + bytes(len(WIDE_PROFILE) - 128)),
        ("RGB", profiles.ink_profile()),
        ("RGB", profiles.grey_profile(profiles.curve(1.0))),
        ("L", WIDE_PROFILE),
        ("CMYK", WIDE_PROFILE),
    ],
    ids=["garbage", "cut", "hollow", "inks for RGB", "grey for RGB", "RGB for grey", "RGB for inks"],
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_profile_that_cannot_be_used_is_told_and_leaves_the_pixels(tmp_path, mode, profile, strict):
    saved(tmp_path / "in" / "a.tif", noise(mode), profile)
    saved(tmp_path / "plain" / "a.tif", noise(mode))
    dataset, (plain,) = read_folder(tmp_path / "in", strict=strict), read_folder(tmp_path / "plain")
    assert open_image(dataset[0]).tobytes() == open_image(plain).tobytes()
    (line,) = describe_left_out(dataset)
    assert line.startswith(f"note on {tmp_path / 'in' / 'a.tif'}: its colour profile cannot be used (")
    assert dataset[0].pixels_id == dataset[0].id and "icc_profile" not in open_image(dataset[0]).info


def png_header(gamma=None, points=None):
    info = PngImagePlugin.PngInfo()
    if gamma is not None:
        info.add(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    if points is not None:
        info.add(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in points)))
    return info


def test_colours_in_the_header_of_a_png_are_told_and_not_applied(tmp_path):
    """what says sRGB there, as many programs write it, is nothing to tell"""
    srgb, p3 = ((*profiles.D65, *np.ravel(points)) for points in (profiles.SRGB_PRIMARIES, profiles.P3_PRIMARIES))
    saved(tmp_path / "a.png", noise(), pnginfo=png_header(0.45455, srgb))
    saved(tmp_path / "b.png", noise(), pnginfo=png_header(1.0))
    saved(tmp_path / "c.png", noise(), pnginfo=png_header(0.45455, p3))
    saved(tmp_path / "d.png", noise(), SRGB_PROFILE, pnginfo=png_header(1.0))
    dataset = read_folder(tmp_path)
    assert {open_image(record).tobytes() for record in dataset} == {noise().tobytes()}
    assert [(path[-5:], "not in sRGB (gamma 1)" in why, "primaries" in why) for path, why in dataset.skipped] == [
        ("b.png", True, False),
        ("c.png", False, True),
    ]


def test_a_profile_of_srgb_in_a_grey_image_is_no_fault(tmp_path):
    saved(tmp_path / "a.png", noise("L"), SRGB_PROFILE)
    assert read_folder(tmp_path).skipped == ()


def test_conversions_are_counted_by_profile(tmp_path):
    for name in "ab":
        saved(tmp_path / f"{name}.png", profile=WIDE_PROFILE)
    saved(tmp_path / "c.png", profile=profiles.rgb_profile(SWAPPED_PRIMARIES, name="sw\nap\0"))
    saved(tmp_path / "d.png")
    (line,) = describe_colour_profiles(read_folder(tmp_path))
    assert line == "colours converted to sRGB: 2 from Wide colours, 1 from swap"


def old_record(record):
    """The record as it was before profiles were known: with the keys of that time."""
    return replace(record, icc_profile=None)


def test_only_images_in_other_colours_are_encoded_again(tmp_path):
    """what an earlier version encoded of the others stays valid"""
    saved(tmp_path / "in" / "a.png", noise(), WIDE_PROFILE)
    saved(tmp_path / "in" / "b.png", Image.new("RGB", (16, 16), COLOUR), SRGB_PROFILE)
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text("a ball", encoding="utf-8")
    dataset, vae = read_folder(tmp_path / "in"), FakeVae()
    before = ImageDataset(tuple(map(old_record, dataset)))
    encoded(tmp_path, before, vae=vae)
    assert vae.calls == 2
    now = encoded(tmp_path, dataset, vae=vae)
    assert vae.calls == 3
    keys = [[item.latent for item in data.items] for data in (encoded(tmp_path, before, vae=vae), now)]
    assert keys[0][0] != keys[1][0] and keys[0][1] == keys[1][1]
    assert now.fingerprint != encoded(tmp_path, before, vae=vae).fingerprint


class Captioner:
    """Says which colour it was shown."""

    identity = "eye"

    def caption(self, image, prompt):
        return CaptionResult(f"red is {image.getpixel((0, 0))[0]}")


def test_captions_and_thumbnails_of_other_colours_are_made_again(tmp_path):
    saved(tmp_path / "in" / "a.png", profile=WIDE_PROFILE)
    dataset, cache = read_folder(tmp_path / "in"), CaptionCache(tmp_path / "said")
    before = ImageDataset((old_record(dataset[0]),))
    for data in (before, dataset):
        assert caption_dataset(data, Captioner(), lambda record: "", cache=cache).generated == 1
    names = [build_caption_cards(data, tmp_path / "thumbs")[0].thumb for data in (before, dataset)]
    assert names[0] != names[1]
    assert embedded_profile(tmp_path / "thumbs" / names[1]) is None
    assert make_thumbnail(dataset[0]).getpixel((0, 0)) == open_image(dataset[0]).getpixel((0, 0))


@pytest.mark.parametrize("image_format", ["png", "webp", "jpg"])
def test_what_is_saved_anew_is_in_srgb_and_says_nothing_else(tmp_path, image_format):
    saved(tmp_path / "in" / "a.png", profile=WIDE_PROFILE)
    saved(tmp_path / "in" / "b.png", profile=WIDE_PROFILE[:200])
    saved(tmp_path / "in" / "c.tif", Image.new("RGBA", (16, 16), (*COLOUR, 255)), WIDE_PROFILE)
    dataset = read_folder(tmp_path / "in")
    save_dataset(
        ImageDataset(tuple(replace(record, crop=(0, 0, 8, 8)) for record in dataset)),
        tmp_path / "out",
        SaveSettings(image_format=image_format, quality=100),
    )
    for record, copy in zip(dataset, read_folder(tmp_path / "out"), strict=True):
        difference = np.asarray(open_image(copy), int)[0, 0] - np.asarray(open_image(record), int)[0, 0]
        assert np.abs(difference).max() <= (image_format == "jpg") * 2
        assert embedded_profile(copy.path) is None


def test_copies_byte_for_byte_keep_their_profile(tmp_path):
    file = saved(tmp_path / "in" / "a.png", profile=WIDE_PROFILE)
    save_dataset(read_folder(tmp_path / "in"), tmp_path / "out", SaveSettings(image_format="keep"))
    assert (tmp_path / "out" / "a.png").read_bytes() == file.read_bytes()
    assert colours(tmp_path / "out").tolist() == colours(tmp_path / "in").tolist()


def test_a_mask_is_no_colour(tmp_path):
    """its grey says how much is learnt, whatever profile a program put in"""
    saved(tmp_path / "a.png")
    saved(tmp_path / "a.mask.png", Image.new("L", (16, 16), 55), profiles.grey_profile(profiles.curve(1.0)))
    assert (record_to_tensors(read_folder(tmp_path)[0])[2] * 255).round().unique().tolist() == [55]


def test_the_training_batch_holds_the_converted_colours(tmp_path):
    saved(tmp_path / "in" / "a.png", profile=WIDE_PROFILE)
    (tmp_path / "in" / "a.txt").write_text("a ball", encoding="utf-8")
    data = encoded(tmp_path, vae=FakeVae(), text=FakeText())
    mean = data.store.load(data.items[0].latent)["mean"]
    expected = np.asarray(open_image(read_folder(tmp_path / "in")[0]))[0, 0] / 255 * 8
    np.testing.assert_allclose(mean[:, 0, 0].numpy() * 8, expected, rtol=1e-4)
