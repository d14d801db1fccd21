"""What bucketing tells about a dataset, worked by hand, and the page that shows it."""

import numpy as np
import pytest
from trainyard.trainers.data.bucket_report import (
    MAX_BUCKET_TILES,
    REPORTED_BATCH_SIZES,
    assign_buckets,
    count_partial_batch_images,
    draw_buckets_sheet,
    format_bucket_report,
)
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.records import ImageDataset, ImageRecord


def dataset(*sizes, repeats=(), skipped=()):
    times = dict(enumerate(repeats))
    return ImageDataset(
        tuple(ImageRecord(str(i), f"/in/{i}.png", size, repeats=times.get(i, 1)) for i, size in enumerate(sizes)),
        skipped,
    )


def test_every_record_gets_its_bucket_and_the_given_dataset_stays_as_it_was():
    given = dataset((1000, 1000), (900, 1000), (800, 1000), skipped=(("/in/broken.png", "broken"),))
    result = assign_buckets(given, BucketSettings(resolution=512))
    assert [record.bucket for record in result.dataset] == [(512, 512), (512, 512), (448, 576)]
    assert [record.bucket for record in given] == [None] * 3 and result.dataset.skipped == given.skipped
    assert result.dataset.fingerprint() != given.fingerprint(), "training sees the difference"


def test_sizes_that_were_decided_before_are_decided_anew():
    first = assign_buckets(dataset((1000, 1000)), BucketSettings(resolution=512)).dataset
    assert [record.bucket for record in assign_buckets(first, BucketSettings(resolution=256)).dataset] == [(256, 256)]


def test_rows_by_hand():
    """1000x1000 -> 512x512, nothing cut, scaled by .512. 900x1000 -> scaled by 512/900 = .569 to 512x569: 57 of 569
    rows are cut, .1002"""
    (row,) = assign_buckets(
        dataset((1000, 1000), (900, 1000), repeats=(3, 2)), BucketSettings(resolution=512)
    ).bucket_stats
    assert (row.bucket, row.images, row.per_epoch) == ((512, 512), 2, 5)
    assert row.mean_cropped_share == pytest.approx(57 / 569 / 2) and row.scales == pytest.approx(
        (0.512, 512 / 900), abs=1e-3
    )


def test_what_does_not_fill_a_batch_by_hand():
    """5 and 3 images an epoch: batch 2: 1 + 1; batch 3: 2 + 0; batch 4: 1 + 3; batch 8: 5 + 3"""
    rows = assign_buckets(dataset((512, 512), (256, 512), repeats=(5, 3)), BucketSettings(resolution=512)).bucket_stats
    assert [count_partial_batch_images(rows, batch) for batch in (1, 2, 3, 4, 8)] == [0, 2, 2, 4, 8]


def test_the_report_names_who_was_merged_who_is_alone_and_who_is_enlarged():
    """as in test_buckets: 850x1000 joins 512x512 within max_crop .16, 200x800 finds nobody and is enlarged"""
    given = dataset((850, 1000), (512, 512), (512, 512), (200, 800))
    words = format_bucket_report(
        assign_buckets(given, BucketSettings(resolution=512, max_crop=0.16, upscale=True))
    ).splitlines()
    assert words[0] == "4 images in 2 buckets, 4 per epoch (tight rules, 512 px, step 64)"
    assert words[1] == "512x512: 3 images, 3 per epoch, 5.0% cut off, scaled by 0.60 to 1.00"
    assert words[2] == "256x1024: 1 image, 1 per epoch, 0.0% cut off, scaled by 1.28"
    assert words[3] == "merged: 0.png 448x576 -> 512x512 (15.0% cut off)"
    assert words[4] == "fewer than 2 in their bucket, nothing within max_crop 0.16 to join: 3.png 256x1024"
    assert words[5] == "enlarged: 3.png 1.28x"
    assert words[6] == "In batches that are not full, of 4 images an epoch, by batch size: 2: 2, 3: 1"


def test_long_lists_are_cut_and_counted():
    sizes = [(512, 512 + 64 * i) for i in range(40)]
    words = format_bucket_report(
        assign_buckets(dataset(*sizes), BucketSettings(resolution=4096, merge=2, max_crop=0.0))
    )
    assert "and 28 more" in words and len(words.splitlines()) == 40 + 3


def test_a_dataset_without_a_pair_of_a_size_hears_of_batch_one():
    words = format_bucket_report(assign_buckets(dataset((512, 512), (256, 1024)), BucketSettings(resolution=512)))
    assert words.endswith("only a batch of 1 is ever full.") and all(
        f"{batch}:" not in words.splitlines()[-1] for batch in REPORTED_BATCH_SIZES
    )


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="no images. Load a folder"):
        assign_buckets(ImageDataset(()), BucketSettings())


def test_the_page_draws_every_bucket_to_one_scale():
    """a bucket of twice the width is drawn twice as wide; the fullest is filled to the top and one a quarter as full to
    a quarter"""
    given = dataset(*[(512, 512)] * 8, *[(1024, 512)] * 2)
    page = np.asarray(draw_buckets_sheet(assign_buckets(given, BucketSettings(resolution=1024, merge=1))))
    filled = (page == (0x3B, 0x6E, 0xA5)).all(-1)
    columns = filled.sum(0)
    square, wide = columns[: page.shape[1] // 2], columns[page.shape[1] // 2 :]
    assert (wide > 0).sum() == pytest.approx(2 * (square > 0).sum(), abs=4)
    assert square.max() == pytest.approx(4 * wide.max(), abs=6), "72 px high and full, 72 px high and a quarter full"


def test_the_page_of_a_crowd_shows_the_fullest():
    sizes = [(256 + 8 * i, 2048 - 8 * i) for i in range(MAX_BUCKET_TILES + 20)]
    result = assign_buckets(dataset(*sizes), BucketSettings(resolution=4096, step=8, merge=1))
    assert len(result.bucket_stats) == MAX_BUCKET_TILES + 20 and draw_buckets_sheet(result).width < 4000
