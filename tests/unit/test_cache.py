"""What the VAE and the text encoder said survives on disk, and nothing stale is read."""

import concurrent.futures
import json
import os
import threading
import time

import pytest
import torch
from trainyard.tests.fakes_data import Cut, FakeText, FakeVae, cached_files, captioned, encoded, image, repaint
from trainyard.trainers.data import cache
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.cache import READ_AHEAD_ENTRIES, DiskCache, LruCache, count_tensor_bytes
from trainyard.trainers.data.caption_variants import CaptionSettings
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import open_image


def test_values_return_exactly(tmp_path):
    tree = {
        "bf16": torch.randn(2, 3).bfloat16(),
        "fp16": torch.randn(4).half(),
        "fp32": torch.randn(1, 2, 3),
        "long": torch.arange(3),
        "bool": torch.tensor(True),
        "none": None,
        "int": 7,
        "float": 0.1,
        "text": "ä",
        "list": [torch.ones(2), {"deep": (1, torch.zeros(0))}],
    }
    DiskCache(tmp_path).write("a", tree)
    back = DiskCache(tmp_path).load("a")
    plain = ("none", "int", "float", "text")
    assert json.dumps([back[k] for k in plain]) == json.dumps([tree[k] for k in plain])
    pairs = [(back[k], tree[k]) for k in ("bf16", "fp16", "fp32", "long", "bool")]
    pairs += [(back["list"][0], tree["list"][0]), (back["list"][1]["deep"][1], tree["list"][1]["deep"][1])]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs) and isinstance(
        back["list"][1]["deep"], tuple
    )


def test_views_of_one_tensor_are_stored_apart(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    DiskCache(tmp_path).write("a", {"row": whole[1], "column": whole[:, 0], "again": whole})
    back = DiskCache(tmp_path).load("a")
    assert back["row"].tolist() == [3, 4, 5] and back["column"].tolist() == [0, 3] and torch.equal(back["again"], whole)


def test_shapes_come_from_the_header(tmp_path):
    cache = DiskCache(tmp_path)
    cache.write("a", {"mean": torch.zeros(4, 2, 3), "std": None})
    assert cache.read_shapes("a") == {"mean": (4, 2, 3), "std": None} and cache.read_shapes("b") is None


def test_tensors_loaded_in_inference_mode_can_be_trained_with(tmp_path):
    cache = DiskCache(tmp_path)
    with torch.inference_mode():
        cache.write("a", {"mean": torch.ones(2)})
        loaded = cache.load("a")["mean"]
    weight = torch.ones(2, requires_grad=True)
    (weight * loaded).sum().backward()
    assert weight.grad.tolist() == [1, 1]


def test_memory_stays_within_its_budget_and_keeps_the_last_used(tmp_path):
    """each value has 400 bytes, the budget 1000: two fit"""
    cache = DiskCache(tmp_path, budget=1000)
    for name in "abc":
        cache.write(name, {"x": torch.zeros(100)})
    a, _, again, c = cache.load("a"), cache.load("b"), cache.load("a"), cache.load("c")
    assert again is a and list(cache.lru.values) == ["a", "c"] and cache.lru.used_bytes == 800
    assert cache.load("c") is c


def test_a_value_above_the_budget_is_not_kept():
    shelf = LruCache(budget=10)
    assert shelf.get("a", lambda: {"x": torch.ones(100)})["x"].sum() == 100
    assert not shelf.values and shelf.used_bytes == 0


def test_a_file_that_vanished_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="gone or damaged. Run Encode Dataset again"):
        DiskCache(tmp_path).load("a")


def test_leftovers_of_a_killed_process_are_swept_and_others_work_is_left(tmp_path):
    for folder in (tmp_path, tmp_path / "0f"):
        folder.mkdir(exist_ok=True)
        old, young = folder / ".a.safetensors.1.part", folder / ".b.safetensors.2.part"
        old.touch()
        young.touch()
        os.utime(old, (time.time() - 7200,) * 2)
        DiskCache(tmp_path)
        assert not old.exists() and young.exists(), folder


def test_a_value_with_a_flipped_bit_is_never_trained_on_and_is_encoded_again(tmp_path):
    """The last bytes of a file are values: its header tells nothing."""
    captioned(tmp_path / "in", 2)
    good = encoded(tmp_path)
    keys = good.items[0].latent, good.items[1].caption_keys[0]
    whole = {key: good.store.path(key).read_bytes() for key in keys}
    for key, blob in whole.items():
        good.store.path(key).write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    missed = cache.lost_files
    for key in keys:
        with pytest.raises(ValueError, match=r"gone or damaged. Run Encode Dataset again \(press Run\)"):
            encoded(tmp_path).store.load(key)
    assert cache.lost_files == missed + 2, "the node sees that something is missing"
    assert {key: encoded(tmp_path).store.path(key).read_bytes() for key in keys} == whole


def test_nothing_is_encoded_twice(tmp_path):
    """3 images, 3 captions and the empty one"""
    captioned(tmp_path / "in", 3)
    vae, text = FakeVae(), FakeText()
    first, second = (encoded(tmp_path, vae=vae, text=text) for _ in range(2))
    assert vae.calls == 3 and sorted(text.seen) == ["", "caption 0", "caption 1", "caption 2"]
    assert first.fingerprint == second.fingerprint and first.items == second.items
    rng = lambda: torch.Generator().manual_seed(0)
    assert torch.equal(first.make_batch([0, 1], rng()).x0, second.make_batch([0, 1], rng()).x0)


def test_moved_pictures_are_not_encoded_again(tmp_path):
    captioned(tmp_path / "in", 2)
    vae = FakeVae()
    first = encoded(tmp_path, vae=vae)
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    assert encoded(tmp_path, vae=vae, folder="elsewhere").fingerprint == first.fingerprint and vae.calls == 2


@pytest.mark.parametrize(
    "change, images, texts",
    [
        (dict(vae=FakeVae("other")), 2, 0),
        (dict(text=FakeText("other")), 0, 3),
        (dict(buckets=BucketSettings(resolution=32, step=8, upscale=True)), 2, 0),
        (dict(buckets=BucketSettings(resolution=32, step=8)), 0, 0),  # images of 16 px stay at 16 px
        (dict(flip=True), 2, 0),
        (dict(ground=(0, 0, 0)), 2, 0),
        (dict(captions=CaptionSettings(trigger="sks")), 0, 2),
        (dict(captions=CaptionSettings(dropout=0.5)), 0, 0),
    ],
)
def test_what_a_change_touches_is_encoded_again(tmp_path, change, images, texts):
    captioned(tmp_path / "in", 2)
    before = encoded(tmp_path)
    vae, text = change.get("vae", FakeVae()), change.get("text", FakeText())
    vae.calls, text.seen = 0, []
    after = encoded(tmp_path, **{**change, "vae": vae, "text": text})
    assert (vae.calls, len(text.seen)) == (images, texts) and after.fingerprint != before.fingerprint


def test_a_changed_picture_and_a_changed_caption_are_encoded_again(tmp_path):
    captioned(tmp_path / "in", 3)
    prints = {encoded(tmp_path).fingerprint}
    repaint(tmp_path / "in" / "0.png")
    (tmp_path / "in" / "1.txt").write_text("another", encoding="utf-8")
    vae, text = FakeVae(), FakeText()
    prints.add(encoded(tmp_path, vae=vae, text=text).fingerprint)
    assert vae.calls == 1 and text.seen == ["another"] and len(prints) == 2


def test_a_stopped_encode_continues_where_it_was(tmp_path):
    """the 4th of 6 images raises; the second run encodes 4, 5, 6 and no text"""
    captioned(tmp_path / "in", 6)
    with pytest.raises(Cut):
        encoded(tmp_path, vae=FakeVae(stop_at=4))
    vae, text = FakeVae(), FakeText()
    assert len(encoded(tmp_path, vae=vae, text=text)) == 6 and vae.calls == 3 and text.seen == []


def test_an_interrupt_comes_between_pictures(tmp_path):
    captioned(tmp_path / "in", 4)
    vae = FakeVae()

    def interrupt():
        if vae.calls == 2:
            raise Cut

    with pytest.raises(Cut):
        encoded(tmp_path, vae=vae, check_interrupt=interrupt)
    assert vae.calls == 2 and encoded(tmp_path, vae=vae) and vae.calls == 4


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * len(b), lambda b: b[:-1]]
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    captioned(tmp_path / "in", 2)
    good = encoded(tmp_path)
    whole = {key: good.store.path(key).read_bytes() for key in (good.items[0].latent, good.items[1].caption_keys[0])}
    for key, blob in whole.items():
        good.store.path(key).write_bytes(damage(blob))
    vae, text = FakeVae(), FakeText()
    encoded(tmp_path, vae=vae, text=text)
    assert vae.calls == 1 and text.seen == ["caption 1"]
    assert {key: good.store.path(key).read_bytes() for key in whole} == whole


def test_the_cache_holds_safetensors_only(tmp_path):
    captioned(tmp_path / "in", 2)
    encoded(tmp_path)
    names = [file.name for file in cached_files(tmp_path)]
    assert len(names) == 5 and all(name.endswith(".safetensors") and len(name) == 32 + 12 for name in names)


def test_files_lie_in_folders_by_the_first_two_digits_of_their_key(tmp_path):
    captioned(tmp_path / "in", 2)
    encoded(tmp_path)
    assert not list((tmp_path / "cache").glob("*.*"))
    assert all(file.parent.name == file.name[:2] for file in cached_files(tmp_path))


def test_a_cache_in_one_folder_is_taken_over(tmp_path):
    """as the first release wrote it"""
    captioned(tmp_path / "in", 2)
    first = encoded(tmp_path)
    for file in cached_files(tmp_path):
        file.rename(tmp_path / "cache" / file.name)
    vae, text = FakeVae(), FakeText()
    assert encoded(tmp_path, vae=vae, text=text).items == first.items and not vae.calls and not text.seen


PADDED = torch.cat([torch.randn(1, 5, 64), torch.zeros(1, 59, 64)], dim=1)
HALF = torch.randn(1, 64, 64).bfloat16().float()
EQUAL = torch.ones(1, 64, 64) / 3


@pytest.mark.parametrize(
    "tensor, share",
    [
        (PADDED, 6 / 64),
        (HALF, 1 / 2),
        (torch.randn(1, 64, 64).half().float(), 1 / 2),
        (torch.where(PADDED == 0, PADDED, HALF), 3 / 64),
        (EQUAL, 1 / 64),
        (torch.randn(1, 64, 64), 1),
        (torch.full((1, 64, 64), float("inf")), 1 / 128),
        (PADDED.flip(1), 1),
        (torch.full((1, 64, 64), float("nan")), 1),
    ],
    ids=["padding", "bf16", "fp16", "both", "equal", "fp32", "infinite", "padding in front", "nan"],
)
def test_what_a_value_does_not_need_is_not_stored_and_comes_back(tensor, share, tmp_path):
    """64 rows of 64 values; a header has fewer than 300 bytes"""
    cache = DiskCache(tmp_path)
    cache.write("a", {"cross_attn": tensor, "pooled": None})
    size = cache.path("a").stat().st_size
    assert share * tensor.nbytes <= size < share * tensor.nbytes + 400, size / tensor.nbytes
    back = cache.load("a")["cross_attn"]
    assert back.dtype == torch.float32 and torch.equal(back.nan_to_num(7.0), tensor.nan_to_num(7.0))
    assert cache.read_shapes("a") == {"cross_attn": (1, 64, 64), "pooled": None}


def test_rows_of_several_texts_are_kept_until_the_longest_ends(tmp_path):
    """rows 0 to 2 of one text and 0 to 4 of the other are in use"""
    texts = torch.zeros(2, 9, 4)
    texts[0, :3], texts[1, :5] = 1, 2
    DiskCache(tmp_path).write("a", {"x": texts})
    assert torch.equal(DiskCache(tmp_path).load("a")["x"], texts)


def read_names(cache, monkeypatch):
    """The keys that are read from the disk from now on, with the name of the thread."""
    read, names = cache.read_tree, []
    monkeypatch.setattr(
        cache, "read_tree", lambda key: names.append((key, threading.current_thread().name)) or read(key)
    )
    return names


def test_what_is_read_ahead_is_not_read_again(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path)
    for key in "abc":
        cache.write(key, {"x": torch.full((2, 2), float(ord(key)))})
    cache.load("c")
    names = read_names(cache, monkeypatch)
    cache.read_ahead(["a", "b", "a", "c"])
    wait_until_read(cache)
    assert [float(cache.load(key)["x"][0, 0]) for key in "abc"] == [97, 98, 99]
    assert [key for key, _ in names] == ["a", "b"] and all(name.startswith("trainyard-read") for _, name in names)
    assert not cache.reading


def test_what_cannot_be_read_ahead_is_told_when_it_is_asked_for(tmp_path):
    cache = DiskCache(tmp_path)
    cache.read_ahead(["a"])
    wait_until_read(cache)
    with pytest.raises(ValueError, match="gone or damaged. Run Encode Dataset again"):
        cache.load("a")
    cache.read_ahead(["b"])
    wait_until_read(cache)
    cache.write("b", {"x": torch.ones(2)})
    assert cache.load("b")["x"].sum() == 2


def test_what_is_read_ahead_and_never_asked_for_does_not_pile_up(tmp_path):
    cache = DiskCache(tmp_path)
    for number in range(10):
        cache.read_ahead(f"{number}/{entry}" for entry in range(1000))
        wait_until_read(cache)
    assert len(cache.reading) == 2 * READ_AHEAD_ENTRIES and next(reversed(cache.reading)).startswith("9/")


def wait_until_read(cache):
    concurrent.futures.wait(cache.reading.values(), timeout=20)


def test_progress_counts_texts_and_pictures_up_to_the_total(tmp_path):
    captioned(tmp_path / "in", 3)
    for _ in range(2):
        seen = []
        encoded(tmp_path, report=lambda done, total, text, seen=seen: seen.append((done, total)))
        assert seen == sorted(seen) and seen[-1] == (7, 7)


def test_encode_does_not_hold_what_it_encoded(tmp_path):
    """memory of an encoded dataset is names and numbers; tensors come when asked for"""
    captioned(tmp_path / "in", 20)
    data = encoded(tmp_path)
    assert data.store.lru.used_bytes == 0
    data.make_batch([0], torch.Generator())
    assert (
        0 < data.store.lru.used_bytes == sum(count_tensor_bytes(value) for value, _ in data.store.lru.values.values())
    )


def test_a_picture_that_changes_while_the_graph_waits_is_refused(tmp_path):
    captioned(tmp_path / "in", 1)
    dataset = read_folder(tmp_path / "in")
    repaint(tmp_path / "in" / "0.png")
    with pytest.raises(ValueError, match="has changed since the dataset was loaded"):
        encoded(tmp_path, dataset=dataset)


def test_flips_are_the_encoded_mirror_and_not_a_mirrored_latent(tmp_path):
    """the fake VAE is not symmetric, as no real one is: it weighs left pixels of a cell more than right ones"""
    image(tmp_path / "in" / "a.png", seed=3)
    vae = FakeVae()
    data = encoded(tmp_path, vae=vae, flip=True, captions=CaptionSettings(caption_mode="empty (unconditional)"))
    (item,) = data.items
    pixels = torch.tensor(list(open_image(read_folder(tmp_path / "in")[0]).tobytes())).view(1, 16, 16, 3) / 255.0
    mirrored = data.store.load(item.flipped)["mean"]
    assert torch.equal(mirrored, vae.encode(pixels.flip(2))[0][0])
    assert not torch.allclose(mirrored, data.store.load(item.latent)["mean"].flip(-1))


def test_a_vae_that_overflows_is_an_error_and_not_a_dataset(tmp_path):
    captioned(tmp_path / "in", 1)
    with pytest.raises(ValueError, match=r"turned 0\.png into NaN or infinity.*--fp32-vae"):
        encoded(tmp_path, vae=FakeVae(gain=float("nan")))
    assert len(cached_files(tmp_path)) == 2  # the two texts


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(vae=FakeVae(factor=16)), "step is 8 px and this VAE makes one latent cell of 16 px"),
        (
            dict(buckets=BucketSettings(resolution=64, step=64)),
            r"2 of 2 images cannot be placed\. 0\.png: an image of 16x16 px",
        ),
        (dict(text=FakeText(odd=object())), "cannot be stored.*cross_attn .Tensor.*odd .object"),
    ],
)
def test_what_cannot_be_encoded_is_said_before_any_picture(tmp_path, change, message):
    captioned(tmp_path / "in", 2)
    vae = change.get("vae", FakeVae())
    with pytest.raises(ValueError, match=message):
        encoded(tmp_path, **{**change, "vae": vae})
    assert vae.calls == 0


def test_missing_captions_are_an_error_unless_something_else_is_said(tmp_path):
    image(tmp_path / "in" / "a.png")
    with pytest.raises(ValueError, match="Captions are asked for, and 1 of 1 images have none: a.png"):
        encoded(tmp_path)
    assert encoded(tmp_path, captions=CaptionSettings(trigger="sks")).items[0].captions == ("sks",)
    assert encoded(tmp_path, captions=CaptionSettings(caption_mode="empty (unconditional)")).items[0].captions == ("",)
