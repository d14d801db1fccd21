"""Folders become datasets; what is wrong is said."""

import hashlib
import io
import os
import pathlib
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from trainyard.trainers.data.readers import hash_folder_state, image_extensions, read_folder, require_captions
from trainyard.trainers.data.records import ImageDataset


def image(folder, name, size=(8, 6), colour=(200, 10, 10), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(folder / name)
    return folder / name


def names(dataset):
    return [pathlib.Path(record.path).name for record in dataset]


def test_image_2_comes_before_image_10(tmp_path):
    for name in ("img10.png", "img2.png", "Img1.png", "b.png"):
        image(tmp_path, name)
    assert names(read_folder(tmp_path)) == ["b.png", "Img1.png", "img2.png", "img10.png"]


@pytest.mark.parametrize("ending", image_extensions())
def test_every_accepted_ending_is_read_in_either_case(tmp_path, ending):
    kind = Image.registered_extensions().get(ending, "JPEG")  # Pillow itself does not know .pjpeg
    Image.new("RGB", (8, 6)).save(tmp_path / f"a{ending.upper()}", kind)
    assert [record.size for record in read_folder(tmp_path)] == [(8, 6)]


def test_the_id_is_the_sha1_of_the_bytes(tmp_path):
    file = image(tmp_path, "a.png")
    assert read_folder(tmp_path)[0].id == hashlib.sha1(file.read_bytes()).hexdigest()


def test_captions_come_from_the_file_of_the_same_stem(tmp_path):
    """a.png.cut.png has .png in its stem; core's loader looks for the wrong file there"""
    image(tmp_path, "a.png.cut.png")
    (tmp_path / "a.png.cut.txt").write_text(" a red ball\n", encoding="utf-8")
    image(tmp_path, "b.png")
    (tmp_path / "b.caption").write_text("a blue ball", encoding="utf-8")
    assert [record.captions for record in read_folder(tmp_path)] == [("a red ball",), ("a blue ball",)]


def test_the_asked_caption_extension_wins(tmp_path):
    image(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("tags", encoding="utf-8")
    (tmp_path / "a.caption").write_text("prose", encoding="utf-8")
    assert read_folder(tmp_path, caption_extension=".caption")[0].captions == ("prose",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_not_part_of_the_caption(tmp_path, encoding):
    image(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("ein Käfer".encode(encoding))
    assert read_folder(tmp_path)[0].captions == ("ein Käfer",)


def test_kohya_folders_repeat_and_name_their_images(tmp_path):
    """repeats multiply; the folder's name serves where there is no caption; a folder without a number is reported"""
    image(tmp_path, "a.png")
    image(tmp_path / "10_my cat", "b.png")
    image(tmp_path / "2_dog", "c.png")
    (tmp_path / "2_dog" / "c.txt").write_text("a dog", encoding="utf-8")
    image(tmp_path / "extra", "d.png")
    image(tmp_path / "0_off", "e.png")
    dataset = read_folder(tmp_path, repeats=3)
    assert [(record.repeats, record.captions) for record in dataset] == [(3, ()), (6, ("a dog",)), (30, ("my cat",))]
    assert [pathlib.Path(path).name for path, _ in dataset.skipped] == ["0_off", "extra"]
    assert "name it 1_name" in dataset.skipped[1][1]


def test_masks_are_not_images(tmp_path):
    image(tmp_path, "a.jpg")
    mask = image(tmp_path, "a.mask.png", mode="L", colour=255)
    (record,) = read_folder(tmp_path)
    assert record.mask == str(mask) and record.mask_id == hashlib.sha1(mask.read_bytes()).hexdigest()


def test_alpha_masks_are_for_images_that_have_alpha(tmp_path):
    image(tmp_path, "a.png")
    image(tmp_path, "b.png", mode="RGBA", colour=(1, 2, 3, 4))
    with_mask = read_folder(tmp_path, alpha_mask=True)
    assert [record.mask for record in with_mask] == [None, str(tmp_path / "b.png")]
    assert with_mask.fingerprint() != read_folder(tmp_path).fingerprint()


def noise_jpeg(file):
    array = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(array).save(file, quality=95)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


@pytest.mark.parametrize("name", ["broken.jpg", "broken.png", "broken.webp"])
def test_a_truncated_image_is_reported_and_left_out(tmp_path, name):
    noise_jpeg(tmp_path / name)
    cut(tmp_path / name)
    image(tmp_path, "good.png")
    dataset = read_folder(tmp_path)
    assert names(dataset) == ["good.png"]
    ((path, reason),) = dataset.skipped
    assert path == str(tmp_path / name) and "cannot be decoded" in reason and name in reason
    with pytest.raises(ValueError, match=f"{name} cannot be decoded as an image"):
        read_folder(tmp_path, strict=True)


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM" + bytes(60), b"\xff\xd8\xff\xe0"]
)
def test_a_folder_of_junk_says_what_is_wrong_with_it(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"None of the 1 images in .* can be used: .*a\.png cannot be decoded"):
        read_folder(tmp_path)


def test_a_caption_in_a_foreign_encoding_is_reported(tmp_path):
    image(tmp_path, "a.png")
    image(tmp_path, "b.png")
    (tmp_path / "a.txt").write_bytes("K\xe4fer".encode("latin-1"))
    dataset = read_folder(tmp_path)
    assert names(dataset) == ["b.png"] and "a.txt is not UTF-8 (byte 1). Save it as UTF-8" in dataset.skipped[0][1]


def test_a_link_to_nowhere_is_reported(tmp_path):
    image(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    dataset = read_folder(tmp_path)
    assert (
        names(dataset) == ["a.png"]
        and dataset.skipped[0][0].endswith("b.png")
        and "No such file" in dataset.skipped[0][1]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are no text")
def test_folder_names_that_are_no_text_can_still_be_captions(tmp_path):
    folder = tmp_path / os.fsdecode(b"2_caf\xe9")
    image(folder, "a.png")
    (record,) = dataset = read_folder(tmp_path)
    assert record.captions == ("caf?",) and ImageDataset.from_json(dataset.to_json()) == dataset
    record.captions[0].encode("utf-8")


def test_a_missing_folder_and_a_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist. Check its name"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a\.png is a file\. Give the folder"):
        read_folder(image(tmp_path, "a.png"))


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.mp3").write_bytes(b"x")
    image(tmp_path / "cats", "a.png")
    with pytest.raises(
        ValueError, match=r"it holds 1 \.mp3\. Not read: cats .*name it 1_name.*Images end in \.png, \.jpg"
    ):
        read_folder(tmp_path)


def test_images_without_captions_are_named_when_captions_are_asked_for(tmp_path):
    for i in range(7):
        image(tmp_path, f"{i}.png")
    (tmp_path / "0.txt").write_text("zero", encoding="utf-8")
    (tmp_path / "1.txt").write_text("  \n", encoding="utf-8")
    dataset = read_folder(tmp_path)
    with pytest.raises(
        ValueError, match=r"6 of 7 images have none: 1\.png, 2\.png, 3\.png, 4\.png, 5\.png, \.\.\.\. Put a text file"
    ):
        require_captions(dataset)
    require_captions(dataset[:1])


def test_progress_counts_every_file(tmp_path):
    for name in ("a.png", "b.png"):
        image(tmp_path, name)
    seen = []
    read_folder(tmp_path, progress=lambda *args: seen.append(args))
    assert seen == [(1, 2, "a.png"), (2, 2, "b.png")]


def test_folder_state_changes_with_images_and_captions_only(tmp_path):
    image(tmp_path / "1_cat", "a.png")
    before = hash_folder_state(tmp_path)
    assert hash_folder_state(tmp_path) == before
    (tmp_path / "1_cat" / "a.txt").write_text("a cat", encoding="utf-8")
    assert hash_folder_state(tmp_path) != before


def test_reading_keeps_no_pixels(tmp_path):
    """40 BMP files of 270 KB; what is left after reading is far below one of them per file"""
    data = io.BytesIO()
    Image.new("RGB", (300, 300)).save(data, "BMP")
    for i in range(40):
        (tmp_path / f"{i}.bmp").write_bytes(data.getvalue())
    read_folder(tmp_path)
    tracemalloc.start()
    dataset = read_folder(tmp_path)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(dataset) == 40 and kept < 270_000
