"""What a step draws from an encoded dataset: images, mirrors, captions, posterior samples, masks and sizes."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from trainyard.tests.fakes_data import FakeVae, captioned, encoded, image
from trainyard.trainers.data import encode
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.cache import MemoryStore, count_tensor_bytes
from trainyard.trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from trainyard.trainers.data.encoded import BucketBatchSampler, EncodedDataset, EncodedItem
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, open_mask


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(data, pick=0, count=400):
    """Many draws of one item."""
    generator = rng()
    return [data.make_batch([pick], generator) for _ in range(count)]


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_its_own_pictures_captions_and_sizes(tmp_path):
    captioned(tmp_path / "in", 3)
    data = encoded(tmp_path)
    batch = data.make_batch([2, 0], rng())
    assert batch.index == [2, 0] and batch.captions == ["caption 2", "caption 0"] and batch.mask is None
    assert batch.x0.shape == (2, 3, 2, 2) and data.channels == 3
    assert torch.equal(batch.x0[0], data.store.load(data.items[2].latent)["mean"])
    assert (
        batch.conds[0]["cross_attn"].mean() == len("caption 2")
        and batch.conds[0]["pooled_output"].dtype == torch.float16
    )
    sizes = ("width", "height", "crop_w", "crop_h", "target_width", "target_height")
    assert [batch.conds[1][name] for name in sizes] == [16, 16, 0, 0, 16, 16] and batch.conds[1]["mask"] is None


def test_sizes_are_each_pictures_own_and_the_mirrors_crop_is_mirrored(tmp_path):
    """21x16 px are 336 > 256 px: sqrt(256 * 1.3125) = 18.3 -> 16 wide, 13.97 -> 8 high; by width 16/8 = 2 (off .69), by
    height 8 * 1.3125 = 10.5 -> 11 -> 8: 8/8 = 1 (off .31): scaled to 11x8, bucket 8x8, 1 px cut on the left and 2 on
    the right"""
    image(tmp_path / "in" / "a.png", (21, 16))
    kohya = BucketSettings(resolution=16, step=8, rules="kohya")
    data = encoded(tmp_path, flip=True, captions=CaptionSettings(caption_mode=CAPTION_MODE_EMPTY), buckets=kohya)
    plain = dict(width=21, height=16, crop_w=1, crop_h=0, target_width=8, target_height=8)
    (item,) = data.items
    assert item.bucket == (8, 8) and item.size == plain and item.flipped_size == {**plain, "crop_w": 2}
    seen = {
        (batch.conds[0]["crop_w"], torch.equal(batch.x0[0], data.store.load(item.flipped)["mean"]))
        for batch in drawn(data, count=50)
    }
    assert seen == {(1, False), (2, True)}


def test_half_of_the_draws_are_mirrored_and_none_without_flip(tmp_path):
    """400 coins: 200 +- 50 is five standard deviations"""
    captioned(tmp_path / "in", 1)
    for flip, expected in ((True, 200), (False, 0)):
        data = encoded(tmp_path, flip=flip)
        plain = data.store.load(data.items[0].latent)["mean"]
        mirrored = sum(not torch.equal(batch.x0[0], plain) for batch in drawn(data))
        assert abs(mirrored - expected) <= (50 if flip else 0), mirrored


def test_dropout_tells_its_share_of_draws_nothing(tmp_path):
    """400 draws at .25: 100 +- 44 is five standard deviations; the empty caption has length 0 in the fake encoder"""
    captioned(tmp_path / "in", 1)
    batches = drawn(encoded(tmp_path, captions=CaptionSettings(dropout=0.25)))
    dropped = sum(batch.captions == [""] for batch in batches)
    assert abs(dropped - 100) <= 44, dropped
    assert all((batch.conds[0]["cross_attn"].sum() == 0) == (batch.captions == [""]) for batch in batches)


@pytest.mark.parametrize("dropout, expected", [(0.0, "caption 0"), (1.0, "")])
def test_dropout_of_none_and_of_all(tmp_path, dropout, expected):
    captioned(tmp_path / "in", 1)
    assert {
        batch.captions[0] for batch in drawn(encoded(tmp_path, captions=CaptionSettings(dropout=dropout)), count=100)
    } == {expected}


def test_every_variant_is_told_about_equally_often(tmp_path):
    """3 captions in 600 draws: 200 +- 58 is five standard deviations"""
    image(tmp_path / "in" / "a.png")
    record = dataclasses.replace(read_folder(tmp_path / "in")[0], captions=("a", "bb", "ccc"))
    counts = Counter(
        batch.captions[0] for batch in drawn(encoded(tmp_path, dataset=ImageDataset((record,))), count=600)
    )
    assert sorted(counts) == ["a", "bb", "ccc"] and all(abs(count - 200) <= 58 for count in counts.values()), counts


def test_the_posterior_is_sampled_anew_with_its_own_mean_and_width(tmp_path):
    """std .5: 400 draws of 12 numbers have a mean within 5 * .5 / sqrt(4800) = .036 and a width within .026 of it"""
    captioned(tmp_path / "in", 1)
    data = encoded(tmp_path, vae=FakeVae("with std", std=0.5))
    error = torch.cat([batch.x0 for batch in drawn(data)]) - data.store.load(data.items[0].latent)["mean"]
    assert abs(error.mean()) < 0.036 and abs(error.std() - 0.5) < 0.026, (error.mean(), error.std())


def test_the_same_generator_state_draws_the_same_batch(tmp_path):
    captioned(tmp_path / "in", 3)
    data = encoded(tmp_path, flip=True, vae=FakeVae("with std", std=1.0), captions=CaptionSettings(dropout=0.5))
    a, b, c = data.make_batch([0, 1, 2], rng(7)), data.make_batch([0, 1, 2], rng(7)), data.make_batch([0, 1, 2], rng(8))
    assert torch.equal(a.x0, b.x0) and a.captions == b.captions and not torch.equal(a.x0, c.x0)


def test_latents_are_fp32_whatever_the_vae_gave(tmp_path):
    class Half(FakeVae):
        def encode(self, images):
            return super().encode(images)[0].bfloat16(), None

    captioned(tmp_path / "in", 1)
    data = encoded(tmp_path, vae=Half())
    assert (
        data.store.load(data.items[0].latent)["mean"].dtype == torch.bfloat16
        and data.make_batch([0], rng()).x0.dtype == torch.float32
    )


def test_video_latents_pass_through(tmp_path):
    captioned(tmp_path / "in", 2)
    Image.new("L", (16, 16), 255).save(tmp_path / "in" / "0.mask.png")
    data = encoded(tmp_path, vae=FakeVae(frames=True))
    batch = data.make_batch([0, 1], rng())
    assert batch.x0.shape == (2, 3, 1, 2, 2) and batch.mask.shape == (2, 1, 1, 2, 2) and data.channels == 3


# -- masks -------------------------------------------------------------------------------------------------------------


def test_masks_are_the_mean_of_each_cell_and_mirror_with_the_picture(tmp_path):
    """16 px, cells of 8: the left 12 columns white -> cells 1 and .5"""
    captioned(tmp_path / "in", 2)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 12, 16))
    mask.save(tmp_path / "in" / "0.mask.png")
    data = encoded(tmp_path, flip=True)
    plain = data.store.load(data.items[0].latent)["mean"]
    for batch in drawn(data, count=20):
        expected = [1.0, 0.5] if torch.equal(batch.x0[0], plain) else [0.5, 1.0]
        assert batch.mask[0, 0].tolist() == [expected, expected]
    assert data.make_batch([1], rng()).mask is None
    assert data.make_batch([1, 0], rng()).mask[0].eq(1).all()


def test_a_changed_mask_is_read_again_and_the_picture_is_not_encoded_again(tmp_path):
    captioned(tmp_path / "in", 1)
    vae, prints = FakeVae(), set()
    for level in (255, 51):
        Image.new("L", (16, 16), level).save(tmp_path / "in" / "0.mask.png")
        data = encoded(tmp_path, vae=vae)
        prints.add(data.fingerprint)
        assert data.make_batch([0], rng()).mask.flatten().tolist() == pytest.approx([level / 255] * 4)
    assert vae.calls == 1 and len(prints) == 2


# -- from ComfyUI's own LATENT[] and CONDITIONING[] --------------------------------------------------------------------


def latents(*batches, shape=(4, 2, 2)):
    return [{"samples": torch.randn(b, *shape, generator=rng(i))} for i, b in enumerate(batches)]


def conditioning(*values, rows=1):
    return [
        [[torch.full((rows, 3, 4), float(v)), {"pooled_output": torch.full((rows, 2), float(v)), "width": 512}]]
        for v in values
    ]


def test_stacks_are_split_and_paired_in_order():
    given = latents(2, 1)
    data = EncodedDataset.from_core(given, conditioning(1, 2, 3))
    batch = data.make_batch([0, 1, 2], rng())
    assert torch.equal(batch.x0, torch.cat([latent["samples"] for latent in given])) and data.channels == 4
    assert [cond["cross_attn"].shape for cond in batch.conds] == [(1, 3, 4)] * 3
    assert [cond["pooled_output"].mean().item() for cond in batch.conds] == [1, 2, 3] and batch.conds[0]["width"] == 512


def test_a_bucket_of_stacked_conditionings_is_split_too():
    """core's Resolution Bucket: a stack of latents and one CONDITIONING of as many entries; a tensor of many rows is
    split as well"""
    entries = [conditioning(1)[0][0], conditioning(2)[0][0]]
    rows = torch.arange(2.0).view(2, 1, 1).expand(2, 3, 4)
    data = EncodedDataset.from_core(latents(4), [entries, [[rows, {"pooled_output": rows[:, 0]}]]])
    conds = data.make_batch([0, 1, 2, 3], rng()).conds
    assert [cond["cross_attn"].mean().item() for cond in conds] == [1, 2, 0, 1]
    assert conds[3]["pooled_output"].tolist() == [[1, 1, 1, 1]]


def test_one_conditioning_may_serve_all_latents():
    data = EncodedDataset.from_core(latents(1, 1, 1), conditioning(5))
    assert [cond["cross_attn"].mean().item() for cond in data.make_batch([0, 2], rng()).conds] == [5, 5]


@pytest.mark.parametrize(
    "counts, conds, message",
    [
        ((2, 1), (1, 2), "3 latents and 2 conditionings do not pair up"),
        ((1,), (), "1 latents and 0 conditionings"),
        ((), (1,), "0 latents and 1 conditionings"),
    ],
)
def test_a_count_mismatch_names_both_counts(counts, conds, message):
    with pytest.raises(ValueError, match=message):
        EncodedDataset.from_core(latents(*counts), conditioning(*conds))


def test_latents_of_different_vaes_are_refused():
    with pytest.raises(ValueError, match="The latents have 4 and 16 channels. Encode all images with the same VAE"):
        EncodedDataset.from_core(latents(1) + latents(1, shape=(16, 2, 2)), conditioning(1))


NO_LATENTS = [
    ({"samples": torch.zeros(2, 2)}, r"holds a tensor of shape \(2, 2\)"),
    ({}, "holds NoneType"),
    (3, "holds NoneType"),
]


@pytest.mark.parametrize("bad, message", NO_LATENTS)
def test_what_is_no_latent_is_refused(bad, message):
    with pytest.raises(ValueError, match=f"Latent 0 {message}"):
        EncodedDataset.from_core([bad], conditioning(1))


@pytest.mark.parametrize("has_frames", [False, True])
def test_a_mask_is_opened_once(tmp_path, monkeypatch, has_frames):
    captioned(tmp_path / "in", 2)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 12, 16))
    mask.save(tmp_path / "in" / "0.mask.png")
    opened = []
    monkeypatch.setattr(encode, "open_mask", lambda record: opened.append(record.mask) or open_mask(record))
    for _ in range(2):
        data = encoded(tmp_path, vae=FakeVae(frames=has_frames))
    assert [Path(path).name for path in opened if path] == ["0.mask.png"]
    assert data.make_batch([0], rng()).mask.flatten(1).tolist() == [[1, 0.5, 1, 0.5]]


def test_a_mask_that_is_black_in_all_that_is_trained_is_refused_before_anything_is_encoded(tmp_path):
    captioned(tmp_path / "in", 3)
    mask = Image.new("L", (16, 16))
    mask.save(tmp_path / "in" / "1.mask.png")
    vae = FakeVae()
    says = r"The mask of 1 image is black in all that is trained, so nothing of it would be learnt: 1.png. White is"
    with pytest.raises(ValueError, match=says):
        encoded(tmp_path, vae=vae)
    assert vae.calls == 0
    mask.putpixel((3, 3), 1)
    mask.save(tmp_path / "in" / "1.mask.png")
    assert len(encoded(tmp_path)) == 3
    Image.new("L", (16, 16)).save(tmp_path / "in" / "1.mask.png")
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            encoded(tmp_path)


@pytest.mark.parametrize(("mask", "says"), [
    (torch.zeros(1, 16, 16), "The noise_mask of latent 0 is black everywhere in sample 1 of 1, so nothing of it would"),
    (torch.stack([torch.ones(16, 16), torch.zeros(16, 16)]), "black everywhere in sample 2 of 2"),
    (torch.full((1, 16, 16), float("nan")), "is no mask"),
    ("white", "is no mask"),
])  # fmt: skip
def test_noise_masks_that_teach_nothing_are_refused(mask, says):
    with pytest.raises(ValueError, match=says):
        EncodedDataset.from_core([{**latents(2)[0], "noise_mask": mask}], conditioning(1))


@pytest.mark.parametrize("wrong", [[["text", {}]], [[torch.zeros(1, 2, 3)]], [[torch.zeros(1, 2, 3), 4]], [1], ["ab"]])
def test_what_is_no_conditioning_is_refused_in_words(wrong):
    with pytest.raises(ValueError, match="connect a CONDITIONING"):
        EncodedDataset.from_core(latents(1), [wrong])


def test_noise_masks_become_loss_masks():
    """16x16 px to 2x2 cells, the upper half white; the second latent has none"""
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    first, second = latents(1, 1)
    batch = EncodedDataset.from_core([{**first, "noise_mask": mask}, second], conditioning(1)).make_batch([0, 1], rng())
    assert batch.mask[0, 0].tolist() == [[1, 1], [0, 0]] and batch.mask[1].eq(1).all()
    with pytest.raises(ValueError, match="3 samples and 2 masks"):
        EncodedDataset.from_core([{**latents(3)[0], "noise_mask": torch.ones(2, 16, 16)}], conditioning(1))


def test_tensors_of_a_node_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        data = EncodedDataset.from_core(latents(1), conditioning(1))
    batch, weight = data.make_batch([0], rng()), torch.ones(1, requires_grad=True)
    (batch.x0 * weight).sum().backward()
    (batch.conds[0]["cross_attn"] * weight).sum().backward()
    assert weight.grad.item() == pytest.approx(batch.x0.sum().item() + 12)


def test_the_fingerprint_of_core_data_is_its_content():
    same = [EncodedDataset.from_core(latents(2), conditioning(1)).fingerprint for _ in range(2)]
    others = [
        EncodedDataset.from_core(latents(2), conditioning(2)),
        EncodedDataset.from_core(latents(1, 1), conditioning(1)),
    ]
    others += [EncodedDataset.from_core(latents(2), conditioning(1), conditioning(0)[0], 0.1)]
    assert same[0] == same[1] and len({same[0], *(other.fingerprint for other in others)}) == 4


def test_dropout_of_core_data_needs_an_empty_conditioning():
    with pytest.raises(ValueError, match="dropout is 0.5, and nothing was given for the empty caption"):
        EncodedDataset.from_core(latents(1), conditioning(1), dropout=0.5)
    data = EncodedDataset.from_core(latents(1), conditioning(1), empty=conditioning(0)[0], dropout=1.0)
    assert data.make_batch([0], rng()).conds[0]["cross_attn"].sum() == 0


# -- the deck ----------------------------------------------------------------------------------------------------------


def deck_of(*groups, batch=2):
    """A deck of items given as (shape, repeats)."""
    items = [
        EncodedItem(str(i), "", "", shape, ("c",), ("",), repeats=repeats) for i, (shape, repeats) in enumerate(groups)
    ]
    return BucketBatchSampler(EncodedDataset(items, MemoryStore(), 4, "f"), batch)


SMALL, LARGE = (4, 2, 2), (4, 3, 2)
MIXED = ((SMALL, 1), (LARGE, 3), (SMALL, 2), (SMALL, 2), (LARGE, 0))


def test_an_epoch_shows_each_picture_as_often_as_it_repeats():
    """small: 1 + 2 + 2 = 5 cards in 3 batches of at most 2; large: 3 cards in 2"""
    deck = deck_of(*MIXED)
    assert len(deck) == 5
    for epoch in range(1, 4):
        batches = [deck.next_batch(rng(epoch)) for _ in range(5)]
        assert Counter(i for batch in batches for i in batch) == {0: 1, 1: 3, 2: 2, 3: 2} and deck.epoch == epoch
        assert sorted(map(len, batches)) == [1, 1, 2, 2, 2]


def test_a_batch_has_one_shape():
    deck = deck_of(*MIXED, batch=8)
    assert sorted(sorted(set(deck.next_batch(rng()))) for _ in range(2)) == [[0, 2, 3], [1]]


def test_epochs_are_dealt_differently_and_shapes_are_mixed():
    deck = deck_of(*[(SMALL, 1)] * 8, *[(LARGE, 1)] * 8, batch=1)
    generator = rng()
    first, second = ([deck.next_batch(generator)[0] for _ in range(16)] for _ in range(2))
    assert first != second and sorted(first) == sorted(second) == list(range(16))
    assert any(i < 8 for i in first[8:]), "all of one shape came first"


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 7, 10])
def test_a_resumed_deck_draws_the_same_cards(cut):
    """each step has a generator of its own, as in the loop; 5 batches make an epoch"""
    whole, first, resumed = deck_of(*MIXED), deck_of(*MIXED), deck_of(*MIXED)
    expected = [whole.next_batch(rng(step)) for step in range(12)]
    assert [first.next_batch(rng(step)) for step in range(cut)] == expected[:cut]
    resumed.load_state(json.loads(json.dumps(first.state())))
    assert [resumed.next_batch(rng(step)) for step in range(cut, 12)] == expected[cut:] and resumed.epoch == whole.epoch


def test_a_deck_of_other_data_refuses_the_state():
    with pytest.raises(ValueError, match="saved run drew 5 batches per epoch and this one draws 8"):
        deck_of(*MIXED, batch=1).load_state(deck_of(*MIXED).state())


def test_a_drawn_batch_may_be_changed_without_changing_the_deck():
    deck, other = deck_of(*MIXED), deck_of(*MIXED)
    deck.next_batch(rng()).clear()
    other.next_batch(rng())
    assert [deck.next_batch(rng()) for _ in range(4)] == [
        other.next_batch(rng()) for _ in range(4)
    ] and deck.epoch_batches[0]


def test_a_deck_without_cards_is_refused():
    with pytest.raises(ValueError, match="1 images and every one is repeated 0 times"):
        deck_of((SMALL, 0))
    with pytest.raises(ValueError, match="batch is 0; it must be at least 1"):
        deck_of((SMALL, 1), batch=0)


def test_the_next_batch_is_read_while_this_one_is_trained_on(tmp_path):
    """12 images with captions of their own, 4 batches: all but the first batch of an epoch was read before it is asked
    for"""
    captioned(tmp_path / "in", 12)
    data = encoded(tmp_path)
    deck, generator, waited = BucketBatchSampler(data, 3), rng(), []
    take = data.store.take_read_ahead
    data.store.take_read_ahead = lambda key: waited.append((key, key in data.store.reading)) or take(key)
    plain = encoded(tmp_path)
    for number in range(len(deck)):
        picks = deck.next_batch(generator)
        batch = data.make_batch(picks, rng(number))
        assert torch.equal(batch.x0, plain.make_batch(picks, rng(number)).x0)
    assert [ahead for _, ahead in waited] == [False] * 6 + [True] * 18


def test_an_epoch_through_a_small_memory_gives_the_same_batches(tmp_path):
    captioned(tmp_path / "in", 12)
    large, small = encoded(tmp_path), encoded(tmp_path)
    small.store.lru.budget = 600
    for data in (large, small):
        deck, generator = BucketBatchSampler(data, 3), rng()
        data.seen = [data.make_batch(deck.next_batch(generator), generator).x0 for _ in range(len(deck))]
        assert data.store.lru.used_bytes <= data.store.lru.budget
        assert data.store.lru.used_bytes == sum(
            count_tensor_bytes(value) for value, _ in data.store.lru.values.values()
        )
    assert (
        torch.equal(torch.cat(large.seen), torch.cat(small.seen))
        and small.store.lru.used_bytes < large.store.lru.used_bytes
    )
