"""Records: what is known about an image, and its pixels when asked for."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, ImageRecord, open_image, open_mask


def record_of(folder, **changes):
    return dataclasses.replace(read_folder(folder)[0], **changes)


def save(folder, image, name="a.png", **options):
    image.save(folder / name, **options)
    return record_of(folder)


def levels(image):
    return np.asarray(image)[..., 0].ravel().tolist()


def test_transparent_pixels_show_the_ground_and_not_their_hidden_colour(tmp_path):
    """red with alpha 0, 255 and 51 (a fifth) over blue"""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 0), (255, 0, 0, 255), (255, 0, 0, 51)])
    shown = open_image(save(tmp_path, image), ground=(0, 0, 255))
    assert np.asarray(shown)[0].tolist() == [[0, 0, 255], [255, 0, 0], [51, 0, 204]]


def test_a_transparent_palette_colour_shows_the_ground(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    assert np.asarray(open_image(save(tmp_path, image, transparency=0)))[0].tolist() == [[255, 255, 255], [0, 255, 0]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    """0, 32768, 65535 of 65535 are 0, 127.5, 255 of 255"""
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert levels(open_image(save(tmp_path, image))) == [0, 128, 255]


FLOATS = [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 51.0, 255.0], [0, 51, 255]), ([-1.0, 0.5, 1.0], [0, 128, 255])]


@pytest.mark.parametrize("values, expected", FLOATS)
def test_floating_point_pictures_are_scaled_by_the_range_that_holds_them(tmp_path, values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert levels(open_image(save(tmp_path, image, "a.tiff"))) == expected


WHOLE = [([0, 51, 255], [0, 51, 255]), ([0, 32768, 65535], [0, 128, 255]), ([0, 2**30, 2**31 - 1], [0, 128, 255])]


@pytest.mark.parametrize("values, expected", WHOLE)
def test_whole_numbers_of_32_bits_are_scaled_by_the_range_that_holds_them(tmp_path, values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert levels(open_image(save(tmp_path, image, "a.tiff"))) == expected


def test_a_rotated_photo_stands_upright_in_pixels_and_in_size(tmp_path):
    """orientation 6: the stored left pixel is on top when shown"""
    image = Image.new("RGB", (2, 1))
    image.putdata([(10, 0, 0), (20, 0, 0)])
    exif = Image.Exif()
    exif[0x0112] = 6
    record = save(tmp_path, image, exif=exif)
    assert record.size == (1, 2)
    assert levels(open_image(record)) == [10, 20]


def test_a_crop_cuts_the_picture_and_its_mask_alike(tmp_path):
    image, mask = Image.new("RGB", (4, 2)), Image.new("L", (4, 2))
    image.putdata([(i, 0, 0) for i in range(8)])
    mask.putdata(list(range(8)))
    image.save(tmp_path / "a.png")
    mask.save(tmp_path / "a.mask.png")
    record = record_of(tmp_path, crop=(1, 0, 3, 2))
    assert record.cropped_size == (2, 2)
    assert levels(open_image(record)) == [1, 2, 5, 6] == np.asarray(open_mask(record)).ravel().tolist()


def test_without_a_mask_there_is_none(tmp_path):
    assert open_mask(save(tmp_path, Image.new("RGBA", (2, 2)))) is None


def test_alpha_is_the_mask_when_asked_for(tmp_path):
    image = Image.new("RGBA", (2, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 200)])
    image.save(tmp_path / "a.png")
    assert np.asarray(open_mask(read_folder(tmp_path, alpha_mask=True)[0])).tolist() == [[0, 200]]


def test_a_mask_of_half_the_size_is_enlarged_and_another_shape_is_refused(tmp_path):
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    Image.new("L", (2, 1), 255).save(tmp_path / "a.mask.png")
    assert open_mask(record_of(tmp_path)).size == (4, 2)
    Image.new("L", (2, 2), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(ValueError, match=r"a\.mask\.png is 2x2 px and its image 4x2 px\. Make the mask as large"):
        open_mask(record_of(tmp_path))


def test_a_file_that_changed_or_went_away_is_refused(tmp_path):
    record = save(tmp_path, Image.new("RGB", (2, 2)))
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has changed since the dataset was loaded\. Load the dataset again"):
        open_image(record)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"Cannot read .*a\.png.*Load the dataset again"):
        open_image(record)


def example():
    return ImageRecord(
        "ab",
        "/x/ä.png",
        (30, 20),
        (1, 2, 11, 12),
        ("one", "two"),
        ("t",),
        0.5,
        "/x/m.png",
        "cd",
        3,
        "val",
        ("blurred",),
    )


def test_a_dataset_is_equal_after_json():
    dataset = ImageDataset((example(), ImageRecord("ef", "b.png", (1, 1))), (("c.png", "broken"),))
    assert ImageDataset.from_json(dataset.to_json()) == dataset


def test_a_record_from_elsewhere_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="no field colour; it knows bucket, captions, clip, controls, crop"):
        ImageRecord.from_dict({"id": "a", "path": "b", "size": [1, 1], "colour": 1})


SEEN = [dict(id="x"), dict(crop=None), dict(captions=("one",)), dict(mask_id="x"), dict(repeats=1), dict(split="train")]


@pytest.mark.parametrize("change", SEEN)
def test_the_fingerprint_changes_with_what_training_sees(change):
    changed = ImageDataset((dataclasses.replace(example(), **change),))
    assert changed.fingerprint() != ImageDataset((example(),)).fingerprint()


def test_the_fingerprint_stays_when_files_move():
    moved = dataclasses.replace(example(), path="/y/b.png", mask="/y/b.mask.png")
    assert ImageDataset((moved,)).fingerprint() == ImageDataset((example(),)).fingerprint()


def test_a_slice_of_a_dataset_is_a_dataset():
    dataset = ImageDataset((example(), ImageRecord("ef", "b.png", (1, 1))))
    assert dataset[1:].records == (dataset[1],) and len(dataset) == 2
