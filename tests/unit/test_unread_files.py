"""Every image, caption and mask in a folder is read or told, however it is named."""

import json
import os
import pathlib
import unicodedata
from datetime import datetime

import pytest
from PIL import Image
from trainyard.trainers.data.captions.sidecars import write_caption_files
from trainyard.trainers.data.file_endings import UNREAD_IMAGE_ENDINGS, VIDEO_ENDINGS, image_extensions
from trainyard.trainers.data.ratings import RATINGS_IN_FOLDER_NAMES, read_rated_folder
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, describe_left_out, open_mask
from trainyard.trainers.data.writers import SaveSettings, save_dataset

NFC, NFD = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")


def image(file, kind=None, mode="RGB", colour=(200, 10, 10)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 6), colour).save(file, kind)
    return file


def text(file, words):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(words, encoding="utf-8")
    return file


def captions(dataset):
    return {pathlib.Path(record.path).name: record.captions for record in dataset}


def told(dataset, root):
    return [(pathlib.Path(path).relative_to(root).as_posix(), reason) for path, reason in dataset.skipped]


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jfif", ".JPE", ".pjpeg", ".pjp"])
def test_a_jpeg_by_another_ending_is_read_with_its_caption_and_saved_as_jpg(tmp_path, ending):
    file = image(tmp_path / "in" / f"a{ending}", "JPEG")
    text(tmp_path / "in" / "a.txt", "from a browser")
    dataset = read_folder(tmp_path / "in")
    assert captions(dataset) == {f"a{ending}": ("from a browser",)} and dataset.skipped == ()
    for image_format in ("keep", "jpg"):
        save_dataset(dataset, tmp_path / image_format, SaveSettings(image_format=image_format))
        assert (tmp_path / image_format / "a.jpg").read_bytes() == file.read_bytes()


def test_images_of_all_usual_formats_are_read():
    usual = ".png .jpg .jpeg .jfif .webp .bmp .tif .tiff .gif .avif .jp2 .tga .ppm".split()
    assert set(usual) <= set(image_extensions())
    assert not set(image_extensions()) & (UNREAD_IMAGE_ENDINGS | VIDEO_ENDINGS)


def test_images_that_cannot_be_read_are_named_with_the_reason(tmp_path):
    """what holds an image and has no ending is found by its first bytes"""
    image(tmp_path / "a.png")
    for name in ("phone.HEIC", "new.jxl", "layers.psd", "raw.CR2", "drawing.svg"):
        (tmp_path / name).write_bytes(b"content")
    text(tmp_path / "clip.txt", "a caption has no image")
    image(tmp_path / "noending", "PNG")
    image(tmp_path / "a.jpg_large", "JPEG")
    (tmp_path / "notes").write_bytes(b"no image")
    dataset = read_folder(tmp_path, strict=True)
    reasons = dict(told(dataset, tmp_path))
    assert captions(dataset) == {"a.png": ()}
    assert reasons["phone.HEIC"] == "images ending in .heic are not read; save it as PNG, JPEG or WebP"
    assert {"new.jxl", "layers.psd", "raw.CR2", "drawing.svg"} <= set(reasons)
    assert (".", "no image for 1 text file: clip.txt") in told(dataset, tmp_path)
    assert "no ending, and it holds an image (PNG)" in reasons["noending"]
    assert "ends in .jpg_large, and it holds an image (JPEG)" in reasons["a.jpg_large"]
    assert reasons["."] == "1 other file not read: 1 without an ending"


def test_what_systems_leave_in_folders_is_not_told(tmp_path):
    image(tmp_path / "a.png")
    for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini", "__MACOSX/._a.png", ".hidden/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert read_folder(tmp_path).skipped == ()


def test_a_folder_of_one_dataset_has_nothing_to_tell(tmp_path):
    """sidecars, tables and masks that are read are no other files"""
    image(tmp_path / "a.png")
    image(tmp_path / "a.mask.png", mode="L", colour=255)
    text(tmp_path / "a.txt", "a ball")
    text(tmp_path / "a.caption", "a ball again")
    text(tmp_path / "a.json", '{"tags": ["red"]}')
    text(tmp_path / "a.score", "7")
    text(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "a ball"}')
    assert read_folder(tmp_path).skipped == ()


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folders_with_images_that_are_not_read_are_named(tmp_path):
    """at every depth, also inside folders that are read, and with images of unread formats only"""
    image(tmp_path / "top.png")
    image(tmp_path / "cats" / "black" / "x.png")
    image(tmp_path / "cats" / "white" / "small" / "x.png")
    image(tmp_path / "10_dog" / "z.png")
    image(tmp_path / "10_dog" / "day2" / "y.png")
    image(tmp_path / "loose" / "y.png")
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.heic").write_bytes(b"x")
    (tmp_path / "empty" / "er").mkdir(parents=True)
    dataset = read_folder(tmp_path, strict=True)
    assert [pathlib.Path(record.path).name for record in dataset] == ["top.png", "z.png"]
    reasons = dict(told(dataset, tmp_path))
    assert list(reasons) == ["10_dog", "cats", "loose", "phone"]
    assert reasons["10_dog"].startswith("1 image in 1 folder inside it not read (day2)")
    assert reasons["cats"].startswith("2 images in 2 folders inside it not read (black, white/small)")
    assert "named like 1_name" in reasons["cats"] and "name it 1_name" in reasons["phone"]


def test_an_image_that_a_table_names_by_its_path_is_read(tmp_path):
    """in a folder that is not read otherwise, with or without the ending; the rest of that folder is told"""
    image(tmp_path / "images" / "1.png")
    image(tmp_path / "images" / "deep" / f"{NFD}.jpg")
    image(tmp_path / "images" / "left.png")
    rows = [("images/1", "one"), (f"images\\deep\\{NFC}.jpg", "two"), ("images/gone.png", "three")]
    lines = [json.dumps({"file_name": name, "text": words}) for name, words in rows]
    text(tmp_path / "metadata.jsonl", "\n".join(lines))
    dataset = read_folder(tmp_path)
    assert captions(dataset) == {"1.png": ("one",), f"{NFD}.jpg": ("two",)}
    (folder, reason), (table, missing) = told(dataset, tmp_path)
    assert folder == "images" and "name it 1_name" in reason
    assert table == "metadata.jsonl" and missing.endswith("images/gone.png")


def test_images_named_by_a_table_come_after_the_others_and_are_not_read_twice(tmp_path):
    image(tmp_path / "z.png")
    image(tmp_path / "1.png", colour=(1, 1, 1))
    image(tmp_path / "3_dog" / "a.png")
    for name in ("10.png", "2.png", "1.png"):
        image(tmp_path / "images" / name)
    image(tmp_path / "3_dog" / "more" / "b.png")
    names = ["images/10.png", "images/2.png", "images/1.png", "3_dog/a.png", "3_dog/more/b.png", "z.png"]
    lines = [json.dumps({"file_name": name, "text": name}) for name in names]
    text(tmp_path / "metadata.jsonl", "\n".join(lines))
    found = [
        (pathlib.Path(record.path).relative_to(tmp_path).as_posix(), record.captions, record.repeats)
        for record in read_folder(tmp_path)
    ]
    assert found == [
        ("1.png", (), 1),
        ("z.png", ("z.png",), 1),
        ("3_dog/a.png", ("3_dog/a.png",), 3),
        ("3_dog/more/b.png", ("3_dog/more/b.png",), 3),
        ("images/1.png", ("images/1.png",), 1),
        ("images/2.png", ("images/2.png",), 1),
        ("images/10.png", ("images/10.png",), 1),
    ]


@pytest.mark.parametrize("name", ["../out.png", "0_off/a.png", "masks/a.png", "link.png/../../out.png", "a\0b/c.png"])
def test_a_table_brings_no_image_from_outside_or_from_what_was_turned_off(tmp_path, name):
    image(tmp_path / "out.png")
    for place in ("a.png", "0_off/a.png", "masks/a.png"):
        image(tmp_path / "in" / place, mode="L", colour=255)
    text(tmp_path / "in" / "metadata.csv", f"file_name,text\n{name},words\n".replace("\0", ""))
    dataset = read_folder(tmp_path / "in", masks=tmp_path / "in" / "masks")
    assert [pathlib.Path(record.path).parent.name for record in dataset] == ["in"]


def test_plain_names_of_a_table_mean_the_only_folder_with_images(tmp_path):
    """where the table's own folder has no images; a name that two folders have is of neither"""
    image(tmp_path / "images" / "1.png")
    image(tmp_path / "images" / "2.png")
    image(tmp_path / "other" / "2.png")
    table = text(tmp_path / "captions.csv", "image,text\n1.png,a ball\n2.png,a cube\n")
    dataset = read_folder(tmp_path, metadata=table)
    assert captions(dataset) == {"1.png": ("a ball",)}
    assert "no single image here for 1 row of captions.csv: 2.png" in str(dataset.skipped)
    image(tmp_path / "top.png")
    assert captions(read_folder(tmp_path, metadata=table)) == {"top.png": ()}


def test_a_table_that_is_not_read_is_told(tmp_path):
    image(tmp_path / "a.png")
    table = text(tmp_path / "captions.csv", "file,text\na.png,a ball\n")
    ((_, reason),) = told(read_folder(tmp_path), tmp_path)
    assert reason == "not read: captions.csv; to read a table, give its name as metadata"
    assert read_folder(tmp_path, metadata=table).skipped == ()


# -- captions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "caption"),
    [
        ("UPPER.PNG", "UPPER.TXT"),
        ("a.png", "a.Txt"),
        ("a.png", "a.png.txt"),
        ("a.PNG", "a.png.TXT"),
        ("a.png", "a.CAPTION"),
        (f"caf{NFC}.png", f"caf{NFD}.txt"),
        (f"caf{NFD}.png", f"caf{NFC}.TXT"),
        (f"caf{NFD}.png", f"caf{NFC}.png.txt"),
        ("v1.2.final.png", "v1.2.final.txt"),
    ],
)
def test_a_caption_is_found_however_systems_write_its_name(tmp_path, picture, caption):
    image(tmp_path / picture)
    text(tmp_path / caption, "a ball")
    dataset = read_folder(tmp_path)
    assert captions(dataset) == {picture: ("a ball",)} and dataset.skipped == ()


def test_the_caption_of_the_exact_name_counts_first(tmp_path):
    """what was read before stays: exact names, then other ways to write them, then the whole file name"""
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    text(tmp_path / "a.caption", "exact")
    text(tmp_path / "a.TXT", "other case")
    text(tmp_path / "b.TXT", "other case")
    text(tmp_path / "b.png.txt", "whole name")
    assert captions(read_folder(tmp_path)) == {"a.png": ("exact",), "b.png": ("other case",)}


def test_letters_in_another_case_are_another_image(tmp_path):
    image(tmp_path / "cat.png")
    text(tmp_path / "Cat.txt", "a cat")
    dataset = read_folder(tmp_path)
    assert captions(dataset) == {"cat.png": ()}
    assert told(dataset, tmp_path) == [(".", "no image for 1 text file: Cat.txt")]


def test_an_image_does_not_take_the_caption_of_a_longer_name(tmp_path):
    """a.png.txt is of a.png.png, whose stem it has"""
    image(tmp_path / "a.png")
    image(tmp_path / "a.png.png")
    text(tmp_path / "a.png.txt", "the longer")
    assert captions(read_folder(tmp_path)) == {"a.png": (), "a.png.png": ("the longer",)}


def test_captions_and_masks_without_an_image_are_named(tmp_path):
    image(tmp_path / "a.png")
    for name in ("orphan.txt", "b.CAPTION", "c.png.txt"):
        text(tmp_path / name, "words")
    image(tmp_path / "d.mask.png", mode="L", colour=255)
    image(tmp_path / "e-masklabel.png", mode="L", colour=255)
    reasons = [reason for _, reason in told(read_folder(tmp_path, strict=True), tmp_path)]
    assert reasons == [
        "no image for 3 text files: b.CAPTION, c.png.txt, orphan.txt",
        "no image for 2 masks: d.mask.png, e-masklabel.png",
    ]


def test_names_in_tables_are_compared_with_accents_in_one_form(tmp_path):
    image(tmp_path / f"{NFD}.png")
    image(tmp_path / f"x{NFC}.png")
    text(tmp_path / "metadata.jsonl", json.dumps({"file_name": f"{NFC}.png", "text": "one"}))
    text(tmp_path / "metadata.csv", f"file_name,text\nx{NFD},two\n")
    assert captions(read_folder(tmp_path)) == {f"{NFD}.png": ("one",), f"x{NFC}.png": ("two",)}


def test_downloaded_facts_behind_the_whole_name_stay_unread(tmp_path):
    """cat.jpg.json of download programs holds scores of another kind"""
    image(tmp_path / "a.jpg")
    image(tmp_path / "b.jpg")
    text(tmp_path / "a.jpg.json", '{"score": 12}')
    text(tmp_path / "b.JSON", '{"score": 3}')
    dataset = read_folder(tmp_path)
    assert [record.score for record in dataset] == [None, 3]
    assert told(dataset, tmp_path) == [(".", "1 other file not read: 1 .json")]


@pytest.mark.parametrize("caption", ["a.TXT", "a.png.txt", "a.Caption"])
def test_a_caption_is_written_to_the_file_that_it_was_read_from(tmp_path, caption):
    image(tmp_path / "a.png")
    file = text(tmp_path / caption, "before")
    (record,) = read_folder(tmp_path)
    changed = ImageDataset((record.__class__(**{**record.__dict__, "captions": ("after",)}),))
    (written,) = write_caption_files(changed, [record.id], [tmp_path], now=datetime(2024, 1, 1))
    assert written.path == file and file.read_text(encoding="utf-8") == "after\n"
    assert captions(read_folder(tmp_path)) == {"a.png": ("after",)}


def test_a_folder_is_listed_once_for_all_its_images(tmp_path, monkeypatch):
    for number in range(20):
        image(tmp_path / f"{number}.png")
    text(tmp_path / "0.txt", "a caption")
    (tmp_path / "sub").mkdir()
    image(tmp_path / "sub" / "not read.png")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    read_folder(tmp_path)
    assert listed == [str(tmp_path), str(tmp_path / "sub")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["pipe", "a.txt", "b.png", "a.mask.png"])
def test_a_named_pipe_is_told_and_not_waited_for(tmp_path, name):
    image(tmp_path / "a.png")
    os.mkfifo(tmp_path / name)
    (record,) = dataset = read_folder(tmp_path)
    assert record.path == str(tmp_path / "a.png") and not record.captions and record.mask is None
    assert any("1 other file not read" in line for line in describe_left_out(dataset)), dataset.skipped


# -- masks -------------------------------------------------------------------------------------------------------------


def test_a_masklabel_is_the_mask_of_its_image(tmp_path):
    """OneTrainer's: white is learnt there as here; -condlabel images are told"""
    image(tmp_path / "cat.jpg")
    mask = image(tmp_path / "cat-masklabel.png", mode="L", colour=99)
    image(tmp_path / "cat-condlabel.png")
    dataset = read_folder(tmp_path)
    assert [(record.path, record.mask) for record in dataset] == [(str(tmp_path / "cat.jpg"), str(mask))]
    assert open_mask(dataset[0]).getextrema() == (99, 99)
    (line,) = describe_left_out(dataset)
    assert line.endswith("not read, because -condlabel images only condition a model: cat-condlabel.png")


@pytest.mark.parametrize(
    ("picture", "mask"),
    [
        ("a.png", "a.MASK.PNG"),
        ("a.png", "a-MaskLabel.png"),
        (f"{NFD}.png", f"{NFC}.mask.png"),
        ("a.png", "a.png.mask.png"),
    ],
)
def test_a_mask_is_found_however_systems_write_its_name(tmp_path, picture, mask):
    image(tmp_path / picture)
    image(tmp_path / mask, "PNG", mode="L", colour=255)
    (record,) = dataset = read_folder(tmp_path)
    assert record.mask == str(tmp_path / mask) and dataset.skipped == ()


def test_the_own_kind_of_mask_counts_before_that_of_another_trainer(tmp_path):
    image(tmp_path / "a.png")
    mask = image(tmp_path / "a.mask.png", mode="L", colour=255)
    image(tmp_path / "a-masklabel.png", mode="L", colour=1)
    assert read_folder(tmp_path)[0].mask == str(mask)


@pytest.mark.parametrize("mask", ["a.png", "a.mask.png", "a-masklabel.png"])
def test_a_folder_of_masks_may_hold_any_kind_of_name(tmp_path, mask):
    image(tmp_path / "in" / "a.jpg")
    file = image(tmp_path / "masks" / mask, mode="L", colour=255)
    assert read_folder(tmp_path / "in", masks=tmp_path / "masks")[0].mask == str(file)


def test_a_saved_image_is_not_called_like_a_mask(tmp_path):
    for name in ("a-masklabel.jpg", "b-condlabel.jpg"):
        image(tmp_path / "in" / name)
    save_dataset(read_folder(tmp_path / "in"), tmp_path / "out", SaveSettings(image_format="png"))
    assert len(read_folder(tmp_path / "out")) == 2


# -- ratings -----------------------------------------------------------------------------------------------------------


def test_a_rating_is_found_however_systems_write_its_name(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "a.SCORE", "7.5")
    dataset = read_rated_folder(tmp_path)
    assert dataset[0].score == 7.5 and dataset.skipped == ()


def test_images_inside_folders_of_a_rated_folder_are_told(tmp_path):
    image(tmp_path / "7_good" / "a.png")
    image(tmp_path / "7_good" / "more" / "b.png")
    image(tmp_path / "2_bad" / "deep" / "c.png")
    reasons = dict(told(read_rated_folder(tmp_path, RATINGS_IN_FOLDER_NAMES), tmp_path))
    assert "7_good/more" in reasons and "(deep)" in reasons["2_bad"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_circle_of_links_stops_nothing(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "back").symlink_to(".")
    assert captions(read_folder(tmp_path)) == {"a.png": ()}
