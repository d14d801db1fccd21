"""Collages on the toy world, through the real encoders and the real model. What they teach, in pixels: benchmarks/collage.py."""

import numpy as np
import pytest
import torch
from trainyard.tests.toy import collage_lesson, measure, sampling, world
from trainyard.trainers.data.records import open_image


@pytest.fixture(scope="module")
def toy(comfy, tmp_path_factory):
    with torch.inference_mode():
        return sampling.load(world.build(tmp_path_factory.mktemp("toy") / "toy_world.safetensors"))


def test_every_half_of_a_frame_shows_the_shape_that_its_place_in_the_caption_names(tmp_path):
    """24 frames of a star and a known shape, read back by geometry"""
    frames = collage_lesson.pairs(*collage_lesson.pictures(tmp_path, count=24), tmp_path)
    sides = set()
    for record in frames:
        left, right = record.captions[0].removeprefix("left: ").split("; right: ")
        for words, half in zip((left, right), collage_lesson.columns(np.asarray(open_image(record)) / 255), strict=True):
            assert f" {measure.measure(half).shape} " in f" {words} "
        sides.add("star" in left)
    assert sides == {True, False}, "the star stands on either side"


@pytest.mark.parametrize("captions", ["positional", "empty"])
def test_a_lora_learns_frames_of_two_that_the_base_has_never_seen_with_and_without_captions(toy, tmp_path, captions):
    """40 steps: the loss of the last ten is under half of that of the first two, where the base sees pairs for the first time."""
    frames = collage_lesson.pairs(*collage_lesson.pictures(tmp_path, count=12), tmp_path, captions)
    taught = collage_lesson.taught(toy, frames, tmp_path, steps=40, seed=1, empty=captions == "empty")
    assert np.mean(taught.losses[-10:]) < 0.5 * np.mean(taught.losses[:2]), [round(loss, 2) for loss in taught.losses]
    assert taught.model is not toy.model


def test_what_is_shown_first_holds_pairs_and_single_pictures_of_known_shapes_and_no_star(tmp_path):
    frames = collage_lesson.seen_pairs(tmp_path, count=12, uses=2)
    told = [record.captions[0] for record in frames]
    assert not any("star" in text or "ring" in text for text in told)
    pairs = sum(record.repeats for record, text in zip(frames, told, strict=True) if text.startswith("left: "))
    assert pairs / sum(record.repeats for record in frames) == pytest.approx(0.7, abs=0.05)


def test_a_frame_asked_for_by_position_has_the_star_on_either_side_and_something_else_beside_it():
    asked = collage_lesson.asked_sides(12)
    assert {[two[0]["shape"], two[1]["shape"]].index("star") for two in asked} == {0, 1}
    assert all(two[0]["shape"] != two[1]["shape"] for two in asked)
    assert all(two[0]["shape"] != two[1]["shape"] for two in collage_lesson.asked_sides(36, new=None))
