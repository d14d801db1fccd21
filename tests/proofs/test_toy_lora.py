"""The proof in pixels: a LoRA teaches the toy world a shape that it has never seen, inside real ComfyUI."""

import pytest
from PIL import Image
from trainyard.tests.toy import lesson, world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(server):
    return server.add_model("checkpoints", world.cached())


def images(server, run, side, exam):
    return [
        Image.open(server.output(run.outputs[f"{side}{i}"]["images"][0]["filename"])).convert("RGB")
        for i in range(len(exam))
    ]


def test_a_lora_draws_stars_that_the_base_cannot(server, checkpoint):
    """18 questions on seeds that no training saw: the base draws at most one star in ten, the LoRA at least eight."""
    lesson.images(server.base / "input" / "stars")
    run = server.run(lesson.graph(checkpoint, "input/stars", exam=lesson.EXAM), seconds=900)
    assert run.ok, run.why
    before, after = (lesson.marks(images(server, run, side, lesson.EXAM), lesson.EXAM) for side in "bl")
    print(f"without {before}, with {after}")
    assert before["shape"] <= 0.1, f"the base draws stars already: {before}"
    assert after["shape"] >= 0.8, f"the LoRA has not learnt the star: {after}"
    assert after["colour"] >= 0.9, f"the LoRA forgot its colours: {after}"
    assert after["ground"] >= 0.9, f"the LoRA forgot its grounds: {after}"
