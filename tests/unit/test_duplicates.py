"""The same image more than once is found and the best one stays; different images stay apart."""

import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from trainyard.tests.drawn import BICUBIC, jpeg, softened, texture
from trainyard.trainers.data.image_scan import ScanOptions
from trainyard.trainers.data.quality import duplicates
from trainyard.trainers.data.quality.duplicates import (
    ADD_COPY_CAPTIONS,
    FLAG_COPIES,
    DuplicatePair,
    DuplicateSettings,
    deduplicate,
    find_feature_pairs,
    find_hash_pairs,
    group_duplicates,
    iterate_close_hashes,
    make_duplicate_tiles,
)
from trainyard.trainers.data.quality.perceptual_hash import (
    ImageSignature,
    compute_image_signature,
    popcount,
    signature_kernel,
)
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.similarity.diversity import sample_evenly, vendi, vendi_from_features

CHANGES = {
    "jpeg 40": lambda image: jpeg(image, 40),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "mirrored": ImageOps.mirror,
    "mirrored jpeg": lambda image: jpeg(ImageOps.mirror(image), 60),
}


def scene(seed):
    return texture((320, 240), seed, slope=1.2)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", range(4))
def test_a_changed_copy_is_near_its_original(change, seed):
    prints = [compute_image_signature(scene(seed)), compute_image_signature(CHANGES[change](scene(seed)))]
    (pair,) = find_hash_pairs(prints, 10)
    assert ("mirrored" in pair.reason) == ("mirrored" in change)


def test_a_mirror_image_is_another_picture_when_asked():
    assert (
        find_hash_pairs(
            [compute_image_signature(scene(0)), compute_image_signature(ImageOps.mirror(scene(0)))], 10, mirrored=False
        )
        == []
    )


def test_different_pictures_are_far_apart():
    prints = [compute_image_signature(scene(seed)) for seed in range(60)]
    assert find_hash_pairs(prints, 10) == []


def test_the_hash_of_the_mirror_image_is_known_without_mirroring():
    for seed in range(5):
        image = scene(seed).resize((32, 32))
        here, mirrored = compute_image_signature(image), compute_image_signature(ImageOps.mirror(image))
        assert bin(here.mirrored ^ mirrored.hash).count("1") <= 1
        assert bin(here.hash ^ mirrored.mirrored).count("1") <= 1


def test_the_same_shape_in_another_colour_is_another_picture():
    def disc(colour):
        image = Image.new("RGB", (200, 200), "#eeeeee")
        ImageDraw.Draw(image).ellipse([50, 30, 150, 130], fill=colour)
        return compute_image_signature(image)

    assert find_hash_pairs([disc("#cc2222"), disc("#2222cc")], 10) == []
    assert len(find_hash_pairs([disc("#cc2222"), disc("#c82525")], 10)) == 1


def test_plain_pictures_are_not_all_duplicates_of_each_other():
    assert (
        find_hash_pairs(
            [
                compute_image_signature(Image.new("RGB", (64, 64), colour))
                for colour in ("#404040", "#808080", "#818181")
            ],
            10,
        )
        == []
    )


def test_bits_are_counted_as_python_counts_them(monkeypatch):
    values = np.random.default_rng(0).integers(0, 2**63, (5, 7), dtype=np.uint64) * 2 + 1
    expected = [[bin(value).count("1") for value in row] for row in values.tolist()]
    assert popcount(values).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert popcount(values).tolist() == expected, "numpy 1"


def test_the_fast_search_finds_what_a_slow_one_does(monkeypatch):
    """across the borders of its blocks"""
    monkeypatch.setattr(duplicates, "COMPARISON_BLOCK", 7)
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**16, 40).astype(np.uint64)  # 16 bits: many are near
    slow = [(i, j, bin(int(hashes[i] ^ hashes[j])).count("1")) for i in range(40) for j in range(i + 1, 40)]
    assert sorted(iterate_close_hashes(hashes, hashes, 4, np.ones(40, bool))) == [pair for pair in slow if pair[2] <= 4]


def test_five_thousand_hashes_are_compared_in_a_few_seconds():
    rng = np.random.default_rng(0)
    colours = np.zeros((4, 4, 2))
    numbers = [int(n) for n in rng.integers(0, 2**63, 10_000)]
    prints = [ImageSignature(numbers[i], numbers[5000 + i], 50.0, colours) for i in range(4998)]
    prints += [
        ImageSignature(numbers[0] ^ 0b111, 0, 50.0, colours),
        ImageSignature(2**63 + 7, numbers[1], 50.0, colours),
    ]
    start = time.perf_counter()
    found = find_hash_pairs(prints, 10)
    assert time.perf_counter() - start < 10
    assert (0, 4998) in {(pair.first, pair.second) for pair in found}
    assert (1, 4999) in {(pair.first, pair.second) for pair in found}, "the mirror image works in both directions"


# -- groups ------------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_copy_belongs_to_the_original_in_whatever_order_they_are_found():
    ties = [DuplicatePair(1, 2, "a"), DuplicatePair(3, 5, "b"), DuplicatePair(2, 5, "c"), DuplicatePair(6, 7, "d")]
    for pairs in (ties, ties[::-1], [ties[2], ties[0], ties[3], ties[1]]):
        first, second = group_duplicates(pairs, order=lambda index: index)
        assert (first.best, set(first.copies)) == (1, {2, 3, 5})
        assert (second.best, second.copies) == (6, (7,))


def test_the_best_one_of_a_group_is_the_one_that_comes_first_in_the_order():
    (group,) = group_duplicates([DuplicatePair(1, 2, "a"), DuplicatePair(2, 3, "b")], order=lambda index: -index)
    assert (group.best, group.copies) == (3, (2, 1))
    assert group.reasons == {2: "b", 1: "a"}


def test_features_tie_what_a_hash_does_not():
    """cosines by hand: 1 and 0.96 are alike, 0.6 is not"""
    features = np.array([[1, 0], [0.96, 0.28], [0.6, 0.8], [0, 0]], np.float32)
    assert [(pair.first, pair.second) for pair in find_feature_pairs(features, 0.95)] == [(0, 1)]
    assert find_feature_pairs(None, 0.95) == []


def folder_of(tmp_path, **images):
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}", encoding="utf-8")
    return read_folder(tmp_path)


def kept(dataset):
    return [record.path.rpartition("/")[2] for record in dataset]


def test_the_largest_copy_stays_and_takes_nothing_of_the_others_unless_asked(tmp_path):
    small, large = scene(0), scene(0).resize((640, 480))
    dataset = folder_of(
        tmp_path,
        a_small=small,
        b_other=scene(1),
        c_large=texture((640, 480), 7),
        d_copy=texture((640, 480), 7).resize((320, 240)),
    )
    large.save(tmp_path / "e.png")
    done = deduplicate(dataset, DuplicateSettings())
    assert kept(done.dataset) == ["a_small.png", "b_other.png", "c_large.png"]
    assert done.dataset[2].captions == ("caption of c_large",)
    ((path, why),) = done.dataset.skipped
    assert path.endswith("d_copy.png")
    assert "of c_large.png" in why and "bits <= 10" in why
    merged = deduplicate(dataset, DuplicateSettings(captions=ADD_COPY_CAPTIONS)).dataset
    assert merged[2].captions == ("caption of c_large", "caption of d_copy")
    assert dataset[2].captions == ("caption of c_large",), "the dataset that came in is what it was"


def test_more_pixels_without_more_detail_do_not_win(tmp_path):
    original = texture((512, 512), 3)
    dataset = folder_of(tmp_path, a_blown_up=original.resize((1536, 1536), BICUBIC), b_original=original)
    assert kept(deduplicate(dataset, DuplicateSettings()).dataset) == ["b_original.png"]


def test_of_equally_large_copies_the_sharpest_stays_and_of_equal_ones_that_with_a_caption(tmp_path):
    dataset = folder_of(
        tmp_path, a=softened(texture((300, 300), 3), 0.7), b=texture((300, 300), 3), c=texture((300, 300), 3)
    )
    (tmp_path / "b.txt").unlink()
    dataset = read_folder(tmp_path)
    assert kept(deduplicate(dataset, DuplicateSettings()).dataset) == ["c.png"]


def test_flagged_copies_all_stay(tmp_path):
    dataset = folder_of(tmp_path, a=scene(0), b=jpeg(scene(0), 50), c=scene(1))
    done = deduplicate(dataset, DuplicateSettings(duplicates=FLAG_COPIES))
    assert [record.flags != () for record in done.dataset] == [False, True, False]
    assert done.dataset[1].flags[0].startswith("duplicate (of a.png, ")
    assert done.dataset.skipped == ()


def test_a_vision_model_finds_the_crop_that_the_hash_misses(tmp_path):
    dataset = folder_of(tmp_path, a=scene(0), b=scene(0).crop((60, 40, 300, 220)), c=scene(1))
    assert len(deduplicate(dataset, DuplicateSettings()).dataset) == 3
    seen = []

    def features(images):
        """as if it recognised the scene: by the order in which they come"""
        seen.extend(image.size for image in images)
        return np.array([[1, 0], [0.98, 0.199], [0, 1]], np.float32)

    done = deduplicate(dataset, DuplicateSettings(), ScanOptions(features=features))
    assert kept(done.dataset) == ["a.png", "c.png"]
    assert "cosine 0.980 >= 0.95" in done.dataset.skipped[0][1]
    assert len(seen) == 3


def test_a_broken_picture_stays_and_is_reported(tmp_path):
    dataset = folder_of(tmp_path, a=scene(0), b=scene(0), c=scene(1))
    (tmp_path / "c.png").write_bytes(b"gone bad")
    done = deduplicate(dataset, DuplicateSettings())
    assert kept(done.dataset) == ["a.png", "c.png"]
    assert "c.png could not be compared" in done.report()
    assert "1 copies of 1 images" in done.report()


def test_the_sheet_shows_groups_side_by_side(tmp_path):
    dataset = folder_of(tmp_path, a=scene(0), b=scene(1), c=scene(0), d=scene(1))
    shown = make_duplicate_tiles(deduplicate(dataset, DuplicateSettings()))
    assert [tile.lines[0] for tile in shown] == ["1: stays", "1: the same file", "2: stays", "2: the same file"]


# -- diversity ---------------------------------------------------------------------------------------------------------


def test_the_vendi_score_of_n_different_pictures_is_n_and_of_one_picture_n_times_1():
    assert vendi(np.eye(7)) == pytest.approx(7)
    assert vendi(np.ones((7, 7))) == pytest.approx(1)
    assert vendi(np.kron(np.eye(3), np.ones((4, 4)))) == pytest.approx(3), "three images, four times each"
    assert vendi_from_features(np.eye(5)) == pytest.approx(5)
    assert vendi_from_features(np.repeat(np.eye(3), 20, axis=0)) == pytest.approx(3), "by the smaller matrix"


def test_without_a_vision_model_different_pictures_count_more_than_copies():
    different = [compute_image_signature(scene(seed)) for seed in range(12)]
    copies = [compute_image_signature(jpeg(scene(seed % 3), 90 - seed)) for seed in range(12)]
    assert vendi(signature_kernel(different)) > 8
    assert vendi(signature_kernel(copies)) == pytest.approx(3, abs=0.5)


def test_a_sample_is_even_and_keeps_both_ends():
    assert sample_evenly(range(5), 10) == [0, 1, 2, 3, 4]
    assert sample_evenly(range(101), 3) == [0, 50, 100]
