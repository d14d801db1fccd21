"""Colours that a file tells without an ICC profile are converted to sRGB, or told where they cannot be."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from trainyard.tests import profiles
from trainyard.tests.unit.test_colour_profiles import (
    COLOUR,
    WIDE_PROFILE,
    colours,
    embedded_profile,
    expected_srgb,
    noise,
    saved,
    srgb_decode,
)
from trainyard.trainers.data.avif_boxes import read_avif_nclx
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, describe_colour_profiles, open_image
from trainyard.trainers.data.writers import SaveSettings, save_dataset

BT2020_PRIMARIES = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
NTSC_PRIMARIES = ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070))  # BT.601, 525 lines
CODES = [  # primaries and transfer of H.273, with what they mean
    ((12, 13), profiles.P3_PRIMARIES, srgb_decode),
    ((9, 13), BT2020_PRIMARIES, srgb_decode),
    ((9, 1), BT2020_PRIMARIES, srgb_decode),
    ((6, 6), NTSC_PRIMARIES, srgb_decode),
    ((1, 4), profiles.SRGB_PRIMARIES, lambda values: values**2.2),
    ((12, 8), profiles.P3_PRIMARIES, lambda values: values),
]


def coded_png(file, codes, image=None, profile=None, numbers=(0, 1)):
    """A PNG with a cICP chunk before its pixels. numbers: matrix and full range."""
    info = PngImagePlugin.PngInfo()
    info.add(b"cICP", bytes((*codes, *numbers)))
    return saved(file, image, profile, pnginfo=info)


def coded_avif(file, codes, **options):
    saved(file, quality=100, **options)
    before, data = b"colrnclx" + struct.pack(">HH", 1, 13), file.read_bytes()
    assert data.count(before) == 1
    file.write_bytes(data.replace(before, b"colrnclx" + struct.pack(">HH", *codes)))
    return file


def adobe_exif(space=65535, index=b"R03\0"):
    """EXIF marks, written from the TIFF specification: the first directory, that of EXIF and that of interoperability."""
    entry = lambda tag, kind, count, value: struct.pack("<HHI4s", tag, kind, count, value)
    directory = lambda *entries: struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    long = lambda value: struct.pack("<I", value)
    first = directory(entry(0x8769, 4, 1, long(26)))  # 8 + 18 bytes
    second = directory(entry(0xA001, 3, 1, struct.pack("<Hxx", space)), entry(0xA005, 4, 1, long(56)))
    return b"Exif\0\0II*\0" + long(8) + first + second + directory(entry(1, 2, 4, index))


@pytest.mark.parametrize(("codes", "primaries", "decode"), CODES, ids=[str(row[0]) for row in CODES])
@pytest.mark.parametrize(("ending", "write"), [("png", coded_png), ("avif", coded_avif)])
def test_colours_told_by_a_code_become_srgb(tmp_path, codes, primaries, decode, ending, write):
    file = write(tmp_path / f"a.{ending}", codes)
    with Image.open(file) as image:
        stored = image.convert("RGB").getpixel((0, 0))
    expected = expected_srgb(stored, primaries, decode)
    assert np.abs(np.array(stored) - expected).max() > 4
    assert np.abs(colours(tmp_path) - expected).max() <= 1
    assert read_folder(tmp_path).skipped == ()


@pytest.mark.parametrize("codes", [(1, 13), (1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize(("ending", "write"), [("png", coded_png), ("avif", coded_avif)])
def test_codes_of_srgb_leave_the_image_as_it_is(tmp_path, codes, ending, write):
    file = write(tmp_path / f"a.{ending}", codes)
    (record,) = dataset = read_folder(tmp_path)
    with Image.open(file) as image:
        assert open_image(record).tobytes() == image.convert("RGB").tobytes()
    assert record.pixels_id == record.id and dataset.skipped == ()


@pytest.mark.parametrize(
    ("codes", "numbers", "told"),
    [
        ((9, 16), (0, 1), "its colours are HDR (PQ), which sRGB cannot hold"),
        ((9, 18), (0, 1), "its colours are HDR (HLG), which sRGB cannot hold"),
        ((77, 13), (0, 1), "by a code that is not known here (primaries 77)"),
        ((1, 99), (0, 1), "by a code that is not known here (transfer 99)"),
        ((9, 13), (9, 1), "(matrix 9, range 1; both must be for RGB)"),
        ((9, 13), (0, 0), "(matrix 0, range 0; both must be for RGB)"),
    ],
)
def test_codes_that_cannot_be_converted_are_told_and_leave_the_pixels(tmp_path, codes, numbers, told):
    coded_png(tmp_path / "a.png", codes, noise(), numbers=numbers)
    (record,) = dataset = read_folder(tmp_path)
    assert open_image(record).tobytes() == noise().tobytes() and record.pixels_id == record.id
    assert len(dataset.skipped) == 1 and told in dataset.skipped[0][1]


def test_an_avif_in_hdr_is_told(tmp_path):
    coded_avif(tmp_path / "a.avif", (9, 16))
    assert "its colours are HDR (PQ)" in read_folder(tmp_path).skipped[0][1]


def test_the_code_of_a_png_goes_before_its_profile_and_its_numbers(tmp_path):
    """where it can be converted; HDR has its profile for those who cannot"""
    numbers = PngImagePlugin.PngInfo()
    numbers.add(b"cICP", bytes((1, 13, 0, 1)))
    numbers.add(b"gAMA", struct.pack(">I", 100_000))
    for name, codes in (("p3", (12, 13)), ("srgb", (1, 13)), ("hdr", (9, 16))):
        coded_png(tmp_path / f"{name}.png", codes, profile=WIDE_PROFILE if name != "p3" else b"broken")
    saved(tmp_path / "numbers.png", pnginfo=numbers)
    dataset = read_folder(tmp_path)
    hdr, plain, p3, srgb = (np.asarray(open_image(record))[0, 0] for record in dataset)
    wide = expected_srgb(COLOUR, profiles.P3_PRIMARIES, srgb_decode)
    assert tuple(srgb) == tuple(plain) == COLOUR and dataset.skipped == ()
    assert np.abs(p3 - wide).max() <= 1 and np.abs(hdr - wide).max() <= 1
    assert describe_colour_profiles(dataset) == ["colours converted to sRGB: 1 from Wide colours, 1 from Display P3"]


def test_the_profile_of_an_avif_goes_before_its_code(tmp_path):
    saved(tmp_path / "plain.avif", profile=WIDE_PROFILE, quality=100)
    data = (tmp_path / "plain.avif").read_bytes()
    place = data.index(b"colrnclx") + 8
    (tmp_path / "coded.avif").write_bytes(data[:place] + struct.pack(">HH", 9, 1) + data[place + 4 :])
    assert read_avif_nclx((tmp_path / "coded.avif").read_bytes()) == (9, 1)
    coded, plain = read_folder(tmp_path)
    assert open_image(coded).tobytes() == open_image(plain).tobytes() and coded.icc_profile == "Wide colours"


def test_a_code_after_the_pixels_or_cut_short_says_nothing(tmp_path):
    data = saved(tmp_path / "plain.png").read_bytes()
    chunk = lambda content: struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    start, end, code = data.index(b"IDAT") - 4, len(data) - 12, b"cICP" + bytes((12, 13, 0, 1))
    for name, place, content in (("early", start, code), ("late", end, code), ("short", start, code[:-1])):
        (tmp_path / f"{name}.png").write_bytes(data[:place] + chunk(content) + data[place:])
    dataset = read_folder(tmp_path)
    assert dataset.skipped == ()
    assert [record.icc_profile for record in dataset] == ["Display P3", None, None, None]


@pytest.mark.parametrize(
    ("ending", "options"), [("jpg", {"quality": 100, "subsampling": 0}), ("png", {}), ("webp", {})]
)
def test_adobe_rgb_told_by_exif_becomes_srgb(tmp_path, ending, options):
    file = saved(tmp_path / f"a.{ending}", exif=adobe_exif(), **options)
    with Image.open(file) as image:
        stored = image.convert("RGB").getpixel((0, 0))
    expected = expected_srgb(stored, profiles.ADOBE_PRIMARIES, lambda values: values ** (563 / 256))
    assert np.abs(colours(tmp_path) - expected).max() <= 1
    assert describe_colour_profiles(read_folder(tmp_path)) == ["colours converted to sRGB: 1 from Adobe RGB (1998)"]


def adobe_tiff(file, **marks):
    """A TIFF of 8 x 8 pixels, written from its specification: the pixels, then the directories of `adobe_exif` moved
    behind the image's own entries."""
    entry = lambda tag, kind, value: struct.pack("<HHII", tag, kind, 1, value)
    exif = adobe_exif(**marks)[32:]  # without the first directory, which lies at 8 to 26
    pixels = bytes(COLOUR) * 64 + struct.pack("<3H", 8, 8, 8)
    own = [(256, 3, 8), (257, 3, 8), (259, 3, 1), (262, 3, 2), (273, 4, 8), (277, 3, 3), (278, 3, 8), (279, 4, 192)]
    place = 8 + len(pixels)
    behind = place + 2 + 12 * (len(own) + 2) + 4
    exif = exif.replace(struct.pack("<HHII", 0xA005, 4, 1, 56), struct.pack("<HHII", 0xA005, 4, 1, behind + 30))
    bits = struct.pack("<HHII", 258, 3, 3, 8 + 192)
    entries = b"".join(
        [*(entry(*row) for row in own[:2]), bits, *(entry(*row) for row in [*own[2:], (0x8769, 4, behind)])]
    )
    head = b"II*\0" + struct.pack("<I", place)
    file.write_bytes(head + pixels + struct.pack("<H", len(own) + 2) + entries + bytes(4) + exif)
    return file


def test_adobe_rgb_told_by_the_exif_of_a_tiff_becomes_srgb(tmp_path):
    adobe_tiff(tmp_path / "a.tif")
    adobe_tiff(tmp_path / "b.tif", space=1)
    adobe_tiff(tmp_path / "c.tif", index=b"R98\0")
    expected = expected_srgb(COLOUR, profiles.ADOBE_PRIMARIES, lambda values: values ** (563 / 256))
    assert np.abs(colours(tmp_path) - expected).max() <= 1
    assert [tuple(colours(tmp_path, index)) for index in (1, 2)] == [COLOUR, COLOUR]
    assert describe_colour_profiles(read_folder(tmp_path)) == ["colours converted to sRGB: 1 from Adobe RGB (1998)"]


@pytest.mark.parametrize(
    ("exif", "profile"),
    [
        (adobe_exif(index=b"R98\0"), None),
        (adobe_exif(space=1), None),
        (adobe_exif()[:-14], None),
        (adobe_exif()[:30] + b"R03", None),
        (adobe_exif(), profiles.rgb_profile(profiles.SRGB_PRIMARIES)),
    ],
    ids=["R98", "sRGB", "cut", "cut in the middle", "a profile of sRGB"],
)
def test_other_and_damaged_marks_leave_the_image_as_it_is(tmp_path, exif, profile):
    saved(tmp_path / "a.jpg", profile=profile, exif=exif)
    (record,) = read_folder(tmp_path)
    assert record.icc_profile is None and record.pixels_id == record.id


def test_grey_images_have_a_tone_and_no_primaries(tmp_path):
    coded_png(tmp_path / "a.png", (12, 13), Image.new("L", (4, 4), 55))
    coded_png(tmp_path / "b.png", (12, 8), Image.new("L", (4, 4), 55))
    coded_png(tmp_path / "c.png", (1, 8), Image.new("I;16", (4, 4), 55 * 257))
    dataset = read_folder(tmp_path)
    assert dataset.skipped == () and [record.icc_profile is None for record in dataset] == [True, False, False]
    assert [colours(tmp_path, index).tolist() for index in range(3)] == [[55] * 3, [128] * 3, [128] * 3]


def test_a_turned_image_keeps_its_colours(tmp_path):
    """the orientation makes a new image, of no format"""
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add(b"cICP", bytes((12, 13, 0, 1)))
    saved(tmp_path / "a.png", Image.new("RGB", (16, 8), COLOUR), exif=exif, pnginfo=info)
    assert read_folder(tmp_path)[0].size == (8, 16)
    assert np.abs(colours(tmp_path) - expected_srgb(COLOUR, profiles.P3_PRIMARIES, srgb_decode)).max() <= 1


def test_what_is_saved_anew_is_in_srgb_without_the_code(tmp_path):
    coded_png(tmp_path / "in" / "a.png", (12, 13))
    dataset = read_folder(tmp_path / "in")
    cropped = ImageDataset(tuple(replace(record, crop=(0, 0, 8, 8)) for record in dataset))
    save_dataset(cropped, tmp_path / "out", SaveSettings(image_format="png"))
    (copy,) = read_folder(tmp_path / "out")
    assert copy.icc_profile is None and embedded_profile(copy.path) is None
    assert b"cICP" not in (tmp_path / "out" / "a.png").read_bytes()
    assert colours(tmp_path / "out").tolist() == colours(tmp_path / "in").tolist()


def test_a_damaged_avif_says_nothing_of_its_colours(tmp_path):
    """cut anywhere, and with each of its first bytes changed: no error, and no endless loop"""
    data = coded_avif(tmp_path / "a.avif", (9, 16)).read_bytes()
    assert read_avif_nclx(data) == (9, 16)
    head = data.index(b"mdat") - 4
    for end in range(head):
        assert read_avif_nclx(data[:end]) is None
    for place in range(head):
        for value in (0, 1, 255):
            read_avif_nclx(data[:place] + bytes([value]) + data[place + 1 :])
