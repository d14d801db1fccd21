"""Datasets saved to folders: what is read back is what was saved, and nothing that lies there is lost."""

import dataclasses
import errno
import hashlib
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image
from trainyard.trainers.data import writers
from trainyard.trainers.data.metadata import METADATA_FILES
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, open_image, open_mask
from trainyard.trainers.data.writers import SAVE_LAYOUTS, SaveSettings, format_save_summary, save_dataset


class Cut(BaseException):
    """An interrupt, as the host raises it."""


def pixels(size, mode="RGB", seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(array.squeeze(-1) if channels == 1 else array)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture
def source(tmp_path):
    """Every kind of image and fact that a record can hold."""
    folder = tmp_path / "source"
    folder.mkdir()
    pixels((12, 8)).save(folder / "plain.png")
    pixels((12, 8), seed=1).save(folder / "photo.JPG", exif=rotated())
    pixels((12, 8), "RGBA", 2).save(folder / "glass.webp", lossless=True, exact=True)
    pixels((12, 8), "L", 3).save(folder / "grey.bmp")
    pixels((12, 8), seed=4).convert("P").save(folder / "palette.gif")
    pixels((12, 8), "L", 5).save(folder / "plain.mask.png")
    (folder / "plain.txt").write_text("a plain ball", encoding="utf-8")
    rows = [
        {"file_name": "plain.png", "score": 7.5, "repeats": 3, "tags": ["ball", "plain"], "split": "validation"},
        {"file_name": "photo.JPG", "captions": ["ein Käfer, rot", "a beetle"], "repeats": 2},
        {"file_name": "grey.bmp", "captions": [], "tags": "grey", "pair": "one", "strength": -1},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def loaded(source, **options):
    return read_folder(source, alpha_mask=True, **options)


def told(record):
    """Everything but where the files lie and how their bytes are."""
    mask = open_mask(record)
    facts = dataclasses.replace(
        record, id="", path="", mask=None, mask_id=None, crop=None, size=record.cropped_size, flags=()
    )
    return facts, open_image(record).tobytes(), mask and mask.tobytes()


def facts(dataset):
    return sorted(map(repr, map(told, dataset)))


def state(folder):
    return {
        str(f.relative_to(folder)): hashlib.sha1(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }


@pytest.mark.parametrize("image_format", ["keep", "png", "webp"])
@pytest.mark.parametrize("layout", SAVE_LAYOUTS)
def test_what_is_read_back_is_what_was_saved(source, tmp_path, layout, image_format):
    """captions, alternatives, tags, scores, repeats, splits, pairs, masks, alpha, and every pixel"""
    dataset = loaded(source)
    saved = save_dataset(dataset, tmp_path / "out", SaveSettings(layout=layout, image_format=image_format))
    back = read_folder(saved.folder, caption_lines="alternatives")
    assert facts(back) == facts(dataset) and back.skipped == ()


def test_pictures_that_nothing_changed_are_copied_byte_for_byte(source, tmp_path):
    dataset = loaded(source)
    saved = save_dataset(dataset, tmp_path / "out", SaveSettings())
    assert saved.copied_count == len(dataset) == 5
    assert {r.id for r in read_folder(saved.folder)} == {r.id for r in dataset}


def test_a_crop_is_saved_without_loss_and_takes_its_mask_along(source, tmp_path):
    dataset = ImageDataset(tuple(dataclasses.replace(r, crop=(1, 2, 6, 7)) for r in loaded(source)))
    saved = save_dataset(dataset, tmp_path / "out", SaveSettings())
    back = read_folder(saved.folder, caption_lines="alternatives")
    assert saved.copied_count == 0 and facts(back) == facts(dataset)
    assert {r.size for r in back} == {(5, 5)} and {pathlib.Path(r.path).suffix for r in back} == {".png"}


def test_a_jpg_shows_transparency_over_white_and_says_when_a_side_is_too_long(source, tmp_path, monkeypatch):
    saved = save_dataset(loaded(source), tmp_path / "out", SaveSettings(image_format="jpg", quality=100))
    names = {path.name for path in saved.folder.iterdir() if path.suffix == ".jpg"}
    assert names == {"glass.jpg", "grey.jpg", "palette.jpg", "plain.jpg"} and saved.copied_count == 1, (
        "photo.JPG is one already"
    )
    monkeypatch.setitem(writers.MAX_FORMAT_SIDE_PX, ".webp", 10)
    with pytest.raises(ValueError, match=r"is 12x8 px, and a \.webp ends at 10 px a side\. Save as png"):
        save_dataset(loaded(source), tmp_path / "other", SaveSettings(image_format="webp"))


def test_kohyas_folders_hold_the_repeats(source, tmp_path):
    saved = save_dataset(loaded(source), tmp_path / "out", SaveSettings(layout="kohya", concept="my: cat"))
    assert sorted(p.name for p in saved.folder.iterdir() if p.is_dir()) == ["1_my_ cat", "2_my_ cat", "3_my_ cat"]
    assert (saved.folder / "1_my_ cat" / "glass.txt").read_text() == "\n", (
        "no caption, and not the folder's name instead"
    )


def test_several_captions_are_lines_and_the_person_is_told(source, tmp_path):
    saved = save_dataset(loaded(source), tmp_path / "out", SaveSettings())
    assert (saved.folder / "photo.txt").read_text(encoding="utf-8") == "ein Käfer, rot\na beetle"
    assert "set caption_lines to alternatives" in format_save_summary(saved, loaded(source))


def test_a_line_break_in_a_caption_stays_where_lines_mean_nothing_and_becomes_a_space_where_they_do(source, tmp_path):
    plain, other = loaded(source)[:2]
    broken = dataclasses.replace(plain, captions=("one\ntwo",))
    saved = save_dataset(ImageDataset((broken,)), tmp_path / "a", SaveSettings())
    assert read_folder(saved.folder)[0].captions == ("one\ntwo",)
    saved = save_dataset(
        ImageDataset((broken, dataclasses.replace(other, captions=("x", "y")))), tmp_path / "b", SaveSettings()
    )
    assert ("one two",) in {r.captions for r in read_folder(saved.folder, caption_lines="alternatives")}


def test_names_that_meet_are_told_apart_and_none_is_lost(tmp_path):
    """a.png and a.jpg would share a.txt, A.png is a.png on many disks, x.mask.jpg as png would be the mask of x"""
    for folder, name in (("1", "a.png"), ("1", "x.mask.jpg"), ("2", "a.jpg"), ("3", "A.png"), ("4", "a_2.png")):
        (tmp_path / folder).mkdir(exist_ok=True)
        pixels((8, 8), seed=int(folder)).save(tmp_path / folder / name)
    dataset = ImageDataset(tuple(r for folder in "1234" for r in read_folder(tmp_path / folder)))
    saved = save_dataset(dataset, tmp_path / "out", SaveSettings(image_format="png"))
    assert sorted(p.name for p in saved.folder.glob("*.png")) == [
        "A_3.png",
        "a.png",
        "a_2.png",
        "a_2_2.png",
        "x.mask_.png",
    ]
    assert len(read_folder(saved.folder)) == 5
    assert "4 images got another name" in saved.notes[0]


def test_a_folder_that_holds_anything_is_refused_until_overwriting_is_asked_for(source, tmp_path):
    target = save_dataset(loaded(source), tmp_path / "out", SaveSettings()).folder
    before = state(target)
    with pytest.raises(ValueError, match="holds files already. Choose another name, or turn overwrite on"):
        save_dataset(loaded(source)[:4], target, SaveSettings())
    assert state(target) == before
    save_dataset(loaded(source)[:1], target, SaveSettings(), overwrite=True)
    assert len(read_folder(target)) == 1, "the old images are gone"
    assert sorted(os.listdir(tmp_path)) == ["out", "source"], "nothing is left beside it"


def test_the_same_dataset_is_saved_once(source, tmp_path):
    target = save_dataset(loaded(source), tmp_path / "out", SaveSettings()).folder
    before = [path.stat().st_mtime_ns for path in sorted(target.iterdir())]
    again = save_dataset(loaded(source), target, SaveSettings())
    assert again.image_count == 5 and "It lies there already" in format_save_summary(again, loaded(source))
    assert [path.stat().st_mtime_ns for path in sorted(target.iterdir())] == before
    (target / "plain.mask.png").unlink()
    for settings in (SaveSettings(), SaveSettings(layout="kohya")):
        with pytest.raises(ValueError, match="holds files already"):
            save_dataset(loaded(source), target, settings)


def test_what_a_person_put_into_a_saved_folder_is_never_replaced(source, tmp_path):
    target = save_dataset(loaded(source), tmp_path / "out", SaveSettings()).folder
    (target / "notes.md").write_text("mine")
    with pytest.raises(
        ValueError, match=r"holds 1 file that Save Dataset did not put there: notes\.md\. It is not replaced"
    ):
        save_dataset(loaded(source), target, SaveSettings(), overwrite=True)
    for folder in ("own", "odd"):
        (tmp_path / folder).mkdir()
        pixels((8, 8)).save(tmp_path / folder / "a.png")
    (tmp_path / "odd" / ".trainyard.json").write_text("[1")
    for folder in ("own", "odd"):
        with pytest.raises(ValueError, match=r"did not put there: a\.png"):
            save_dataset(loaded(source), tmp_path / folder, SaveSettings(), overwrite=True)


def test_a_dataset_is_not_saved_onto_its_own_pictures(source, tmp_path):
    before = state(source)
    with pytest.raises(ValueError, match="holds images of this dataset"):
        save_dataset(loaded(source), source, SaveSettings(), overwrite=True)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match="holds images of this dataset"):
        save_dataset(loaded(source), tmp_path / "link", SaveSettings(), overwrite=True)
    assert state(source) == before


def test_a_file_and_an_empty_dataset_are_refused(source, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file. Choose another name"):
        save_dataset(loaded(source), tmp_path / "file", SaveSettings())
    with pytest.raises(ValueError, match="no images to save"):
        save_dataset(ImageDataset(()), tmp_path / "out", SaveSettings())


def stop(error, at=3):
    calls = []

    def check(*_):
        calls.append(1)
        if len(calls) == at:
            raise error

    return check


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_leaves_everything_as_it_was(source, tmp_path, overwrite):
    if overwrite:
        save_dataset(loaded(source)[:2], tmp_path / "out", SaveSettings())
    before = state(tmp_path)
    with pytest.raises(Cut):
        save_dataset(loaded(source), tmp_path / "out", SaveSettings(), overwrite=overwrite, check_interrupt=stop(Cut()))
    assert state(tmp_path) == before and (tmp_path / "out").exists() == overwrite


def test_a_full_disk_leaves_everything_as_it_was_and_says_so(source, tmp_path, monkeypatch):
    save_dataset(loaded(source)[:2], tmp_path / "out", SaveSettings())
    before, write, full = (
        state(tmp_path),
        writers.write_saved_file,
        stop(OSError(errno.ENOSPC, "No space left on device"), 5),
    )
    monkeypatch.setattr(writers, "write_saved_file", lambda *args: (full(), write(*args)))
    with pytest.raises(
        OSError,
        match=r"could not be saved to .*out \(No space left on device\); \d+ MiB are free\. Nothing was changed",
    ):
        save_dataset(loaded(source), tmp_path / "out", SaveSettings(), overwrite=True)
    assert state(tmp_path) == before


def test_when_the_new_folder_cannot_be_moved_the_old_one_comes_back(source, tmp_path, monkeypatch):
    save_dataset(loaded(source)[:2], tmp_path / "out", SaveSettings())
    before, rename = state(tmp_path), os.rename
    monkeypatch.setattr(
        os, "rename", lambda a, b: rename(a, b) if not str(a).endswith(".part") else stop(OSError(13, "denied"), 1)()
    )
    with pytest.raises(OSError, match="denied"):
        save_dataset(loaded(source), tmp_path / "out", SaveSettings(), overwrite=True)
    assert state(tmp_path) == before


def test_a_picture_that_changed_since_it_was_loaded_stops_the_save(source, tmp_path):
    dataset = loaded(source)
    pixels((4, 4)).save(source / "plain.png")
    with pytest.raises(ValueError, match=r"plain\.png has changed since the dataset was loaded"):
        save_dataset(dataset, tmp_path / "out", SaveSettings())
    assert not (tmp_path / "out").exists()


def test_progress_counts_every_picture(source, tmp_path):
    seen = []
    save_dataset(loaded(source), tmp_path / "out", SaveSettings(), report=lambda *args: seen.append(args))
    assert [done for done, total, _ in seen] == [1, 2, 3, 4, 5] and {total for _, total, _ in seen} == {5}
    assert seen[0][2] == "glass.webp"


def test_saved_pictures_cannot_hide_behind_names_of_tables(tmp_path):
    """metadata.png has a sidecar metadata.txt, and metadata.json stays a table"""
    pixels((8, 8)).save(tmp_path / "metadata.png")
    (tmp_path / "metadata.txt").write_text("a table")
    saved = save_dataset(read_folder(tmp_path), tmp_path / "out", SaveSettings(layout="metadata.jsonl"))
    assert read_folder(saved.folder)[0].captions == ("a table",) and "metadata.jsonl" in METADATA_FILES
