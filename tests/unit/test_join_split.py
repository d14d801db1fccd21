"""Datasets joined and split: how often an image is seen, and on which side it stands."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from trainyard.trainers.data.image_scan import ScanOptions
from trainyard.trainers.data.join_split import (
    SplitSettings,
    find_repeated_images,
    join_datasets,
    parse_dataset_weights,
    split_dataset,
)
from trainyard.trainers.data.quality.duplicates import group_near_duplicates
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, ImageRecord, sha1_hex


def record(name, **facts):
    return ImageRecord(sha1_hex(name.encode()), f"/set/{name}.png", (8, 8), **facts)


def dataset(count, prefix="p", **facts):
    return ImageDataset(
        tuple(record(f"{prefix}x{i}y", **facts) for i in range(count)), ((f"/{prefix}/broken.png", "broken"),)
    )


def repeats(joined_set):
    return [r.repeats for r in joined_set]


def ids(some):
    return {r.id for r in some}


def test_half_as_often_is_two_repeats_against_one():
    assert repeats(join_datasets([dataset(1), dataset(2, "q")], [1, 0.5])) == [2, 1, 1]


def test_repeats_that_are_whole_already_are_not_multiplied():
    """10 repeats at weight 1/2 are 5: no common factor is needed"""
    assert repeats(join_datasets([dataset(1, repeats=3), dataset(1, "q", repeats=10)], [1, 0.5])) == [3, 5]


def test_thirds_and_halves_meet_at_six():
    assert repeats(
        join_datasets([dataset(1), dataset(1, "q"), dataset(1, "r")], parse_dataset_weights("1, 1/2 1/3", 3))
    ) == [6, 3, 2]


def test_joining_keeps_every_fact_and_every_skipped_file_once():
    one = dataset(1, captions=("a",), mask="/m.png", score=2.0)
    both = join_datasets([one, one])
    assert both.records == one.records * 2 and both.skipped == one.skipped
    assert find_repeated_images(both) == [(one[0].path, one[0].path)] and find_repeated_images(one) == []


@pytest.mark.parametrize(("text", "message"), [
    ("1, two", "write one number for each dataset"),
    ("1, 1/0", "write one number for each dataset"),
    ("1", "2 datasets and 1 weights"),
    ("1, 0", "A weight is 0; it must be above 0. To leave a dataset out, disconnect it"),
    ("1, -1", "must be above 0"),
    ("1, nan", "write one number"),
    ("1, 0.12345", "20000 repeats of one image, and 10000 is the most. Use simpler ones"),
])  # fmt: skip
def test_weights_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        join_datasets([dataset(1), dataset(1, "q")], parse_dataset_weights(text, 2))


def test_no_weights_are_ones():
    assert parse_dataset_weights("  ", 3) == [Fraction(1)] * 3


def test_a_split_takes_about_its_share_and_marks_both_sides():
    train, held = split_dataset(dataset(1000), SplitSettings(share=0.2))
    assert 160 <= len(held) <= 240 and len(train) + len(held) == 1000
    assert {r.split for r in train} == {"train"} and {r.split for r in held} == {"validation"}
    assert train.skipped == dataset(1).skipped


def test_adding_a_picture_moves_no_other_one():
    before = split_dataset(dataset(200), SplitSettings())[1]
    after = split_dataset(dataset(300), SplitSettings())[1]
    assert ids(before) == ids(after) & ids(dataset(200)) and len(after) > len(before)


def test_order_and_place_do_not_matter_and_the_seed_does():
    whole = dataset(100)
    settings = SplitSettings(share=0.3)
    assert ids(split_dataset(ImageDataset(whole.records[::-1]), settings)[1]) == ids(split_dataset(whole, settings)[1])
    assert ids(split_dataset(whole, SplitSettings(share=0.3, seed=1))[1]) != ids(split_dataset(whole, settings)[1])


def test_a_number_of_pictures_is_exact_and_a_new_picture_takes_the_place_of_one_at_most():
    before, after = (ids(split_dataset(dataset(count), SplitSettings(pictures=7))[1]) for count in (40, 41))
    assert len(before) == len(after) == 7 and len(before - after) <= 1


def test_a_small_dataset_still_gives_one_picture_to_validation():
    assert len(split_dataset(dataset(3), SplitSettings(share=0.01))[1]) == 1


def test_files_whose_names_differ_in_a_number_only_stay_together():
    names = [f"{animal}{end}" for animal in ("cat", "dog", "owl", "fox") for end in ("", "_1", " (2)", "-copy", "03")]
    train, held = split_dataset(ImageDataset(tuple(map(record, names))), SplitSettings(pictures=1, by="file name"))
    assert len(held) == 5 and len(train) == 15
    assert len({r.path.removeprefix("/set/")[:3] for r in held}) == 1


def test_a_new_member_does_not_move_its_family():
    for seed in range(20):
        some = [record(f"{name}_{i}") for name in ("cat", "dog", "owl") for i in range(3)]
        settings = SplitSettings(pictures=1, by="file name", seed=seed)
        families = [
            {r.path[5:8] for r in split_dataset(ImageDataset(tuple(records)), settings)[1]}
            for records in (some, [*some, record("cat_99")])
        ]
        assert families[0] == families[1]


def test_folders_and_pairs_and_groups_and_equal_files_stay_together():
    """a-b share a folder, b-c a pair, c-d a group, d-e their bytes: all five or none"""
    chain = [
        ImageRecord(i, path, (1, 1), pair=pair)
        for i, path, pair in (
            ("1", "/f/a.png", None),
            ("2", "/f/b.png", "p"),
            ("3", "/g/c.png", "p"),
            ("4", "/h/d.png", None),
            ("4", "/i/e.png", None),
        )
    ]
    rest = [ImageRecord(str(i), f"/{i}/z.png", (1, 1)) for i in range(5, 30)]
    for seed in range(20):
        held = split_dataset(
            ImageDataset((*chain, *rest)), SplitSettings(share=0.3, by="folder", seed=seed), groups={"3": "g", "4": "g"}
        )[1]
        assert sum(r.id in set("1234") for r in held) in (0, 5)


def test_near_duplicates_do_not_stand_on_both_sides(tmp_path):
    """each of twelve images lies there again, smaller, brighter or mirrored"""
    shapes = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64))
        for i in range(12)
    ]
    changes = (lambda p: p.resize((48, 48)), lambda p: p.point(lambda v: min(v + 6, 255)), ImageOps.mirror)
    for i, shape in enumerate(shapes):
        shape.save(tmp_path / f"{i}.png")
        changes[i % 3](shape).save(tmp_path / f"copy of {i}.png")
    images = read_folder(tmp_path)
    train, held = split_dataset(images, SplitSettings(share=0.4), group_near_duplicates(images, ScanOptions()))
    number = lambda side: sorted(int(Path(r.path).stem.split()[-1]) for r in side)
    assert not set(number(train)) & set(number(held)) and len(held) >= 2


def test_a_split_can_be_the_one_that_the_metadata_names():
    marked = ImageDataset((record("a"), record("b", split="validation"), record("c", split="test")))
    train, held = split_dataset(marked, SplitSettings(by="as marked"))
    assert ids(train) == {marked[0].id} and len(held) == 2


@pytest.mark.parametrize(("count", "settings", "message"), [
    (1, {}, "leaves 0 to train on and 1 to validate on; each side needs one"),
    (5, {"share": 0.0}, "a share of 0.0 of 5 images .* leaves 5 to train on and 0"),
    (5, {"pictures": 5}, "5 images of 5 images"),
    (5, {"by": "as marked"}, "0 of 5 images are marked for validation"),
])  # fmt: skip
def test_a_side_without_pictures_is_refused(count, settings, message):
    with pytest.raises(ValueError, match=message):
        split_dataset(dataset(count), SplitSettings(**settings))
