"""The lessons of LECO, sliders and ADDifT for three steps each: taught through the nodes' door, and their LoRAs drawn with.

That they teach what they should is proved in pixels: tests/proofs/test_toy_prompts_and_pairs.py."""

import dataclasses
import math

import pytest
import torch
from trainyard.nodes import host
from trainyard.tests.toy import sampling, world
from trainyard.tests.toy.differences import LESSONS, erase_tasks, from_prompts, learn

STEPS = 3
QUICK = dict(steps=STEPS, batch=1, schedule="constant")


@pytest.fixture(scope="module")
def toy(comfy):
    with torch.inference_mode():
        return sampling.load(world.cached())


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_taught_and_its_lora_moves_the_picture_with_its_strength(toy, name):
    with torch.inference_mode():
        taught = learn(toy, quick_lesson(name))
        assert len(taught.losses) == STEPS and all(map(math.isfinite, taught.losses))
        base, minus, half, plus = (image(toy, taught.lora, strength) for strength in (0.0, -1.0, 0.5, 1.0))
    moved, back, less = plus - base, minus - base, half - base
    assert moved.abs().max() > 1e-4
    assert float((moved * back).sum()) < 0 < float((moved * less).sum()), "-1 is the other way, 0.5 the same way"
    assert less.norm() < moved.norm()


def quick_lesson(name):
    """With few prompts to encode, where the whole lesson has hundreds."""
    lesson = LESSONS[name].but(**QUICK)
    few = from_prompts(erase_tasks(guidance=2.0, contexts=({},)))
    return dataclasses.replace(lesson, make=few) if name == "erase" else lesson


def image(toy, lora, strength):
    model = host.lora_keys.apply_lora(toy.model, None, lora, strength)[0]
    return sampling.images(toy, ["a red circle on a white ground"], [7], steps=2, cfg=2.0, model=model)
