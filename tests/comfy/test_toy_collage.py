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
    model, losses = collage_lesson.taught(toy, frames, tmp_path, steps=40, seed=1, empty=captions == "empty")
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:2]), [round(loss, 2) for loss in losses]
    assert model is not toy.model
