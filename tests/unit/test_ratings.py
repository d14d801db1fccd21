"""Ratings from files, folder names and lists of pairs; what is said of bad ones; and images kept by their scores."""

import pytest
from trainyard.tests.fakes_data import FakeVae, encoded, image
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from trainyard.trainers.data.encode import encode_dataset
from trainyard.trainers.data.image_scan import ScanOptions
from trainyard.trainers.data.quality.duplicates import duplicate_group_names
from trainyard.trainers.data.ratings import (
    RankSettings,
    check_ratings,
    read_preference_table,
    read_rated_folder,
    select_by_score,
    set_image_scores,
)
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, ImageRecord


def images(folder, *names):
    for seed, name in enumerate(names):
        image(folder / name, seed=seed)


def ratings(dataset):
    return {record.path.rsplit("/", 1)[-1]: record.score for record in dataset}


def test_a_score_file_counts_before_the_metadata(tmp_path):
    images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "metadata.csv").write_text("file_name,score\na.png,1\nb.png,2\n", encoding="utf-8")
    (tmp_path / "b.score").write_text(" 7.5\n", encoding="utf-8")
    assert ratings(read_rated_folder(tmp_path)) == {"a.png": 1, "b.png": 7.5, "c.png": None}


@pytest.mark.parametrize("text", ["good", "", "nan", "1 2"])
def test_a_broken_score_file_takes_its_picture_out_and_says_why(tmp_path, text):
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "b.score").write_text(text, encoding="utf-8")
    dataset = read_rated_folder(tmp_path)
    assert list(ratings(dataset)) == ["a.png"]
    assert "it must hold one number, such as 7.5" in dataset.skipped[-1][1]


def test_folder_names_are_ratings_and_never_repeats(tmp_path):
    """kohya reads 10_name as ten repeats; here it is a rating of ten, and everything is seen once"""
    images(tmp_path, "7.5_good/a.png", "10_best/b.png", "-1/c.png", "rest/d.png", "loose.png")
    dataset = read_rated_folder(tmp_path, "folder names")
    assert ratings(dataset) == {"a.png": 7.5, "b.png": 10, "c.png": -1}
    assert {record.repeats for record in dataset} == {1}
    reasons = dict((path.rsplit("/", 1)[-1], why) for path, why in dataset.skipped)
    assert "does not begin with a rating" in reasons["rest"] and "lies in no folder" in reasons["loose.png"]
    assert {r.repeats for r in read_folder(tmp_path) if r.path.endswith("b.png")} == {10}, (
        "Load Dataset goes on reading repeats"
    )


def test_a_folder_without_rated_folders_is_an_error_that_shows_how_to_name_them(tmp_path):
    images(tmp_path, "good/a.png")
    with pytest.raises(ValueError, match="No folder in .* is named after a rating. Name them 7.5_name"):
        read_rated_folder(tmp_path, "folder names")


# -- pairs -------------------------------------------------------------------------------------------------------------


def pair_table(folder, text):
    (folder / "pairs.csv").write_text(text, encoding="utf-8")
    return folder / "pairs.csv"


def test_pairs_are_read_by_file_name_path_or_stem(tmp_path):
    paths = [str(tmp_path / "set" / f"{name}.png") for name in "abc"]
    assert read_preference_table(pair_table(tmp_path, "better,worse\na.png,b.png\nset/c.png,a\n"), paths) == [
        (0, 1),
        (2, 0),
    ]
    assert read_preference_table(pair_table(tmp_path, "worse;better;who\na.png;b.png;me\n"), paths) == [(1, 0)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n", "first line must name the columns: better,worse"),
        ("better,worse\n", "holds no pair"),
        (
            "better,worse\na.png,z.png\n",
            "names 1 image that the dataset does not hold, or holds several times: z.png",
        ),
        ("better,worse\na.png,a.png\n", "line 2 says that a.png is better than itself"),
        ("better,worse\na.png,\n", "line 2 names fewer than two images"),
    ],
)
def test_a_list_of_pairs_that_cannot_be_meant_is_refused_with_the_place(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        read_preference_table(pair_table(tmp_path, text), [str(tmp_path / f"{name}.png") for name in "ab"])


# -- checking ----------------------------------------------------------------------------------------------------------


def test_missing_constant_and_too_few_ratings_are_told_apart():
    names = [f"{i}.png" for i in range(30)]
    with pytest.raises(ValueError, match=r"None of the 30 images has a rating: 0.png, 1.png.*cat.score"):
        check_ratings(names, [None] * 30)
    with pytest.raises(ValueError, match="All 30 ratings are 5, so there is nothing to learn"):
        check_ratings(names, [5.0] * 30)
    with pytest.raises(
        ValueError, match="10 images are rated.*cannot tell a taste from chance.*Rate at least 20.*switch few on"
    ):
        check_ratings(names, [1.0, 2.0] * 5 + [None] * 20)
    check_ratings(names, [1.0, 2.0] * 5 + [None] * 20, few=True)
    check_ratings(names, [1.0, 2.0] * 15)


def test_ratings_travel_with_the_encoded_pictures_which_need_no_text_encoder(tmp_path):
    images(tmp_path / "in", "a.png", "b.png")
    (tmp_path / "in" / "b.score").write_text("3", encoding="utf-8")
    data = encoded(
        tmp_path, read_rated_folder(tmp_path / "in"), captions=CaptionSettings(caption_mode=CAPTION_MODE_EMPTY)
    )
    bare = encode_dataset(
        read_rated_folder(tmp_path / "in"),
        CaptionSettings(caption_mode=CAPTION_MODE_EMPTY),
        BucketSettings(resolution=16, step=8),
        True,
        FakeVae(),
        None,
        tmp_path / "c",
    )
    for some in (data, bare):
        assert [item.score for item in some.items] == [None, 3.0]
    assert bare.empty_key is None and all(item.flipped and not item.caption_keys for item in bare.items)
    with pytest.raises(ValueError, match="no CLIP is connected to encode captions with"):
        encode_dataset(
            read_rated_folder(tmp_path / "in"),
            CaptionSettings(trigger="sks"),
            BucketSettings(resolution=16, step=8),
            True,
            FakeVae(),
            None,
            tmp_path / "c",
        )


def test_near_duplicates_share_a_group(tmp_path):
    from PIL import Image

    image(tmp_path / "in" / "a.png", (64, 64), seed=1)
    Image.open(tmp_path / "in" / "a.png").resize((80, 80)).save(tmp_path / "in" / "copy.png")
    image(tmp_path / "in" / "other.png", (64, 64), seed=2)
    data = encoded(tmp_path, captions=CaptionSettings(caption_mode=CAPTION_MODE_EMPTY))
    first, copy, other = duplicate_group_names(data, ScanOptions())
    assert first == copy != other


# -- keeping -----------------------------------------------------------------------------------------------------------


def dataset(*scores):
    return ImageDataset(tuple(ImageRecord(str(i), f"{i}.png", (8, 8), score=score) for i, score in enumerate(scores)))


def kept(data, **settings):
    stays, goes = select_by_score(data, RankSettings(**settings))
    return "".join(r.id for r in stays), "".join(r.id for r in goes)


def test_pictures_are_kept_by_share_threshold_or_number_in_their_order():
    data = dataset(3.0, 9.0, 1.0, 7.0)
    assert kept(data, by="share", share=0.5) == ("13", "02")
    assert kept(data, by="threshold", threshold=3.0) == ("013", "2")
    assert kept(data, by="number", number=3) == ("013", "2")
    assert kept(data, by="number", number=99) == ("0123", "")


def test_the_best_or_the_worst_first_when_asked():
    data = dataset(3.0, 9.0, 1.0, 7.0)
    assert kept(data, by="number", number=2, keep_order=False) == ("13", "02")
    assert kept(data, by="number", number=3, keep_order=False, lowest=True) == ("203", "1")
    assert kept(data, by="threshold", threshold=3.0, lowest=True) == ("02", "13")


def test_ties_stay_in_the_order_they_came_in():
    assert kept(dataset(5.0, 5.0, 5.0), by="number", number=2, keep_order=False) == ("01", "2")


def test_what_has_no_score_and_what_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="1 image of 2 have no score: 1.png. Put Score Images before"):
        kept(dataset(1.0, None))
    with pytest.raises(ValueError, match="No image of 2 is kept with threshold = 5; the scores go from 1 to 2"):
        kept(dataset(1.0, 2.0), by="threshold", threshold=5.0)
    with pytest.raises(ValueError, match="There are 2 images and 3 scores"):
        set_image_scores(dataset(1.0, 2.0), [1, 2, 3])


def test_scores_are_written_into_a_new_dataset():
    before = dataset(1.0, 2.0)
    after = set_image_scores(before, [5, 6.5])
    assert [r.score for r in after] == [5.0, 6.5] and [r.score for r in before] == [1.0, 2.0]
