"""Check Dataset on control images: each fault by its words, and a good set without any."""

import pytest
from PIL import Image, ImageDraw
from trainyard.tests.drawn import texture
from trainyard.trainers.data.quality.checks import QualitySettings, check_dataset_quality
from trainyard.trainers.data.readers import read_folder

OFF = dict.fromkeys(("blur", "enlarged", "duplicates", "contrast", "exposure", "borders", "shape", "captions"), False)
SETTINGS = QualitySettings(resolution=64, reject_below=0, warn_below=0, **OFF)


def edited(image):
    """With one small thing changed."""
    image = image.copy()
    ImageDraw.Draw(image).rectangle([8, 8, 31, 31], fill="red")
    return image


def flags(root, changes):
    """{name: what is said of its control images} of three pairs, the files of `changes` put over theirs; None: gone."""
    for number, name in enumerate("abc"):
        image = texture((96, 96), seed=number)
        edited(image).save(root / f"{name}.png")
        image.save(root / f"{name}.control.png")
        (root / f"{name}.txt").write_text(f"make it {name}", encoding="utf-8")
    for file, change in changes.items():
        if change is None:
            (root / file).unlink()
        elif isinstance(change, str):
            (root / file).write_text(change, encoding="utf-8")
        else:
            change.save(root / file)
    found = check_dataset_quality(read_folder(root), SETTINGS)
    assert all(finding.check == "control" for one in found.images for finding in one.findings)
    return {one.record.path[-5]: [finding.detail for finding in one.findings] for one in found.images if one.findings}


def test_a_good_set_has_no_findings(tmp_path):
    assert flags(tmp_path, {}) == {}


def test_a_set_without_control_images_has_none(tmp_path):
    gone = {f"{name}.control.png": None for name in "abc"}
    assert flags(tmp_path, gone) == {}


@pytest.mark.parametrize(("changes", "wanted"), [
    ({"b.control.png": None}, {"b": ["no control image, and 2 of 3 images have one"]}),
    ({"b.control.png": edited(texture((96, 96), seed=1))},
     {"b": ["b.control.png shows the same as its image (0.0 levels apart < 5)"]}),
    ({"b.control.png": texture((96, 64), seed=1)}, {"b": ["b.control.png is 96x64 px, another shape than 96x96"]}),
    ({"b.control.png": texture((40, 40), seed=1)}, {"b": ["b.control.png is 40x40 px < 0.5 of 96x96"]}),
    ({"b.control1.png": texture((96, 96), seed=1)},
     {"b": ["b.control.png is shown twice", "b.control1.png is shown twice"]}),
    ({"c.control.png": texture((96, 96), seed=1), "c.txt": "make it b"},
     {"c": ["the same control images and the same caption as b.png: two answers to one"]}),
    ({"c.control.png": texture((96, 96), seed=1)}, {}),
], ids=["missing", "identical", "shape", "small", "twice", "two answers", "one source, two edits"])  # fmt: skip
def test_a_fault_is_told_for_its_image_only(tmp_path, changes, wanted):
    assert flags(tmp_path, changes) == wanted


def test_a_copy_saved_as_jpeg_is_the_same_and_a_small_edit_is_not(tmp_path):
    image = texture((256, 256), seed=7)
    edited(image).save(tmp_path / "a.png")
    edited(image).save(tmp_path / "a.control.jpg", quality=90)
    found = check_dataset_quality(read_folder(tmp_path), SETTINGS).images[0]
    assert ["shows the same as its image" in finding.detail for finding in found.findings] == [True]
    image.save(tmp_path / "a.control.jpg", quality=90)
    assert not check_dataset_quality(read_folder(tmp_path), SETTINGS).images[0].findings


def test_references_of_their_own_shapes_are_no_fault(tmp_path):
    assert flags(tmp_path, {f"{name}.control.png": texture((64, 96), seed=9) for name in "abc"}) == {}


def test_a_control_image_that_is_gone_is_told(tmp_path):
    edited(texture((96, 96))).save(tmp_path / "a.png")
    Image.new("RGB", (96, 96)).save(tmp_path / "a.control.png")
    dataset = read_folder(tmp_path)
    (tmp_path / "a.control.png").unlink()
    (one,) = check_dataset_quality(dataset, SETTINGS).images
    assert [finding.detail.startswith("a.control.png cannot be read: Cannot read") for finding in one.findings] == [
        True
    ]
