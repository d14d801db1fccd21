"""Encoding at size: images stream through, the next one is opened while the VAE works, and a record's own bucket is
kept."""

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from trainyard.tests.fakes_data import Cut, FakeText, FakeVae, cached_files, captioned, encoded, image
from trainyard.trainers.data import encode as module
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.cache import DiskCache
from trainyard.trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from trainyard.trainers.data.encode import PREFETCH_IMAGES, prefetch_results
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset
from trainyard.trainers.settings import compute_fingerprint

NO_CAPTIONS = CaptionSettings(caption_mode=CAPTION_MODE_EMPTY)


def openers():
    """Threads that open images, alive now."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("trainyard-open")]


# -- opened ahead ------------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_no_more_than_the_next_ones_are_begun():
    begun = []
    for used, result in enumerate(prefetch_results(lambda i=i: begun.append(i) or i for i in range(20))):
        assert result == used and len(begun) <= used + 1 + PREFETCH_IMAGES, (used, begun)
    assert begun == list(range(20)) and not openers()


def test_a_failure_comes_at_its_own_turn_and_ends_the_thread():
    """what was read before it is used first, so a broken last image costs nothing of the others"""
    tasks = [lambda: 1, lambda: 2, lambda: 1 / 0, lambda: 4]
    results = prefetch_results(tasks)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not openers()


def test_the_next_picture_is_opened_while_the_vae_works(tmp_path, monkeypatch):
    """the VAE waits in its first call until a second image has been opened; one after the other it would wait for
    ever"""
    captioned(tmp_path / "in", 3)
    second, names, original = threading.Event(), [], module.open_bucketed_image

    def opened(p, ground):
        names.append(threading.current_thread().name)
        if len(names) == 2:
            second.set()
        return original(p, ground)

    class Waiting(FakeVae):
        def encode(self, images):
            assert second.wait(20), "no second image was opened"
            return super().encode(images)

    monkeypatch.setattr(module, "open_bucketed_image", opened)
    assert len(encoded(tmp_path, vae=Waiting())) == 3 and all(name.startswith("trainyard-open") for name in names)


def test_an_interrupt_leaves_finished_files_and_no_thread_and_the_rest_is_done_next_time(tmp_path):
    """the 8th of 20 images is cut off: 7 files are whole, and 13 images are left to do, none of them twice"""
    captioned(tmp_path / "in", 20)
    with pytest.raises(Cut):
        encoded(tmp_path, vae=FakeVae(stop_at=8), captions=NO_CAPTIONS)
    assert not openers()
    assert [file.suffix for file in cached_files(tmp_path)] == [".safetensors"] * (1 + 7)
    vae = FakeVae()
    assert len(encoded(tmp_path, vae=vae, captions=NO_CAPTIONS)) == 20 and vae.calls == 13


def test_nothing_is_opened_when_all_is_on_disk(tmp_path, monkeypatch):
    captioned(tmp_path / "in", 3)
    first = encoded(tmp_path)
    monkeypatch.setattr(module, "open_image", lambda *_: pytest.fail("an image was opened"))
    assert encoded(tmp_path).items == first.items


def test_the_same_picture_twice_is_encoded_once(tmp_path):
    captioned(tmp_path / "in", 2)
    (first, second), vae = read_folder(tmp_path / "in"), FakeVae()
    data = encoded(tmp_path, dataset=ImageDataset((first, replace(first, captions=("another",)), second)), vae=vae)
    assert vae.calls == 2 and data.items[0].latent == data.items[1].latent


def test_progress_names_the_picture_at_work(tmp_path):
    captioned(tmp_path / "in", 3)
    vae, seen = FakeVae(), []
    encoded(
        tmp_path,
        vae=vae,
        captions=NO_CAPTIONS,
        report=lambda done, total, text: seen.append((done, total, text, vae.calls)),
    )
    # (done, of, name, images through the VAE): the empty text, then each image before and after its turn
    assert seen[-6:] == [
        (1, 4, "0.png", 0),
        (2, 4, "0.png", 1),
        (2, 4, "1.png", 1),
        (3, 4, "1.png", 2),
        (3, 4, "2.png", 2),
        (4, 4, "2.png", 3),
    ]


def rss():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, monkeypatch):
    """between the 100th and the 1000th image of 192 px the process grows by less than 2 MiB (0.4 to 0.6 measured):
    names and numbers. Held images would be 97 MiB, as tensors for the VAE 380 MiB."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time, and no memory
    (tmp_path / "in").mkdir()
    for i in range(1000):
        Image.new("RGB", (192, 192), (i % 256, i // 256, 7)).save(tmp_path / "in" / f"{i}.bmp")
    seen = {}

    class Watched(FakeVae):
        def encode(self, images):
            answer = super().encode(images)
            if self.calls in (100, 1000):
                gc.collect()
                seen[self.calls] = rss()
            return answer

    data = encoded(tmp_path, vae=Watched(), captions=NO_CAPTIONS, buckets=BucketSettings(resolution=192))
    growth = (seen[1000] - seen[100]) / 2**20
    assert len(data) == 1000 and growth < 2, f"{growth:.1f} MiB"


# -- buckets that are decided already ----------------------------------------------------------------------------------


def in_bucket(root, bucket, size=(40, 24)):
    image(root / "in" / "a.png", size)
    (record,) = read_folder(root / "in")
    return ImageDataset((replace(record, bucket=bucket),))


def test_a_record_is_encoded_at_the_size_it_carries(tmp_path):
    """40x24 px covers 16x16 as 27x16: 11 columns are cut, 5 on the left; by the settings it would be 32x24"""
    (item,) = encoded(
        tmp_path,
        dataset=in_bucket(tmp_path, (16, 16)),
        captions=NO_CAPTIONS,
        buckets=BucketSettings(resolution=32, step=8),
    ).items
    assert item.bucket == (16, 16) and item.shape == (3, 2, 2)
    assert item.size == dict(width=40, height=24, crop_w=5, crop_h=0, target_width=16, target_height=16)


def test_another_bucket_is_another_latent_and_another_dataset(tmp_path):
    datas = [
        encoded(tmp_path, dataset=in_bucket(tmp_path, bucket), captions=NO_CAPTIONS)
        for bucket in (None, (16, 16), (24, 16))
    ]
    assert len({data.items[0].latent for data in datas}) == len({data.fingerprint for data in datas}) == 3


@pytest.mark.parametrize("bucket", [(16, 20), (0, 16)])
def test_a_bucket_that_no_latent_fits_is_refused_before_any_picture(tmp_path, bucket):
    vae = FakeVae()
    with pytest.raises(
        ValueError, match=rf"a\.png is to be trained at {bucket[0]}x{bucket[1]} px and this VAE.*multiple of 8"
    ):
        encoded(tmp_path, dataset=in_bucket(tmp_path, bucket), captions=NO_CAPTIONS, vae=vae)
    assert vae.calls == 0


def test_merged_pictures_are_encoded_in_one_bucket(tmp_path):
    """50x70 px at 32*32 px with steps of 8: 27 x 37.9 -> 24x32, or 24x40 (scaled 28.6 wide), and 32x32 would cut 12.8:
    24x40. Among others of 32x32 it is scaled to 32x45 there, and .29 is cut off"""
    for name, size in (("a", (50, 50)), ("b", (50, 50)), ("c", (50, 70))):
        image(tmp_path / "in" / f"{name}.png", size)
    sizes = dict(resolution=32, step=8, max_crop=0.3)
    for merge, expected in ((1, (24, 40)), (2, (32, 32))):
        data = encoded(tmp_path, captions=NO_CAPTIONS, buckets=BucketSettings(**sizes, merge=merge))
        assert [item.bucket for item in data.items] == [(32, 32), (32, 32), expected]


# -- what a VAE may answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["mean", "std"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_bad_number_of_a_half_precision_vae_stops_the_encode_and_names_the_picture(tmp_path, bad, where, dtype):
    """the third of four images overflows in one cell: two are kept, no bad latent reaches the disk"""

    class Overflowing(FakeVae):
        def encode(self, images):
            mean, _ = super().encode(images)
            std = torch.ones_like(mean)
            if self.calls == 3:
                (mean if where == "mean" else std)[0, 1, 1, 0] = bad
            return mean.to(dtype), std.to(dtype)

    captioned(tmp_path / "in", 4)
    with pytest.raises(ValueError, match=r"turned 2\.png into NaN or infinity.*--fp32-vae"):
        encoded(tmp_path, vae=Overflowing(), captions=NO_CAPTIONS)
    assert len(cached_files(tmp_path)) == 1 + 2


def test_every_text_of_a_wildcard_is_encoded_though_the_caption_was_cached(tmp_path):
    """Encoded once without the switch, then with it: the cache of the first time does not stand in for the texts of the
    second."""
    captioned(tmp_path / "in", 1)
    (text,) = (tmp_path / "in").glob("*.txt")
    text.write_text("a {red|blue} hat, small;;;round ||| x", encoding="utf-8")
    assert encoded(tmp_path).items[0].captions == ("a {red|blue} hat, small, round, x",)
    again = encoded(tmp_path, captions=CaptionSettings(wildcards=True))
    assert again.items[0].captions == ("a red hat, small, round, x", "a blue hat, small, round, x")
    conds = [again.store.load(key)["cross_attn"] for key in again.items[0].caption_keys]
    assert not torch.equal(*conds)


class RandomText(FakeText):
    """Embeddings that no half precision holds."""

    def cond(self, value):
        random = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(int(value)))
        return {"cross_attn": random(1, 16, 64), "pooled_output": random(1, 8), "attention_mask": torch.ones(1, 16)}


def test_texts_kept_in_bf16_are_what_a_model_in_bf16_makes_of_the_full_ones(tmp_path):
    captioned(tmp_path / "in", 1)
    full, half = (
        encoded(tmp_path, text=RandomText(), captions=CaptionSettings(text_precision=precision))
        for precision in ("as encoded", "bf16")
    )
    key, short = full.items[0].caption_keys[0], half.items[0].caption_keys[0]
    wide, small = full.store.load(key), half.store.load(short)
    assert torch.equal(wide["cross_attn"], RandomText().cond(9.0)["cross_attn"]) and key != short
    assert small["cross_attn"].dtype == torch.float32 and not torch.equal(small["cross_attn"], wide["cross_attn"])
    assert torch.equal(small["cross_attn"].bfloat16(), wide["cross_attn"].bfloat16())
    assert torch.equal(small["pooled_output"], wide["pooled_output"])
    assert full.items[0].latent == half.items[0].latent and full.fingerprint != half.fingerprint
    assert full.fingerprint == encoded(tmp_path, text=RandomText(), captions=CaptionSettings()).fingerprint
    sizes = [data.store.path(k).stat().st_size for data, k in ((full, key), (half, short))]
    assert sizes[1] == pytest.approx(sizes[0] - 16 * 64 * 2, abs=100)


# -- texts -------------------------------------------------------------------------------------------------------------


def encode_captions(root, *captions, text=None, **settings):
    """The encoded dataset of images 0.png, 1.png, ... with these captions."""
    for i, caption in enumerate(captions):
        image(root / "in" / f"{i}.png", seed=i)
        (root / "in" / f"{i}.txt").write_text(caption, encoding="utf-8")
    return encoded(root, captions=CaptionSettings(**settings), text=text)


@pytest.mark.parametrize(
    "caption", ["miku (vocaloid)", r"miku \(vocaloid\)", "a (red:1.6) ball", "embedding:style cat"]
)
def test_what_was_encoded_when_brackets_weighed_is_encoded_again(tmp_path, caption):
    text = FakeText()
    before = compute_fingerprint("caption", module.ENCODING_VERSION, caption, text.identity)
    DiskCache(tmp_path / "cache").write(before, text.cond(1.0))
    data = encode_captions(tmp_path, caption, text=text)
    assert caption in text.seen and before not in data.items[0].caption_keys


def test_what_was_encoded_of_other_captions_is_used_and_their_runs_go_on(tmp_path):
    """keys and fingerprint are what they were, worked out by their first formula"""
    text, captions = FakeText(), ["a red ball", "a backslash \\ alone", "[not a trigger]"]
    keys = [compute_fingerprint("caption", module.ENCODING_VERSION, c, text.identity) for c in captions]
    for key in keys:
        DiskCache(tmp_path / "cache").write(key, text.cond(1.0))
    data = encode_captions(tmp_path, *captions, text=text)
    assert text.seen == [""] and [key for item in data.items for key in item.caption_keys] == keys
    settings = CaptionSettings(), BucketSettings(resolution=16, step=8)
    parts = read_folder(tmp_path / "in").fingerprint(), *settings, False, "vae", text.identity, 0, [255, 255, 255]
    assert data.fingerprint == compute_fingerprint(module.ENCODING_VERSION, *parts)


@pytest.mark.parametrize("caption, settings", [("miku (vocaloid)", {}), ("a [trigger] cat", {"trigger": "sks"})])
def test_a_run_on_captions_that_are_read_anew_is_a_new_run(tmp_path, caption, settings, monkeypatch):
    now = encode_captions(tmp_path, caption, **settings).fingerprint
    monkeypatch.setattr(module, "list_reading_changes", lambda *_: [])
    assert encode_captions(tmp_path, caption, **settings).fingerprint != now


def test_an_interrupt_is_noticed_between_two_texts_and_nothing_is_lost(tmp_path):
    """five captions and the empty one; Cancel comes while the third text is encoded"""
    text = FakeText()

    def cancel():
        if len(text.seen) == 3:
            raise Cut

    captioned(tmp_path / "in", 5)
    with pytest.raises(Cut):
        encoded(tmp_path, text=text, check_interrupt=cancel)
    assert len(text.seen) == 3
    encoded(tmp_path, text=(rest := FakeText()))
    assert len(rest.seen) == 3 and not set(rest.seen) & set(text.seen)


def test_a_caption_that_no_encoder_reads_is_refused_with_its_image_and_figures_before_any_work(tmp_path):
    text = FakeText()
    message = r"The caption of 1\.png is too long: 20000 words, 1199\d\d characters\. .*truncate: 225"
    with pytest.raises(ValueError, match=message):
        encode_captions(tmp_path, "short", "book, " * 20_000, text=text)
    assert not text.seen and not (tmp_path / "cache").exists()


def test_the_limit_of_a_caption_is_2048_tokens_of_any_encoder(tmp_path):
    """2048 words are read, and 2049 are not: 28 chunks of CLIP"""
    encode_captions(tmp_path, "a " * 2048)
    with pytest.raises(ValueError, match=r"0\.png is too long: 2049 words, 2049 tokens in l \(28 chunks of 75\)\."):
        encode_captions(tmp_path, "a " * 2049)


def test_a_trigger_of_a_whole_text_is_refused_by_its_own_name(tmp_path):
    with pytest.raises(ValueError, match=r"The trigger is too long: 5000 words, 5000 tokens in l \(67 chunks of 75\)"):
        encode_captions(tmp_path, "short", trigger="sks " * 5000)


def test_the_tokens_of_ordinary_captions_are_not_counted(tmp_path):
    """a token is a byte at least, so a short text needs no tokenizer to be allowed"""

    class NoCounter(FakeText):
        def count_tokens(self, text):
            pytest.fail(f"tokens of {len(text)} characters were counted")

    assert len(encode_captions(tmp_path, "word " * 400, text=NoCounter())) == 1


def test_a_placeholder_without_a_trigger_is_refused_before_any_work(tmp_path):
    message = r"1 of 2 captions say \[trigger\], for example that of 1\.png, and trigger is empty"
    with pytest.raises(ValueError, match=message):
        encode_captions(tmp_path, "a cat", "a photo of [Trigger]")
    assert not (tmp_path / "cache").exists()


def test_the_placeholder_is_the_trigger_in_what_is_encoded(tmp_path):
    data = encode_captions(tmp_path, "a cat", "photo of [trigger] man", trigger=" sks ")
    assert [item.captions for item in data.items] == [("sks, a cat",), ("photo of sks man",)]
    assert data.trigger == "sks"
