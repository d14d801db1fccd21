"""Control images of edit models: found beside their images, in tables and in folders; encoded, mirrored, saved."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.tests.fakes_data import FakeText, FakeVae, encoded, image
from trainyard.trainers.data.buckets import BucketSettings, place_control, place_records
from trainyard.trainers.data.caption_variants import CaptionSettings
from trainyard.trainers.data.contact_sheet import make_dataset_tile
from trainyard.trainers.data.encoded import REFERENCE_LATENTS
from trainyard.trainers.data.readers import hash_folder_state, read_folder
from trainyard.trainers.data.records import ControlImage, ImageDataset, ImageRecord, describe_controls
from trainyard.trainers.data.writers import KOHYA_LAYOUT, SAVE_LAYOUTS, SaveSettings, save_dataset
from trainyard.trainers.rng import make_generator

SMALL = BucketSettings(resolution=32, step=8)


def control_names(dataset):
    """Name of each image -> names of its control images."""
    return {
        os.path.basename(record.path): [os.path.basename(control.path) for control in record.controls]
        for record in dataset
    }


# -- found -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [["cat.control.png"], ["cat_control.webp"], ["cat_source.png"], ["cat.control.png", "cat.control2.png"]],
)
def test_a_control_image_beside_its_image_is_not_learnt_but_shown(tmp_path, names):
    for number, name in enumerate(["cat.jpg", *names, "dog.png"]):
        image(tmp_path / name, seed=number)
    assert control_names(read_folder(tmp_path)) == {"cat.jpg": names, "dog.png": []}


def test_several_come_in_the_order_of_their_numbers(tmp_path):
    for number, name in enumerate(["a.png", "a_control10.png", "a_control2.png", "a_control.png"]):
        image(tmp_path / name, seed=number)
    assert control_names(read_folder(tmp_path)) == {"a.png": ["a_control.png", "a_control2.png", "a_control10.png"]}


def test_an_image_that_only_sounds_like_one_is_an_image(tmp_path):
    image(tmp_path / "open_source.png")
    assert control_names(read_folder(tmp_path)) == {"open_source.png": []}


def test_a_folder_of_control_images(tmp_path):
    for number, name in enumerate(["in/cat.jpg", "in/2_dogs/dog.png", "in/bird.png"]):
        image(tmp_path / name, seed=number)
    for number, name in enumerate(["cat.png", "2_dogs/dog_1.png", "2_dogs/dog_2.png", "fish.png"]):
        image(tmp_path / "shown" / name, seed=9 + number)
    dataset = read_folder(tmp_path / "in", controls=tmp_path / "shown")
    assert control_names(dataset) == {"cat.jpg": ["cat.png"], "dog.png": ["dog_1.png", "dog_2.png"], "bird.png": []}
    assert [reason for _, reason in dataset.skipped] == ["no image for 1 control image: fish.png"]


def test_a_folder_of_control_images_inside_the_folder_is_not_told_as_unread(tmp_path):
    image(tmp_path / "cat.png")
    image(tmp_path / "shown" / "cat.png", seed=1)
    dataset = read_folder(tmp_path, controls=tmp_path / "shown")
    assert control_names(dataset) == {"cat.png": ["cat.png"]} and dataset.skipped == ()


@pytest.mark.parametrize("folder", ["in", "other"])
def test_a_folder_without_any_that_fits_is_refused(tmp_path, folder):
    image(tmp_path / "in" / "cat.png")
    image(tmp_path / "other" / "dog.png")
    with pytest.raises(ValueError, match="folder of the images themselves|No control image"):
        read_folder(tmp_path / "in", controls=tmp_path / folder)


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("control", "from/a.png", ["a.png"]),
        ("control", ["from/a.png", "from/b.png"], ["a.png", "b.png"]),
        ("edit_image", "from/a.png", ["a.png"]),  # DiffSynth
        ("conditioning_image", "b.png", ["b.png"]),  # diffusers; it lies beside the image
    ],
)
def test_a_table_names_control_images_which_are_not_learnt(tmp_path, column, value, found):
    for number, name in enumerate(["cat.png", "b.png", "from/a.png", "from/b.png"]):
        image(tmp_path / name, seed=number)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "cat.png", "text": "a cat", column: value}))
    dataset = read_folder(tmp_path)
    names = control_names(dataset)
    assert names.pop("cat.png") == found
    assert list(names) == ([] if value == "b.png" else ["b.png"])
    assert not any("column" in reason for _, reason in dataset.skipped)


@pytest.mark.parametrize(("value", "says"), [("../x.png", "leads out"), (7, "path of an image"), ("no.png", "no.png")])
def test_a_control_image_that_cannot_be_read_leaves_its_image_out_and_says_so(tmp_path, value, says):
    image(tmp_path / "in" / "cat.png")
    image(tmp_path / "in" / "dog.png", seed=1)
    image(tmp_path / "x.png")
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps({"file_name": "cat.png", "control": value}))
    dataset = read_folder(tmp_path / "in")
    assert list(control_names(dataset)) == ["dog.png"]
    assert any(says in reason for _, reason in dataset.skipped)


def test_a_new_control_image_is_noticed(tmp_path):
    image(tmp_path / "in" / "cat.png")
    image(tmp_path / "shown" / "cat.png", seed=1)
    before = hash_folder_state(tmp_path / "in", None, tmp_path / "shown")
    image(tmp_path / "shown" / "cat_2.png", seed=2)
    assert hash_folder_state(tmp_path / "in", None, tmp_path / "shown") != before


def test_the_record_goes_through_json_and_its_hash_knows_the_content_alone(tmp_path):
    image(tmp_path / "cat.png")
    plain = read_folder(tmp_path).fingerprint()
    image(tmp_path / "cat.control.png", seed=1)
    dataset = read_folder(tmp_path)
    assert ImageDataset.from_json(dataset.to_json()) == dataset
    first = dataset.fingerprint()
    (tmp_path / "cat.control.png").rename(tmp_path / "cat_source.png")
    image(tmp_path / "other" / "cat.png")
    image(tmp_path / "other" / "cat_control.png", seed=2)
    assert read_folder(tmp_path).fingerprint() == first != plain
    assert read_folder(tmp_path / "other").fingerprint() not in (first, plain)


# -- encoded -----------------------------------------------------------------------------------------------------------


def pair(root, size=(32, 32), control=(32, 32), **more):
    image(root / "in" / "a.png", size)
    image(root / "in" / "a.control.png", control, seed=1)
    (root / "in" / "a.txt").write_text("make it red")
    return encoded(root, buckets=SMALL, captions=CaptionSettings(dropout=more.pop("dropout", 0.0)), **more)


def test_a_batch_shows_the_control_image_as_the_hosts_nodes_do(tmp_path):
    data = pair(tmp_path)
    batch = data.make_batch([0], make_generator(0))
    (reference,) = batch.conds[0][REFERENCE_LATENTS]
    wanted, _ = FakeVae().encode(
        torch.from_numpy(np.asarray(Image.open(tmp_path / "in" / "a.control.png")) / 255.0)[None]
    )
    assert data.items[0].control_numel == 48
    assert reference.shape == (1, 3, 4, 4) and torch.allclose(reference, wanted.float(), atol=1e-6)


def test_it_is_shown_with_the_empty_caption_too(tmp_path):
    batch = pair(tmp_path, dropout=1.0).make_batch([0], make_generator(0))
    assert batch.captions == [""] and REFERENCE_LATENTS in batch.conds[0]


def test_a_mirrored_image_is_learnt_from_the_mirrored_control_image(tmp_path):
    data = pair(tmp_path, flip=True)
    plain, mirrored = (data.load_controls(data.items[0], flip)[REFERENCE_LATENTS][0] for flip in (False, True))
    shown = Image.open(tmp_path / "in" / "a.control.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    wanted, _ = FakeVae().encode(torch.from_numpy(np.asarray(shown) / 255.0)[None])
    assert torch.allclose(mirrored, wanted.float(), atol=1e-6) and not torch.equal(plain, mirrored)
    for seed in range(8):
        batch = data.make_batch([0], make_generator(seed))
        is_mirrored = torch.equal(batch.x0[0], data.store.load(data.items[0].flipped)["mean"].float())
        assert torch.equal(batch.conds[0][REFERENCE_LATENTS][0], mirrored if is_mirrored else plain)


@pytest.mark.parametrize(
    ("size", "control", "wanted"),
    [
        ((64, 32), (128, 64), "as the image"),  # the same shape: aligned
        ((64, 32), (32, 64), (16, 32)),  # another: its own, at the area of the bucket
        ((32, 32), (20, 17), (16, 16)),  # never enlarged, sides in steps
        ((32, 32), (8, 8), "as the image"),
        ((64, 32), (8, 9), (16, 16)),  # at least one step
    ],
)
def test_aligned_control_images_go_the_way_of_their_image_and_others_keep_their_shape(size, control, wanted):
    record = ImageRecord("a", "a.png", size)
    ((_, placement),) = place_records([record], SMALL)
    placed = place_control(ControlImage("b", "b.png", control), record, placement, 16)
    assert placed == placement if wanted == "as the image" else placed.bucket == wanted
    assert all(
        0 <= left and left + side <= whole
        for left, side, whole in zip(placed.crop, placed.bucket, placed.scaled, strict=True)
    )


def test_an_aligned_control_image_is_cropped_as_its_image(tmp_path):
    image(tmp_path / "b.png", (64, 32))
    record = ImageRecord("a", "a.png", (128, 64), crop=(64, 0, 128, 64))
    aligned = record.control_record(ControlImage("b", str(tmp_path / "b.png"), (64, 32)))
    other = record.control_record(ControlImage("b", str(tmp_path / "b.png"), (64, 64)))
    assert (aligned.crop, other.crop) == ((32, 0, 64, 32), None)


def test_another_control_image_is_another_dataset_and_the_image_is_not_encoded_again(tmp_path):
    first, vae = pair(tmp_path), FakeVae()
    image(tmp_path / "in" / "a.control.png", (32, 32), seed=7)
    second = encoded(tmp_path, buckets=SMALL, vae=vae)
    assert vae.calls == 1 and second.fingerprint != first.fingerprint
    assert second.items[0].latent == first.items[0].latent and second.items[0].controls != first.items[0].controls


# -- saved -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", SAVE_LAYOUTS)
def test_a_saved_dataset_is_read_back_with_its_control_images(tmp_path, layout):
    for number, name in enumerate(["cat.png", "cat.control.png", "cat_control2.png", "dog.png"]):
        image(tmp_path / "in" / name, (32, 16), seed=number)
    dataset = read_folder(tmp_path / "in")
    save_dataset(dataset, tmp_path / "out", SaveSettings(layout=layout))
    again = read_folder(tmp_path / "out")
    assert [[c.id for c in record.controls] for record in again] == [[c.id for c in r.controls] for r in dataset]
    assert again.fingerprint() == dataset.fingerprint() or layout == KOHYA_LAYOUT  # its folder's name is a caption


def test_an_image_is_not_saved_under_the_name_of_a_control_image(tmp_path):
    image(tmp_path / "one" / "cat.png")
    image(tmp_path / "two" / "cat_source.png", seed=1)
    dataset = ImageDataset((*read_folder(tmp_path / "one"), *read_folder(tmp_path / "two")))
    save_dataset(dataset, tmp_path / "out", SaveSettings())
    assert len(read_folder(tmp_path / "out")) == 2


# -- seen by the text encoder ------------------------------------------------------------------------------------------


def reading_text():
    text = FakeText()
    text.image_reader = "reader"
    return text


def test_captions_are_read_beside_the_images_own_control_image_and_the_empty_one_too(tmp_path):
    for number in range(2):
        image(tmp_path / "in" / f"{number}.png", (32, 32), seed=number)
        image(tmp_path / "in" / f"{number}.control.png", (32, 32), seed=9 + number)
        (tmp_path / "in" / f"{number}.txt").write_text("make it red")
    text = reading_text()
    data = encoded(tmp_path, buckets=SMALL, text=text, captions=CaptionSettings(dropout=0.5))
    assert sorted(text.seen) == ["", "", "", "make it red", "make it red"], "one caption, read beside two images"
    assert all(len(images) == 1 and images[0].shape == (1, 32, 32, 3) for images in text.images)
    keys = [(*item.caption_keys, item.empty_key) for item in data.items]
    assert len({data.empty_key, *keys[0], *keys[1]}) == 5
    told = {data.make_batch([0], make_generator(seed)).captions[0] for seed in range(20)}
    assert told == {"", "make it red"}
    for seed in range(20):
        batch = data.make_batch([1], make_generator(seed))
        own = keys[1][0] if batch.captions[0] else keys[1][1]
        assert torch.equal(batch.conds[0]["cross_attn"], data.store.load(own)["cross_attn"])


def test_a_text_encoder_that_does_not_see_them_reads_each_caption_once(tmp_path):
    text = FakeText()
    pair(tmp_path, text=text)
    assert text.seen == ["", "make it red"] and text.images == []


def test_the_way_of_reading_is_part_of_the_dataset(tmp_path):
    plain, seeing = pair(tmp_path), pair(tmp_path, text=reading_text())
    assert plain.fingerprint != seeing.fingerprint and plain.items[0].caption_keys != seeing.items[0].caption_keys


def test_mirrored_images_are_refused_where_the_text_encoder_would_see_them_unmirrored(tmp_path):
    with pytest.raises(ValueError, match="flip is on"):
        pair(tmp_path, text=reading_text(), flip=True)


# -- shown -------------------------------------------------------------------------------------------------------------


def test_a_page_of_the_dataset_shows_control_image_and_image_side_by_side(tmp_path):
    for name, colour in (("a.png", "blue"), ("a.control.png", "red")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    tile = make_dataset_tile(read_folder(tmp_path)[0], 192)
    assert tile.image.getpixel((40, 96)) == (255, 0, 0) and tile.image.getpixel((150, 96)) == (0, 0, 255)
    assert "1 control image" in tile.lines[1]


def test_what_was_found_is_told(tmp_path):
    for name, seed in (("a.png", 1), ("a.control.png", 1), ("b.png", 2), ("b.control.png", 3), ("c.png", 4)):
        image(tmp_path / name, seed=seed)
    assert describe_controls(read_folder(tmp_path).records) == [
        "2 control images of 2 images; 1 image without: c.png; the image itself, which teaches to change nothing: a.png"
    ]
