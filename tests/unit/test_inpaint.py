"""The holes that an inpainting model learns to fill: drawn by the seed, encoded with grey at pixels, one for each step."""

import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.tests.fakes_data import Cut, FakeVae, captioned, encoded
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from trainyard.trainers.data.encode import encode_dataset
from trainyard.trainers.data.encoded import BucketBatchSampler
from trainyard.trainers.data.inpaint_masks import cut_hole, draw_mask, list_mask_kinds, pack_mask, unpack_mask
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.rng import make_generator
from trainyard.trainers.settings import InpaintSettings

BUCKETS = BucketSettings(resolution=32, step=8)
BOXES = InpaintSettings(inpaint_masks="boxes", full_masks=0.0)
OWN = InpaintSettings(inpaint_masks="from the dataset", full_masks=0.0)


def masked(folder, count, blacken=()):
    """Images of 32x32 px whose masks are white on the left half, or black everywhere."""
    captioned(folder, count, (32, 32))
    for number in range(count):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, : 0 if number in blacken else 16] = 255
        Image.fromarray(mask).save(folder / f"{number}.mask.png")


def encoded_holes(root, inpaint, **rest):
    return encoded(root, buckets=BUCKETS, inpaint=inpaint, **rest)


def draw(data, picks, seed=0):
    return data.make_batch(picks, make_generator(seed))


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["boxes", "strokes"])
def test_masks_are_holes_of_many_sizes_anywhere_in_the_image_the_same_for_the_same_seed(kind):
    rng = make_generator(1)
    masks = [draw_mask(kind, (96, 64), rng) for _ in range(300)]
    shares, where = [mask.mean() for mask in masks], np.mean(masks, 0)
    assert all(mask.shape == (64, 96) and mask.any() and not mask.all() for mask in masks)
    assert min(shares) < 0.05 and max(shares) > 0.3 and 0.1 < np.mean(shares) < 0.4
    assert where.min() > 0.01, "some place is never filled"
    assert np.array_equal(draw_mask(kind, (96, 64), make_generator(1)), masks[0])


def test_kinds_take_turns_and_an_images_own_mask_comes_once():
    mixed = InpaintSettings(inpaint_masks="boxes, strokes and dataset", masks_per_image=5)
    firsts = set()
    for seed in range(20):
        kinds = list_mask_kinds(mixed, make_generator(seed), has_mask=True)
        assert sorted(set(kinds)) == ["boxes", "from the dataset", "strokes"] and kinds.count("from the dataset") == 1
        assert set(list_mask_kinds(mixed, make_generator(seed), has_mask=False)) == {"boxes", "strokes"}
        firsts.add(kinds[0])
    assert len(firsts) == 3
    assert list_mask_kinds(OWN, make_generator(0), has_mask=True) == ["from the dataset"]
    assert list_mask_kinds(InpaintSettings(), make_generator(0), has_mask=True) == []


def test_a_packed_mask_is_the_mask():
    mask = draw_mask("strokes", (44, 24), make_generator(0))
    assert torch.equal(unpack_mask(pack_mask(mask), 44)[0, 0], torch.from_numpy(mask).float())


def test_the_hole_is_grey_and_the_rest_is_the_image():
    image, mask = torch.rand(1, 8, 8, 3), np.zeros((8, 8), bool)
    mask[:, :4] = True
    shown = cut_hole(image, mask)
    assert (shown[:, :, :4] == 0.5).all() and torch.allclose(shown[:, :, 4:], image[:, :, 4:], atol=1e-7)


# -- encoded -----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_the_image_with_its_hole_and_the_mask_as_the_hosts_node_names_them(tmp_path):
    """the mask is of pixels, and cells that it covers are what the VAE makes of grey"""
    masked(tmp_path / "in", 2)
    batch = draw(encoded_holes(tmp_path, OWN), [0, 1])
    for x0, cond in zip(batch.x0, batch.conds, strict=True):
        assert cond["concat_mask"].shape == (1, 1, 32, 32) and cond["concat_mask"][..., :16].all()
        assert not cond["concat_mask"][..., 16:].any()
        image = cond["concat_latent_image"]
        assert torch.allclose(image[0, :, :, :2], FakeVae().encode(torch.full((1, 32, 32, 3), 0.5))[0][0, :, :, :2])
        assert torch.allclose(image[0, :, :, 2:], x0[:, :, 2:], atol=1e-6)


def test_a_mirrored_image_has_its_hole_mirrored(tmp_path):
    masked(tmp_path / "in", 1)
    data = encoded_holes(tmp_path, OWN, flip=True)
    sides = {bool(draw(data, [0], seed).conds[0]["concat_mask"][..., 0].all()) for seed in range(20)}
    assert sides == {True, False}
    for seed in range(8):
        batch = draw(data, [0], seed)
        kept = batch.conds[0]["concat_mask"][0, 0, ::8, ::8] == 0
        assert torch.allclose(batch.conds[0]["concat_latent_image"][0][:, kept], batch.x0[0][:, kept], atol=1e-6)


def test_holes_come_by_the_seed_and_the_image_alone_and_are_encoded_once(tmp_path):
    captioned(tmp_path / "in", 4, (32, 32))
    whole, vae = encoded_holes(tmp_path, BOXES), FakeVae()
    again = encoded_holes(tmp_path, BOXES, vae=vae)
    assert vae.calls == 0 and again.fingerprint == whole.fingerprint
    assert [item.holes for item in again.items] == [item.holes for item in whole.items]
    assert all(len(set(item.holes)) == 4 for item in whole.items)
    (tmp_path / "in" / "0.png").unlink()
    fewer = encoded_holes(tmp_path, BOXES, vae=vae)
    assert [item.holes for item in fewer.items] == [item.holes for item in whole.items[1:]] and vae.calls == 0
    other = encoded_holes(tmp_path, BOXES, seed=1)
    assert other.fingerprint != whole.fingerprint and not set(other.items[1].holes) & set(whole.items[2].holes)


def test_an_encode_that_was_cut_among_the_holes_goes_on_there(tmp_path):
    captioned(tmp_path / "in", 2, (32, 32))
    with pytest.raises(Cut):
        encoded_holes(tmp_path, BOXES, vae=FakeVae(stop_at=4))
    rest = FakeVae()
    encoded_holes(tmp_path, BOXES, vae=rest)
    assert rest.calls == 2 * (1 + 4) - 3


def test_a_resumed_run_draws_the_same_holes(tmp_path):
    captioned(tmp_path / "in", 5, (32, 32))
    data = encoded_holes(tmp_path, InpaintSettings(inpaint_masks="boxes and strokes", full_masks=0.5))

    def masks(sampler, first):
        found = []
        for step in range(first, 8):
            rng = make_generator(step)
            batch = data.make_batch(sampler.next_batch(rng), rng)
            found.append(torch.cat([cond["concat_mask"] for cond in batch.conds]))
        return found

    sampler = BucketBatchSampler(data, 2)
    whole = masks(sampler, 0)
    half = BucketBatchSampler(data, 2)
    for step in range(4):
        half.next_batch(make_generator(step))
    resumed = BucketBatchSampler(data, 2)
    resumed.load_state(half.state())
    assert all(map(torch.equal, whole[4:], masks(resumed, 4)))
    shares = [float(mask.mean()) for batch in whole for mask in batch]
    assert len(set(shares)) > 5, "holes change from step to step"


def test_the_share_of_full_masks_is_as_asked_and_their_image_is_grey(tmp_path):
    captioned(tmp_path / "in", 1, (32, 32))
    data = encoded_holes(tmp_path, InpaintSettings(inpaint_masks="boxes", full_masks=0.25))
    conds = [draw(data, [0], seed).conds[0] for seed in range(400)]
    full = [cond for cond in conds if cond["concat_mask"].all()]
    assert 0.19 < len(full) / 400 < 0.31
    grey = FakeVae().encode(torch.full((1, 32, 32, 3), 0.5))[0]
    assert all(torch.equal(cond["concat_latent_image"], grey) for cond in full)


def test_without_inpaint_masks_nothing_is_as_it_was_not(tmp_path):
    """fingerprint, draws and files are those of a dataset that was encoded before there were any"""
    captioned(tmp_path / "in", 2, (32, 32))
    plain, default = encoded(tmp_path, buckets=BUCKETS), encoded_holes(tmp_path, InpaintSettings())
    assert plain.fingerprint == default.fingerprint and plain.items == default.items
    assert "concat_mask" not in draw(default, [0, 1]).conds[0]


# -- the mask of the loss and that of the model ------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "share"), [("from the dataset", 0.5), ("none", 1.0), ("inpaint masks", None)])
def test_the_mask_of_the_loss_is_not_that_of_the_model(tmp_path, where, share):
    masked(tmp_path / "in", 2)
    data = encoded_holes(tmp_path, InpaintSettings(inpaint_masks="strokes", full_masks=0.0, loss_masks=where))
    for seed in range(6):
        batch = draw(data, [0, 1], seed)
        holes = torch.cat([cond["concat_mask"] for cond in batch.conds])
        if share is None:
            cells = torch.nn.functional.avg_pool2d(holes, 8)
            assert batch.mask is not None and torch.allclose(batch.mask, cells)
        else:
            assert (1.0 if batch.mask is None else float(batch.mask.mean())) == share
            assert float(holes.mean()) != share


def test_a_black_mask_is_no_fault_where_neither_the_loss_nor_the_model_reads_it(tmp_path):
    masked(tmp_path / "in", 2, blacken=[1])
    with pytest.raises(
        ValueError, match=r"1 mask that should be the hole of an image is black.*1\.png.*White is the hole"
    ):
        encoded_holes(tmp_path, OWN)
    with pytest.raises(ValueError, match=r"black in all that is trained, so nothing of it would be learnt: 1\.png"):
        encoded_holes(tmp_path, BOXES)
    encoded_holes(tmp_path, InpaintSettings(inpaint_masks="boxes", loss_masks="none"))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["from the dataset", "boxes, strokes and dataset"])
def test_images_without_a_mask_are_named(tmp_path, kind):
    captioned(tmp_path / "in", 2, (32, 32))
    with pytest.raises(ValueError, match=r"2 of 2 images have no mask: 0\.png, 1\.png"):
        encoded_holes(tmp_path, InpaintSettings(inpaint_masks=kind))


def test_one_image_without_a_mask_is_named_and_may_get_boxes_and_strokes(tmp_path):
    masked(tmp_path / "in", 2)
    (tmp_path / "in" / "1.mask.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images have no mask: 1\.png"):
        encoded_holes(tmp_path, OWN)
    data = encoded_holes(tmp_path, InpaintSettings(inpaint_masks="boxes, strokes and dataset"))
    assert all(item.holes for item in data.items)


def test_a_loss_in_holes_that_are_not_there_is_refused(tmp_path):
    captioned(tmp_path / "in", 1, (32, 32))
    with pytest.raises(ValueError, match="there is no hole for the loss"):
        encoded_holes(tmp_path, InpaintSettings(loss_masks="inpaint masks"))


def test_a_score_model_gets_no_holes(tmp_path):
    captioned(tmp_path / "in", 1, (32, 32))
    captions = CaptionSettings(caption_mode=CAPTION_MODE_EMPTY)
    with pytest.raises(ValueError, match="no CLIP is connected: a score model sees whole images"):
        encode_dataset(
            read_folder(tmp_path / "in"), captions, BUCKETS, False, FakeVae(), None, tmp_path / "cache", inpaint=BOXES
        )
