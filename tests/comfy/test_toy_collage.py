"""Collages on the toy world, through the real encoders and the real model. What they teach, in pixels:
benchmarks/collage.py."""

import numpy as np
import pytest
import torch
from trainyard.tests.toy import collage_lesson as lesson
from trainyard.tests.toy import measure, sampling, world
from trainyard.trainers.data.records import open_image


@pytest.fixture(scope="module")
def toy(comfy):
    with torch.inference_mode():
        toy = sampling.load(world.cached(lesson.MODEL))
    toy.clip = lesson.ShortClip(toy.clip)
    return toy


def test_every_half_of_a_frame_shows_the_shape_that_its_place_in_the_caption_names(tmp_path):
    """24 frames of a star and a known shape, read back by geometry"""
    frames = lesson.pairs(*lesson.images(tmp_path, count=24), tmp_path)
    sides = set()
    for record in frames:
        left, right = record.captions[0].removeprefix("left: ").split("; right: ")
        for words, half in zip((left, right), lesson.columns(np.asarray(open_image(record)) / 255), strict=True):
            assert f" {measure.measure(half).shape} " in f" {words} "
        sides.add("star" in left)
    assert sides == {True, False}, "the star stands on either side"


@pytest.mark.parametrize("captions", ["positional", "empty"])
def test_frames_of_two_are_trained_on_with_and_without_captions_at_as_many_pixels_as_single_pictures(
    toy, tmp_path, captions
):
    stars, known = lesson.images(tmp_path, count=12)
    alone = lesson.taught(toy, stars, tmp_path, steps=3, seed=1)
    taught = lesson.taught(
        toy, lesson.pairs(stars, known, tmp_path, captions), tmp_path, steps=3, seed=1, empty=captions == "empty"
    )
    assert taught.pixels == alone.pixels == 3 * lesson.PIXELS
    assert len(taught.losses) == 3 and taught.model is not toy.model
    mixed = lesson.taught(
        toy,
        lesson.pairs(stars, known, tmp_path, captions, mix=0.3),
        tmp_path,
        steps=3,
        seed=1,
        empty=captions == "empty",
    )
    assert mixed.pixels == pytest.approx(3 * lesson.PIXELS, rel=0.2) and len(mixed.losses) > 3


def test_the_model_of_the_lesson_draws_frames_of_two_known_shapes(toy):
    """What the comparison stands on: a base that knows pairs. 16 frames; the whole figures are the benchmark's."""
    found = {name: np.mean(hits) for name, hits in lesson.sides(toy, toy.model, count=16, new=None).items()}
    assert found["asked half"] >= 0.7 and found["other half"] >= 0.5 and found["colour"] >= 0.9, found


def test_a_frame_asked_for_by_position_has_the_star_on_either_side_and_something_else_beside_it():
    asked = lesson.asked_sides(12)
    assert {[two[0]["shape"], two[1]["shape"]].index("star") for two in asked} == {0, 1}
    assert all(two[0]["shape"] != two[1]["shape"] for two in asked)
    assert all(two[0]["shape"] != two[1]["shape"] for two in lesson.asked_sides(36, new=None))
